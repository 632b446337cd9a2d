"""Doubles: modules that stand in for hardware or wheels that are absent. Only tests name them, in a setting."""
