"""The identity of the machine that a manager states: from the operator, or from firmware and system."""

from __future__ import annotations

import re

import pytest

from kvroom import KVManager
from kvroom.errors import ConfigurationError
from kvroom.runtime.machine_id import load_machine
from kvroom.transports.kit import machine
from kvroom_lab.pools import TestPool

UID = "0d5b3bd1-9b6e-4a52-8e55-2b6a1a3e0c5f"


def test_what_the_operator_states_replaces_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "this_machine", lambda: "f" * 32)
    assert load_machine({}) == "f" * 32
    stated = load_machine({"KVROOM_MACHINE_ID": UID})
    assert re.fullmatch(r"[0-9a-f]{32}", stated)
    assert stated == load_machine({"KVROOM_MACHINE_ID": f" {UID}\n"})
    assert stated != load_machine({"KVROOM_MACHINE_ID": UID[:-1]})
    assert UID.replace("-", "") != stated


def test_a_text_is_not_taken_for_what_firmware_and_system_say() -> None:
    """Each source has its own label, so that no operator's text gives the digest of a detected machine."""
    assert load_machine({"KVROOM_MACHINE_ID": UID}) != machine.digest("found", UID)


@pytest.mark.parametrize("text", ["", "  \n", "a" * 201, "node\n7", "node\x007", "\udc80node"])
def test_what_is_no_text_of_1_to_200_characters_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"KVROOM_MACHINE_ID has .* 1 to 200 printable ones: .*unset it"):
        load_machine({"KVROOM_MACHINE_ID": text})
    assert load_machine({"KVROOM_MACHINE_ID": "a" * 200})


@pytest.mark.parametrize("text", ["$(NODE_UID)", "${NODE_UID}", "$NODE_UID", "{{ node.uid }}", "rack-3-$(NODE)"])
def test_a_template_that_was_not_filled_in_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"KVROOM_MACHINE_ID is .*{re.escape(text)}.*was not filled in"):
        load_machine({"KVROOM_MACHINE_ID": text})


@pytest.mark.parametrize(
    "text",
    [
        "00000000-0000-0000-0000-000000000000",
        "ffffffffffffffffffffffffffffffff",
        "03000200-0400-0500-0006-000700080009",
        "12345678-1234-5678-90AB-CDDEEFAABBCC",
    ],
)
def test_a_placeholder_of_firmware_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"KVROOM_MACHINE_ID is '{text}', which many machines have: "):
        load_machine({"KVROOM_MACHINE_ID": text})


def test_a_manager_states_the_digest_to_its_peers_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVROOM_MACHINE_ID", UID)
    pool = TestPool()
    try:
        with KVManager(pool.layout, transport="fake") as manager:
            described = manager.driver.peers.describe(manager.me.incarnation)
            assert manager.machine.process().machine == load_machine({"KVROOM_MACHINE_ID": UID})
        assert manager.machine.process().machine.encode() in described
        assert UID.encode() not in described
        monkeypatch.setenv("KVROOM_MACHINE_ID", "")
        with pytest.raises(ConfigurationError, match="KVROOM_MACHINE_ID"):
            KVManager(pool.layout, transport="fake")
    finally:
        pool.close()
