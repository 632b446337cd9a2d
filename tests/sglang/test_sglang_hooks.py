"""Hooks in SGLang's queues and HTTP process: they are installed or refused, and ignore requests of other backends."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_helpers import DECODE, FAKE_HOST, HOST, PREFILL, configured, in_child, new_prompt, new_request

from kvroom.adapters.sglang import hooks
from kvroom.adapters.sglang.intake import InvalidBootstrap, check_request, check_requests
from kvroom.adapters.sglang.receiver import KVRoomKVReceiver
from kvroom.adapters.sglang.sender import KVRoomKVSender
from kvroom.errors import ConfigurationError

MODULE: Any = hooks
REGISTRY, BEFORE = MODULE.HookRegistry, MODULE.HookType.BEFORE
SCHEDULER = [
    "sglang.srt.disaggregation.decode.DecodePreallocQueue._send_kv_metadata",
    "sglang.srt.disaggregation.decode.DecodeTransferQueue._defer_release",
    "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue.create_sender",
]


def test_hooks_are_installed_once() -> None:
    def call() -> Any:
        REGISTRY.reset()
        for _ in range(3):
            hooks.install_in_scheduler()
        return sorted(REGISTRY._patched), [len(REGISTRY._hooks[target]) for target in SCHEDULER]

    assert in_child(call) == [SCHEDULER, [1, 1, 1]]


def test_another_plug_in_that_was_first_is_named() -> None:
    def call() -> Any:
        REGISTRY.reset()
        REGISTRY.register(SCHEDULER[1], lambda *_: None, BEFORE)
        REGISTRY.apply_hooks()
        said = []
        for _ in range(2):
            try:
                hooks.install_in_scheduler()
            except ConfigurationError as error:
                said.append(str(error))
        return said, sorted(REGISTRY._patched), [len(REGISTRY._hooks[target]) for target in SCHEDULER]

    said, patched, counts = in_child(call)
    remedy = "start the server without that plug-in"
    assert said == [f"another plug-in of SGLang has hooked {SCHEDULER[1]}, which kvroom needs: {remedy}"] * 2
    assert (patched, counts) == ([SCHEDULER[1]], [0, 1, 0])


def test_another_plug_in_that_waits_to_be_applied_works_too() -> None:
    def call() -> Any:
        REGISTRY.reset()
        seen: list[str] = []
        REGISTRY.register(SCHEDULER[1], lambda queue, one: seen.append("theirs"), BEFORE)
        hooks.install_in_scheduler()
        queue = SimpleNamespace(deferred_kv_release_timeout=30.0, _deferred_releases=[])
        queue._is_host_destination = lambda one: False
        receiver = object.__new__(KVRoomKVReceiver)
        receiver.abort_notified = True
        DECODE.DecodeTransferQueue._defer_release(queue, SimpleNamespace(kv_receiver=receiver, metadata_buffer_index=3))
        return seen, str(queue._deferred_releases[0][2]), queue._deferred_releases[0][3:]

    assert in_child(call) == [["theirs"], "inf", [3, 1]]


def test_a_target_that_does_not_exist_is_named() -> None:
    def call() -> str:
        with pytest.raises(ConfigurationError) as raised:
            hooks.install(("sglang.srt.environ.EnvField.absent", BEFORE, lambda: None))
        return str(raised.value)

    assert "lacks sglang.srt.environ.EnvField.absent; kvroom was tested with" in in_child(call)


def test_requests_of_other_backends_are_left_alone() -> None:
    queue = SimpleNamespace(deferred_kv_release_timeout=30.0)
    other = SimpleNamespace(kv_receiver=object(), req=object())
    hooks.lift_release_deadline(queue, other)
    hooks.identify_receiver(queue, other)
    hooks.identify_sender(True, queue, SimpleNamespace(disagg_kv_sender=object()))
    hooks.identify_sender(False, queue, SimpleNamespace(disagg_kv_sender=None))
    assert queue.deferred_kv_release_timeout == 30.0
    hooks.lift_release_deadline(queue, SimpleNamespace(kv_receiver=object.__new__(KVRoomKVReceiver)))
    assert math.isinf(queue.deferred_kv_release_timeout)


def test_a_request_that_sglang_refuses_has_no_sender_and_stays_refused() -> None:
    """The hook returns nothing, because a value from an AFTER hook would replace SGLang's own result."""

    def call() -> Any:
        REGISTRY.reset()
        hooks.install_in_scheduler()
        queue = object.__new__(PREFILL.PrefillBootstrapQueue)
        queue.max_input_len = 4
        queue.scheduler = SimpleNamespace(output_streamer=SimpleNamespace(stream_output=lambda *_: None))
        req = new_request(new_prompt(5))
        return queue.create_sender(req, 2), req.disagg_kv_sender is None

    assert in_child(call) == [False, True]


def test_the_hook_passes_the_prompt_to_the_sender() -> None:
    told: list[Any] = []

    class Told(KVRoomKVSender):
        def __init__(self) -> None:
            """Create a double of a sender that SGLang has created."""

        def identify(self, request: Any, queue: Any) -> None:
            told.append(request)

    req = SimpleNamespace(disagg_kv_sender=Told())
    hooks.identify_sender(True, None, req, 2)
    assert told == [req]


# -- requests as they come in ------------------------------------------------------------------------------------------


def asked(host: Any = HOST, port: Any = 8998, room: Any = 7) -> Any:
    return SimpleNamespace(bootstrap_host=host, bootstrap_port=port, bootstrap_room=room)


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("room", [0, -1, 2**63, "x", True, 1.0])
def test_a_wrong_room_is_refused_as_the_client_reads_it(mode: str, room: Any) -> None:
    with (
        configured(mode, 8998),
        pytest.raises(InvalidBootstrap, match=r"bootstrap_room is .*: give an int of at") as raised,
    ):
        check_requests(None, [asked(), asked(room=room)])
    assert repr(room) in str(raised.value)
    assert isinstance(raised.value, ValueError)  # SGLang answers a `ValueError` with status 400


@pytest.mark.parametrize("host", [None, "", 7, "a b", "::zz", "host:1", "[::1"])
def test_an_address_that_cannot_be_one_is_refused_on_both_sides(host: Any) -> None:
    for mode in ("prefill", "decode"):
        if host is None and mode == "prefill":  # which does not use the address
            continue
        with configured(mode, 8998), pytest.raises(InvalidBootstrap, match="bootstrap_host is ") as raised:
            check_request(None, asked(host=host))
        assert repr(host) in str(raised.value)


def test_a_prefill_side_needs_no_address() -> None:
    with configured("prefill", 8998):
        check_request(None, asked(host=None))


@pytest.mark.parametrize("port", [None, -1, 0, 65536, "http"])
@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_a_port_that_cannot_be_one_is_refused_on_both_sides(mode: str, port: Any) -> None:
    with configured(mode, 8998), pytest.raises(InvalidBootstrap, match=f"bootstrap_port {port!r}"):
        check_request(None, asked(port=port))


@pytest.mark.parametrize("host", ["127.0.0.1", "prefill-0", "example.org", "::1", "[::1]", "fd00::1", "fe80::1%eth0"])
def test_an_address_is_taken(host: str) -> None:
    with configured("decode", 8998):
        check_request(None, asked(host=host))
        check_request(None, asked(host=host, room=1))
        check_request(None, asked(host=host, room=2**63 - 1))


def test_requests_of_sglangs_own_are_left_alone() -> None:
    with configured("decode", 8998):
        check_request(None, asked(host=FAKE_HOST, room=0))
        check_request(None, asked(host=None, room=None))  # SGLang itself refuses it
        check_request(None, SimpleNamespace())  # a request for an embedding
