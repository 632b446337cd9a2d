"""`local`: two processes on one machine, through the kernel, a shared pool or CUDA IPC. Start at `transport.py`."""

from .transport import LocalOptions, LocalTransport, probe

__all__ = ["LocalOptions", "LocalTransport", "probe"]
