"""Conversion of messages to bytes and back: frames, limits, the handshake, authentication.

Nothing here uses a clock, a socket or a thread: bytes come in, bytes and values go out. Any bytes of a peer yield a
value or a `RemoteProtocolError`, whether they arrive whole or one at a time.
"""
