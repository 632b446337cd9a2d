"""What transports share that write through somebody else's engine. Begin at `engine.py`, then `transport.py`."""
