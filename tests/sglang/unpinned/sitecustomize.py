"""A double of memory that CUDA pins, so that SGLang's LoRA adapters can be loaded on a machine without a GPU.

SGLang creates some small tensors of its LoRA layers in pinned memory, whatever the device is. PyTorch refuses that on a
machine without an accelerator. With this folder on PYTHONPATH, such tensors are in ordinary memory once SGLang has
imported its LoRA layers. As with real pinned memory, a tensor on a device is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

FACTORIES = ("empty", "full", "tensor", "zeros")


class UnpinLoRA(MetaPathFinder):
    """A finder that finds no module, but replaces functions when SGLang's LoRA layers are about to be imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "sglang.srt.lora.layers":
            sys.meta_path.remove(self)
            import torch

            for name in FACTORIES:
                setattr(torch, name, unpinned(getattr(torch, name)))
            torch.Tensor.pin_memory = in_host_memory
        return None


def unpinned(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return a factory of tensors that accepts `pin_memory` and creates them in ordinary memory."""

    @wraps(factory)
    def make(*args: Any, pin_memory: bool = False, **options: Any) -> Any:
        made = factory(*args, **options)
        return in_host_memory(made) if pin_memory else made

    return make


def in_host_memory(tensor: Any, device: object = None) -> Any:
    """Return the tensor itself. Raises `RuntimeError` if it is on a device."""
    if tensor.device.type != "cpu":
        raise RuntimeError(f"only tensors in host memory can be pinned, not one on {tensor.device}")
    return tensor


sys.meta_path.insert(0, UnpinLoRA())
