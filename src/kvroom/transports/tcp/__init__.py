"""`tcp`: scatter/gather over TCP connections. Begin reading at `transport.py`."""

from kvroom.transports.tcp.transport import TcpTransport, probe

__all__ = ["TcpTransport", "probe"]
