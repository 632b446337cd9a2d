"""`local`: two processes on one machine, through the kernel, a shared pool or CUDA IPC. Begin at `transport.py`."""

from kvroom.transports.local.transport import LocalTransport, probe

__all__ = ["LocalTransport", "probe"]
