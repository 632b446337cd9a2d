"""The checks before an engine starts: vLLM's version, the settings, and the server of the directory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from kvroom import Parallel, Place
from kvroom.adapters.vllm import guard, start
from kvroom.adapters.vllm.connector import KVRoomConnector, guarded
from kvroom.adapters.vllm.settings import VLLMSettings
from kvroom.errors import ConfigurationError
from kvroom.wire.address import HostPort


def test_the_installed_vllm_has_all_that_is_needed() -> None:
    guard.check()
    assert guard.version().startswith(guard.TESTED)


@pytest.mark.parametrize(
    "lost",
    [
        ("vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1", "get_transfer_results"),
        ("vllm.distributed.kv_transfer.kv_connector.v1.base", "KVConnectorTransferResults"),
        ("vllm.v1.core.sched.output", "KVConnectorBlockState"),
    ],
)
def test_another_vllm_is_refused_with_the_names_that_it_lacks(
    lost: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(".".join(lost))
    with pytest.raises(ConfigurationError, match=rf"tested with vLLM 0\.32\.0; this is .*lacks \S*{lost[1]}"):
        guard.check()


def test_an_absent_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_REQUIRED", (("vllm.no.such.module", "Thing"),))
    with pytest.raises(ConfigurationError, match=r"lacks vllm\.no\.such\.module: install a tested vLLM"):
        guard.check()
    assert guard.optional("vllm.no.such.module", "Thing") is None
    assert guard.optional("vllm.v1.request", "NoSuchThing") is None


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"lease": 3}, "unknown field `lease`; the keys are host, "),
        ({"bootstrap_s": 0}, r"Expected `float` > 0.*\$\.bootstrap_s"),
        ({"bootstrap_port": 70000}, r"\$\.bootstrap_port"),
        ({"transport_options": "x"}, r"Expected `object`, got `str` - at `\$\.transport_options`"),
        ({"host": "[::1]:8998"}, r"kv_connector_extra_config: host '\[::1\]:8998' is not a host alone"),
        ({"advertise_host": "::"}, r"advertise_host '::' means every interface"),
        ({"bootstrap_allow": "10.0.0.1/8"}, r"kv_connector_extra_config: entry '10\.0\.0\.1/8' of the bootstrap addr"),
        ({"bootstrap_allow": ["any", "127.1"]}, r"kv_connector_extra_config: entry '127\.1' of the bootstrap addr"),
        ({"bootstrap_allow": 7}, r"\$\.bootstrap_allow"),
        ({"rooms_host": "[::1]:9100"}, r"kv_connector_extra_config: host '\[::1\]:9100' is not a host alone"),
        ({"bootstrap_host": "fe80::1"}, r"a link-local address without its interface"),
    ],
)
def test_wrong_settings_are_one_clear_error(extra: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        VLLMSettings.of(extra)
    assert re.search(words, str(caught.value))


@pytest.mark.parametrize("host", ["10.0.0.2", "worker-3", "0.0.0.0", "fd00::2"])
def test_a_consumer_beyond_loopback_needs_a_list(host: str) -> None:
    reached = {"host": host, "advertise_host": "10.0.0.2"}
    with pytest.raises(ConfigurationError, match=r"for example \"bootstrap_allow\": \"10\.0\.0\.0/8,\*\.pd\.svc\""):
        VLLMSettings.of(reached).check_consumer()
    for allow in ("10.0.0.0/8,*.pd.svc", ["10.0.0.0/8", "*.pd.svc"], "any"):
        VLLMSettings.of({**reached, "bootstrap_allow": allow}).check_consumer()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.7", "[::1]", "localhost"])
def test_a_consumer_on_loopback_needs_none(host: str) -> None:
    VLLMSettings.of({"host": host}).check_consumer()


@pytest.mark.parametrize("side", KVConnectorRole)
@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer", "kv_both"])
def test_the_list_is_asked_for_when_a_connector_is_made_that_consumes(role: str, side: KVConnectorRole) -> None:
    transfer = KVTransferConfig(
        kv_connector="KVRoomConnector",
        kv_connector_module_path="kvroom.adapters.vllm",
        kv_role=role,
        kv_connector_extra_config={"host": "10.0.0.2"},
    )
    config = SimpleNamespace(kv_transfer_config=transfer)
    layers = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=4, dtype=torch.float32)
    caches = KVCacheConfig(40, [], [KVCacheGroupSpec(["model.layers.0.self_attn.attn"], layers)])
    if role == "kv_producer":
        KVRoomConnector(config, side, caches)
        return
    with pytest.raises(ConfigurationError, match="bootstrap_allow"):
        KVRoomConnector(config, side, caches)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "worker-3"])
def test_beyond_loopback_the_status_server_needs_a_token(host: str) -> None:
    with pytest.raises(ConfigurationError, match="is not loopback and needs a token: set KVROOM_ADMIN_TOKEN_FILE"):
        VLLMSettings.of({"rooms_host": host}).check_status_server(b"")
    VLLMSettings.of({"rooms_host": host}).check_status_server(b"a token of sixteen bytes")
    VLLMSettings.of({"rooms_host": host, "rooms_port": None}).check_status_server(b"")
    VLLMSettings.of({"host": host, "advertise_host": "10.0.0.1"}).check_status_server(b"")


def test_renewals_come_often_enough_for_the_lease() -> None:
    assert VLLMSettings.of({"bootstrap_s": 12}).timeouts.renew_s == 2
    assert VLLMSettings.of({"bootstrap_s": 12, "renew_s": 1}).timeouts.renew_s == 1


def test_each_data_parallel_engine_has_a_directory_of_its_own() -> None:
    config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_index=3))
    assert start.directory_address(config, VLLMSettings.of({"bootstrap_port": 9000})) == HostPort("127.0.0.1", 9003)
    assert start.directory_address(config, VLLMSettings.of({"bootstrap_port": 0})) == HostPort("127.0.0.1", 0)


@pytest.mark.parametrize(("place", "rank"), [((0, 0), 4), ((0, 1), 5), ((1, 0), 6), ((1, 1), 7)])
def test_each_rank_of_all_engines_has_a_number_of_its_own(place: tuple[int, int], rank: int) -> None:
    config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_index=1))
    pp, tp = place
    assert start.rank_of(config, Parallel(tp=2, pp=2), Place(0, 0, tp, pp)) == rank


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"link_port": 65533}, "link_port 65533 leaves no port for each of 4 ranks: give at most 65532"),
        ({"rooms_port": 65535}, "rooms_port 65535 leaves no port for each of 4 ranks: give at most 65532"),
        ({"bootstrap_port": 65535}, "bootstrap_port 65535 leaves no port for each of 2 ranks: give at most 65534"),
        ({"link_port": 9000, "rooms_port": 9003}, "rooms_port 9003 and link_port 9000 both need port 9003"),
        ({"link_port": 9003, "rooms_port": 9000}, "rooms_port 9000 and link_port 9003 both need port 9003"),
        ({"link_port": 8995}, "bootstrap_port 8998 and link_port 8995 both need port 8998"),
    ],
)
def test_ports_that_ranks_cannot_have_are_named(extra: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        VLLMSettings.of(extra).check_ports(4, directories=2)


def test_ports_that_all_ranks_can_have_are_allowed() -> None:
    VLLMSettings.of({"link_port": 65532, "rooms_port": 65528, "bootstrap_port": 65526}).check_ports(4, directories=2)
    VLLMSettings.of({"link_port": 0, "rooms_port": None, "bootstrap_port": 0}).check_ports(4, directories=2)
    VLLMSettings.of({"link_port": 8998}).check_ports(4, directories=0)  # a consumer serves no directory


@pytest.mark.parametrize(
    ("extra", "listens", "reached", "directory"),
    [
        ({"host": "[::1]"}, "::1", "::1", None),
        ({"host": "::", "advertise_host": "[FD00::7]"}, "::", "fd00::7", None),
        (
            {"host": "fe80::1%eth0", "bootstrap_host": "[fe80::1%25eth0]"},
            "fe80::1%eth0",
            "fe80::1%eth0",
            "fe80::1%eth0",
        ),
        ({"host": "Worker-3.", "bootstrap_host": "[::1]"}, "worker-3", "worker-3", "::1"),
    ],
)
def test_hosts_are_read_in_every_form(
    extra: Mapping[str, Any], listens: str, reached: str, directory: str | None
) -> None:
    settings = VLLMSettings.of(extra)
    assert (settings.host, settings.reached_by, settings.bootstrap_host) == (listens, reached, directory)


def test_an_exception_in_a_hook_is_logged_and_does_not_leave_it(caplog: pytest.LogCaptureFixture) -> None:
    class Faulty:
        @guarded(lambda: (0, False))
        def get_num_new_matched_tokens(self, request: object) -> tuple[int, bool]:
            raise KeyError(request)

    assert Faulty().get_num_new_matched_tokens("r-1") == (0, False)
    assert "internal error in the connector's get_num_new_matched_tokens" in caplog.text
    assert "KeyError: 'r-1'" in caplog.text


def test_every_hook_that_vllm_calls_while_it_serves_is_guarded() -> None:
    never_raise = {"wait_for_layer_load", "save_kv_layer", "bind_connector_metadata", "get_loaded_kv_cache_group_ids"}
    at_the_start = {
        "register_kv_caches", "get_handshake_metadata", "set_xfer_handshake_metadata_pp_aware",
        "build_kv_connector_stats", "build_prom_metrics",
    }  # fmt: skip
    hooks = {name for name, value in vars(KVRoomConnector).items() if callable(value) and not name.startswith("_")}
    unguarded = {name for name in hooks if not hasattr(vars(KVRoomConnector)[name], "__wrapped__")}
    assert unguarded <= never_raise | at_the_start
    assert len(hooks) > 12
