"""`local`: two processes on one machine, through the kernel, a shared pool or CUDA IPC. Begin at `transport.py`."""

from .transport import LocalOptions, LocalTransport, probe

__all__ = ["LocalOptions", "LocalTransport", "probe"]
