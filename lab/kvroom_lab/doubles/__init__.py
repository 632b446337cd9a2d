"""Doubles: modules that stand in for parts whose hardware or wheel is not here. Tests name them; nothing else does."""
