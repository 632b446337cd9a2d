"""`tcp`: scatter/gather over TCP connections. Start reading in `transport.py`."""

from .transport import TcpOptions, TcpTransport, probe

__all__ = ["TcpOptions", "TcpTransport", "probe"]
