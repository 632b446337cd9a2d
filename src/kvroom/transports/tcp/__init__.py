"""`tcp`: scatter/gather over TCP connections. Begin reading at `transport.py`."""

from .transport import TcpOptions, TcpTransport, probe

__all__ = ["TcpOptions", "TcpTransport", "probe"]
