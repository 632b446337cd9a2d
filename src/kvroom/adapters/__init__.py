"""Connectors that let other engines hand over through kvroom. Each one imports its engine; nothing else does."""
