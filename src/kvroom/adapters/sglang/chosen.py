"""The checks and classes of the backend, imported only if `--disaggregation-transfer-backend kvroom` is chosen."""

from __future__ import annotations

import os
from typing import Any

from kvroom import load_machine, load_secret
from kvroom.errors import ConfigurationError
from kvroom.network import load_admin_token

from . import support
from .plugin import explain, missing
from .settings import SGLangSettings

_CONN = "sglang.srt.disaggregation.base.conn"
_PREFILL = "sglang.srt.disaggregation.prefill"
_DECODE = "sglang.srt.disaggregation.decode"
_TOKENIZER = "sglang.srt.managers.tokenizer_manager"
REQUIRED = (
    (_CONN, "BaseKVManager", ("args", "disaggregation_mode", "server_args", "is_mla_backend")),
    (_CONN, "BaseKVSender", ("mgr", "bootstrap_addr", "bootstrap_room", "req_has_disagg_prefill_dp_rank")),
    (_CONN, "BaseKVSender.send", ("kv_indices", "state_indices", "num_kv_tokens")),
    (_CONN, "BaseKVSender.should_send_kv_chunk", ("num_pages", "last_chunk")),
    (_CONN, "BaseKVSender.pop_decode_prefix_len", ()),
    (_CONN, "BaseKVReceiver", ("mgr", "bootstrap_addr", "bootstrap_room")),
    (_CONN, "BaseKVReceiver.init", ("prefill_dp_rank",)),
    (_CONN, "BaseKVReceiver.send_metadata", ("kv_indices", "aux_index", "state_indices", "decode_prefix_len")),
    (_CONN, "BaseKVBootstrapServer", ("host", "port")),
    (_CONN, "KVTransferMetric", ("transfer_latency_s", "transfer_total_bytes")),
    (_CONN, "KVTransferDestination.DEVICE", ()),
    (_PREFILL, "PrefillBootstrapQueue.create_sender", ("req",)),
    (_DECODE, "DecodePreallocQueue._send_kv_metadata", ("decode_req",)),
    (_DECODE, "DecodeTransferQueue._defer_release", ("decode_req",)),
    (_DECODE, "DecodeTransferQueue.resolve_deferred_releases", ()),
    (_TOKENIZER, "TokenizerManager._handle_batch_request", ("obj",)),
    (_TOKENIZER, "TokenizerManager._send_one_request", ("tokenized_obj",)),
    (_TOKENIZER, "TokenizerManager._send_batch_request", ("tokenized_objs",)),
    ("sglang.srt.disaggregation.utils", "FAKE_BOOTSTRAP_HOST", ()),
    ("sglang.srt.configs.model_config", "ModelConfig.from_server_args", ("server_args",)),
    ("sglang.srt.runtime_context", "get_device", ()),
    ("sglang.srt.runtime_context", "get_disagg", ()),
    ("sglang.srt.runtime_context", "get_serving", ()),
)
"""Modules, names in them, and parameters of these that the adapter uses, as SGLang 0.5.23 has them."""


def check(server_args: Any) -> None:
    """Check all that can be checked before a model is loaded, and register the hooks of the HTTP server's process.

    Args:
        server_args: SGLang's `ServerArgs`, with `--disaggregation-mode` prefill or decode.

    Raises:
        ConfigurationError: This SGLang lacks a name, an option is not supported, or a setting is invalid.
    """
    check_names()
    support.check(server_args, str(server_args.disaggregation_mode))
    settings, host = SGLangSettings.read(os.environ), str(server_args.host)
    settings.listen_host(host)
    settings.check_status_server(load_admin_token(os.environ))
    if str(server_args.disaggregation_mode) == "decode":
        settings.check_allowed(host)
    load_secret(os.environ)
    load_machine(os.environ)
    from .intake import install_in_server

    install_in_server()


def check_names() -> None:
    """Raise `ConfigurationError` if the installed SGLang lacks names that the adapter uses. The message lists them."""
    absent = lacking()
    if absent:
        raise ConfigurationError(explain(absent))


def lacking() -> list[str]:
    """Return the names that the adapter uses and the installed SGLang lacks."""
    return list(dict.fromkeys(missing(REQUIRED)))


def classes() -> dict[str, type]:
    """Return the classes of the backend, by the value of SGLang's `KVClassType`."""
    from .manager import KVRoomKVBootstrapServer, KVRoomKVManager
    from .receiver import KVRoomKVReceiver
    from .sender import KVRoomKVSender

    return {
        "manager": KVRoomKVManager,
        "sender": KVRoomKVSender,
        "receiver": KVRoomKVReceiver,
        "bootstrap_server": KVRoomKVBootstrapServer,
    }
