"""Three hooks in SGLang's queues, for information that its interface does not pass to a backend.

They are registered with SGLang's own hook registry, in the scheduler's process, when the manager is created. They
ignore requests that do not belong to kvroom, such as SGLang's own warm-up requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from kvroom.errors import ConfigurationError

from .plugin import explain

_PREFILL = "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue"
_PREALLOC = "sglang.srt.disaggregation.decode.DecodePreallocQueue"
_TRANSFER = "sglang.srt.disaggregation.decode.DecodeTransferQueue"


def install_in_scheduler() -> None:
    """Register the hooks of a scheduler's process. Idempotent."""
    install(
        (f"{_PREFILL}.create_sender", HookType.AFTER, identify_sender),
        (f"{_PREALLOC}._send_kv_metadata", HookType.BEFORE, identify_receiver),
        (f"{_TRANSFER}._defer_release", HookType.BEFORE, hold_without_deadline),
    )


def install(*hooks: tuple[str, HookType, Callable[..., Any]]) -> None:
    """Register hooks, each with its target and type, and apply them. Idempotent.

    Raises:
        ConfigurationError: A hook did not take effect. SGLang applies the hooks of a target only once, so another
            plug-in that has hooked the same target earlier prevents it.
    """
    known = {hook for registered in HookRegistry._hooks.values() for _, hook, _ in registered}  # noqa: SLF001 - no getter
    new = [hook for hook in hooks if hook[2] not in known]
    taken = [target for target, _, _ in new if target in HookRegistry._patched]  # noqa: SLF001 - no getter
    if taken:
        raise ConfigurationError(f"another plug-in of SGLang has hooked {taken[0]}, which kvroom needs: run without it")
    for target, kind, hook in new:
        HookRegistry.register(target, hook, kind)
    HookRegistry.apply_hooks()
    absent = [target for target, _, _ in hooks if target not in HookRegistry._patched]  # noqa: SLF001 - no getter
    if absent:
        raise ConfigurationError(explain(absent))


def identify_sender(created: bool, queue: Any, req: Any, *_: Any, **__: Any) -> None:  # noqa: ARG001 - an AFTER hook
    """Pass the request to its sender, after SGLang has created the sender."""
    from .sender import KVRoomKVSender

    sender = getattr(req, "disagg_kv_sender", None)
    if isinstance(sender, KVRoomKVSender):
        sender.identify(req, queue)


def identify_receiver(queue: Any, decode_req: Any, *_: Any, **__: Any) -> None:
    """Pass the request and the number of its tokens to its receiver, before SGLang offers pages."""
    from .receiver import KVRoomKVReceiver

    if isinstance(decode_req.kv_receiver, KVRoomKVReceiver):
        decode_req.kv_receiver.identify(decode_req.req, queue)


def hold_without_deadline(queue: Any, decode_req: Any) -> None:
    """Remove SGLang's deadline for the pages of a failed request, before SGLang holds these pages.

    SGLang frees such pages after 30 s "anyway", even if a writer may still exist. A timeout proves nothing, so the
    pages of a room are released only on proof. Until then the room counts as quarantined and shows what it waits for.
    """
    from .receiver import KVRoomKVReceiver

    if isinstance(decode_req.kv_receiver, KVRoomKVReceiver):
        queue.deferred_kv_release_timeout = float("inf")
