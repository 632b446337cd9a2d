"""The shared part of the transports that write through an engine of another project (NIXL, Mooncake, Ascend, Mori).

Begin at `engine.py`, then `transport.py`.
"""
