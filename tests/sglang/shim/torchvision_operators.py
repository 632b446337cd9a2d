"""A double of torchvision's C extension, so that torchvision can be imported beside a torch for the CPU.

A .pth file in SGLang's environment makes Python import this module at every start (scripts/install-sglang.sh).
The wheel of torchvision is built for CUDA, so its C extension does not load, and the import of torchvision fails,
because the extension's operators do not exist. SGLang imports torchvision but, for text models, calls none of these
operators. This module declares them without an implementation, so a call of one fails.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class DeclareOperators(MetaPathFinder):
    """A finder that finds no module, but declares the operators when torchvision is about to be imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator in ("nms", "qnms"):
                torch.library.define(f"torchvision::{operator}", SCHEMA)
        return None


sys.meta_path.insert(0, DeclareOperators())
