"""Messages to bytes and back: frames, limits, the handshake, authentication.

Nothing here reads a clock, a socket or a thread: bytes come in, bytes and values go out, and whatever a peer sends
yields a value or a `RemoteProtocolError`, whole or byte by byte.
"""
