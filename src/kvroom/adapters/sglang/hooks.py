"""Three hooks in SGLang's queues, for what its interface does not tell a backend.

They are registered with SGLang's own hook registry, in the scheduler's process, when the manager is made. Each leaves
requests alone that do not belong to kvroom, such as the ones that SGLang sends to itself to warm up.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from kvroom.adapters.sglang.plugin import explain
from kvroom.errors import ConfigurationError

_PREFILL = "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue"
_PREALLOC = "sglang.srt.disaggregation.decode.DecodePreallocQueue"
_TRANSFER = "sglang.srt.disaggregation.decode.DecodeTransferQueue"


def install_in_scheduler() -> None:
    """Register the hooks of a scheduler's process. Idempotent."""
    install(f"{_PREFILL}.create_sender", HookType.AFTER, identify_sender)
    install(f"{_PREALLOC}._send_kv_metadata", HookType.BEFORE, identify_receiver)
    install(f"{_TRANSFER}._defer_release", HookType.BEFORE, hold_without_deadline)


def install(target: str, kind: HookType, hook: Any) -> None:
    """Register one hook and apply it. Idempotent.

    Raises `ConfigurationError` if it did not take effect: SGLang applies the hooks of a target once, so another
    plug-in that has hooked the same target earlier keeps ours out.
    """
    if any(known is hook for _, known, _ in HookRegistry._hooks[target]):  # noqa: SLF001 - the registry cannot be asked
        return
    taken = target in HookRegistry._patched  # noqa: SLF001 - the registry cannot be asked
    HookRegistry.register(target, hook, kind)
    HookRegistry.apply_hooks()
    if taken:
        raise ConfigurationError(f"another plug-in of SGLang has hooked {target}, which kvroom needs: run without it")
    if target not in HookRegistry._patched:  # noqa: SLF001 - the registry cannot be asked
        raise ConfigurationError(explain([target]))


def identify_sender(created: bool, queue: Any, req: Any, *_: Any, **__: Any) -> None:  # noqa: ARG001 - an AFTER hook
    """After SGLang has made a sender: tell it which prompt it hands over."""
    from kvroom.adapters.sglang.sender import KVRoomKVSender

    sender = getattr(req, "disagg_kv_sender", None)
    if isinstance(sender, KVRoomKVSender):
        sender.identify(req)


def identify_receiver(queue: Any, decode_req: Any, *_: Any, **__: Any) -> None:  # noqa: ARG001 - a BEFORE hook
    """Before SGLang offers pages: tell the receiver which prompt, and how many tokens, are to come."""
    from kvroom.adapters.sglang.receiver import KVRoomKVReceiver

    if isinstance(decode_req.kv_receiver, KVRoomKVReceiver):
        decode_req.kv_receiver.identify(decode_req.req)


def hold_without_deadline(queue: Any, decode_req: Any) -> None:
    """Before SGLang holds the pages of a failed request: lift its deadline.

    SGLang gives such pages back after 30 s "anyway", whether or not a writer is still there. A timeout proves nothing,
    so pages of a room come back on proof only. Until then the room counts as quarantined and says what it waits for.
    """
    from kvroom.adapters.sglang.receiver import KVRoomKVReceiver

    if isinstance(decode_req.kv_receiver, KVRoomKVReceiver):
        queue.deferred_kv_release_timeout = float("inf")
