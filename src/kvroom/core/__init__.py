"""Rooms: two pure state machines and the one table that holds them. Time comes in, effects go out."""
