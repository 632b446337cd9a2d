"""Three hooks in the queues of SGLang's scheduler, for two features that SGLang's interface for backends lacks.

Two hooks pass a request to its sender or receiver. The third lifts the deadline after which SGLang frees the pages of a
failed request. The manager registers them with SGLang's own hook registry, in the scheduler's process. They ignore
requests of other backends, such as those that SGLang sends to itself for its warm-up.
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
    """Register the hooks of the scheduler's process. Idempotent."""
    install(
        (f"{_PREFILL}.create_sender", HookType.AFTER, identify_sender),
        (f"{_PREALLOC}._send_kv_metadata", HookType.BEFORE, identify_receiver),
        (f"{_TRANSFER}._defer_release", HookType.BEFORE, lift_release_deadline),
    )


def install(*hooks: tuple[str, HookType, Callable[..., Any]]) -> None:
    """Register hooks and apply them. Idempotent.

    SGLang applies the hooks of a target only once. If another plug-in has hooked a target before, a later hook would be
    registered and never called, so that is an error.

    Args:
        hooks: Triples of the dotted name of the target, the type of hook, and the hook.

    Raises:
        ConfigurationError: A hook did not take effect. The message names its target.
    """
    known = {hook for registered in HookRegistry._hooks.values() for _, hook, _ in registered}  # noqa: SLF001 - no getter
    new = [hook for hook in hooks if hook[2] not in known]
    taken = [target for target, _, _ in new if target in HookRegistry._patched]  # noqa: SLF001 - no getter
    if taken:
        raise ConfigurationError(
            f"another plug-in of SGLang has hooked {taken[0]}, which kvroom needs: start the server without that "
            f"plug-in"
        )
    for target, kind, hook in new:
        HookRegistry.register(target, hook, kind)
    HookRegistry.apply_hooks()
    absent = [target for target, _, _ in hooks if target not in HookRegistry._patched]  # noqa: SLF001 - no getter
    if absent:
        raise ConfigurationError(explain(absent))


def identify_sender(created: bool, queue: Any, req: Any, *_: Any, **__: Any) -> None:  # noqa: ARG001 - an AFTER hook
    """Pass the request to its new sender. Runs after SGLang has created the sender."""
    from .sender import KVRoomKVSender

    sender = getattr(req, "disagg_kv_sender", None)
    if isinstance(sender, KVRoomKVSender):
        sender.identify(req, queue)


def identify_receiver(queue: Any, decode_req: Any, *_: Any, **__: Any) -> None:
    """Pass the request, and with it the length of the prompt, to its receiver. Runs before SGLang offers pages."""
    from .receiver import KVRoomKVReceiver

    if isinstance(decode_req.kv_receiver, KVRoomKVReceiver):
        decode_req.kv_receiver.identify(decode_req.req, queue)


def lift_release_deadline(queue: Any, decode_req: Any) -> None:
    """Lift the deadline after which SGLang frees the pages of a failed request. Runs before SGLang holds the pages.

    SGLang by itself frees such pages after 30 s, even if the prefill side can still write into them. A timeout does not
    prove that no write is in flight, so a room releases its pages only on proof. Until then they count as quarantined,
    and the room's status names the missing proof.
    """
    from .receiver import KVRoomKVReceiver

    if isinstance(decode_req.kv_receiver, KVRoomKVReceiver):
        queue.deferred_kv_release_timeout = float("inf")
