"""Adapters that let other engines hand over requests through kvroom.

Each adapter imports its engine. No other part of kvroom imports an engine, so kvroom works where none is installed.
"""
