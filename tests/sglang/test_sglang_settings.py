"""The operator's variables and SGLang's options: which are accepted, and the errors for those that are refused."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_helpers import server_args

from kvroom.adapters.sglang import support
from kvroom.adapters.sglang.settings import SGLangSettings, directory_address
from kvroom.errors import ConfigurationError

GOOD: dict[str, tuple[str, object]] = {
    "host": ("10.0.0.1", "10.0.0.1"),
    "advertise_host": ("prefill-0", "prefill-0"),
    "link_port": ("9201", 9201),
    "rooms_host": ("10.0.0.1", "10.0.0.1"),
    "rooms_port": ("8080", 8080),
    "transport": ("tcp", "tcp"),
    "transport_options": ('{"threads": 2}', {"threads": 2}),
    "trusted_fabric": ("1", True),
    "bootstrap_allow": ("10.0.0.0/8,*.pd.svc", "10.0.0.0/8,*.pd.svc"),
    "checksum": ("1", True),
    "bootstrap_s": ("12.5", 12.5),
    "renew_s": ("3", 3.0),
    "waiting_s": ("0.5", 0.5),
    "stall_s": ("86400", 86400.0),
    "drain_s": ("7", 7.0),
    "heartbeat_s": ("1", 1.0),
}
BAD = {
    "link_port": ["-1", "65536", "null", "1.5", ""],
    "rooms_port": ["-1", "65536", "http", "1.5", ""],
    "transport_options": ["threads=2", "[1]", "2", ""],
    "checksum": ["perhaps", "2", ""],
    **{name: ["0", "-1", "nan", "86401", "soon", ""] for name in GOOD if name.endswith("_s")},
}


def test_the_table_has_every_setting() -> None:
    assert set(GOOD) == set(SGLangSettings.__struct_fields__)


@pytest.mark.parametrize("name", GOOD)
def test_a_variable_sets_its_field_and_no_other(name: str) -> None:
    text, value = GOOD[name]
    settings = SGLangSettings.read({f"KVROOM_{name.upper()}": text, "HOME": "/root"})
    default = SGLangSettings()
    assert getattr(default, name) != value
    changed = {field for field in GOOD if getattr(settings, field) != getattr(default, field)}
    assert (changed, getattr(settings, name)) == ({name}, value)


def test_null_starts_no_status_server() -> None:
    assert SGLangSettings.read({"KVROOM_ROOMS_PORT": "null"}).rooms_port is None


@pytest.mark.parametrize(("text", "value"), [("0", False), ("false", False), ("true", True), ("1", True)])
def test_a_switch_is_a_word_or_a_digit(text: str, value: bool) -> None:
    assert SGLangSettings.read({"KVROOM_CHECKSUM": text}).checksum is value


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BAD.items() for text in texts])
def test_a_wrong_value_names_its_variable_and_a_remedy(name: str, text: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        SGLangSettings.read({f"KVROOM_{name.upper()}": text})
    said = str(raised.value)
    assert said.startswith(f"KVROOM_{name.upper()} is ")
    assert text in said
    assert "see the table of settings in docs/sglang.md" in said or "write an object like" in said


def test_unknown_variables_are_those_that_are_misspelt() -> None:
    environ = dict.fromkeys(
        ["KVROOM_TRANSPORTS", "KVROOM_SECRET", "KVROOM_SECRET_FILE", "KVROOM_", "SGLANG_HOST", "kvroom_host"], "x"
    )
    environ |= {"KVROOM_ADMIN_TOKEN": "x", "KVROOM_ADMIN_TOKEN_FILE": "x", "KVROOM_MACHINE_ID": "x"}
    environ |= {f"KVROOM_{name.upper()}": text for name, (text, _) in GOOD.items()}
    assert SGLangSettings.unknown(environ) == ["KVROOM_", "KVROOM_TRANSPORTS"]


def test_the_deadlines_are_those_of_the_variables() -> None:
    settings = SGLangSettings(bootstrap_s=30, waiting_s=31, stall_s=32, drain_s=33)
    timeouts = settings.timeouts
    assert (timeouts.bootstrap_s, timeouts.waiting_s, timeouts.stall_s, timeouts.drain_s) == (30, 31, 32, 33)
    assert timeouts.renew_s == 5
    assert SGLangSettings(bootstrap_s=30, renew_s=2).timeouts.renew_s == 2


@pytest.mark.parametrize("host", ["10.0.0.2", "worker-3", "0.0.0.0", "fd00::2"])
def test_a_decode_server_beyond_loopback_needs_a_list(host: str) -> None:
    settings = SGLangSettings(advertise_host="10.0.0.2")
    with pytest.raises(ConfigurationError, match=r"for example KVROOM_BOOTSTRAP_ALLOW='10\.0\.0\.0/8,\*\.pd\.svc'"):
        settings.check_allowed(host)
    SGLangSettings(advertise_host="10.0.0.2", bootstrap_allow="any").check_allowed(host)
    with pytest.raises(ConfigurationError, match="KVROOM_BOOTSTRAP_ALLOW"):
        SGLangSettings(host=host, advertise_host="10.0.0.2").check_allowed("127.0.0.1")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.7", "::1", "localhost"])
def test_a_decode_server_on_loopback_needs_none(host: str) -> None:
    SGLangSettings().check_allowed(host)


@pytest.mark.parametrize("allow", ["10.0.0.1/8", "any,127.1", "", "*"])
def test_a_wrong_entry_of_the_list_names_the_variable(allow: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^KVROOM_BOOTSTRAP_ALLOW: entry '.*' of the bootstrap addresses"):
        SGLangSettings(bootstrap_allow=allow).check_allowed("127.0.0.1")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "prefill-0"])
def test_beyond_loopback_the_status_server_needs_a_token(host: str) -> None:
    with pytest.raises(ConfigurationError, match="is not loopback and needs a token: set KVROOM_ADMIN_TOKEN_FILE"):
        SGLangSettings(rooms_host=host).check_status_server(b"")
    SGLangSettings(rooms_host=host).check_status_server(b"a token of sixteen bytes")
    SGLangSettings(rooms_host=host, rooms_port=None).check_status_server(b"")
    SGLangSettings(host=host).check_status_server(b"")


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::", ""])
def test_a_server_may_listen_at_every_interface(wildcard: str) -> None:
    assert SGLangSettings(advertise_host="prefill-0").listen_host(wildcard) == wildcard
    assert SGLangSettings(host="10.0.0.1").listen_host(wildcard) == "10.0.0.1"
    assert SGLangSettings().listen_host("10.0.0.2") == "10.0.0.2"


@pytest.mark.parametrize(
    ("host", "listens"),
    [("[::1]", "::1"), ("FD00::1", "fd00::1"), ("[fe80::1%25eth0]", "fe80::1%eth0"), ("[::]", "::")],
)
def test_a_host_is_read_in_every_form(host: str, listens: str) -> None:
    for settings, serving in (
        (SGLangSettings(advertise_host="x"), host),
        (SGLangSettings(host=host, advertise_host="x"), "1.1.1.1"),
    ):
        assert settings.listen_host(serving) == listens


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (SGLangSettings(host="[::1]:8998"), "host '[::1]:8998' is not a host alone"),
        (SGLangSettings(host="fe80::1"), "a link-local address without its interface"),
        (SGLangSettings(advertise_host="http://prefill-0"), "host 'http://prefill-0' is not a host alone"),
        (
            SGLangSettings(advertise_host="::"),
            "KVROOM_ADVERTISE_HOST '::' means every interface, which cannot be dialled",
        ),
    ],
)
def test_a_host_that_peers_cannot_dial_is_refused(settings: SGLangSettings, says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        settings.listen_host("127.0.0.1")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("serving", "address"),
    [
        ("0.0.0.0", "127.0.0.1:8998"),
        ("", "127.0.0.1:8998"),
        ("::", "[::1]:8998"),
        ("::1", "[::1]:8998"),
        ("[::1]", "[::1]:8998"),
        ("[::]", "[::1]:8998"),
        ("10.0.0.1", "10.0.0.1:8998"),
    ],
)
def test_a_server_finds_its_own_directory(serving: str, address: str) -> None:
    assert directory_address(serving, 8998) == address


# -- options of SGLang -------------------------------------------------------------------------------------------------

BOTH = ("prefill", "decode")
USED: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "tp_size": (2, "--tp-size 2 (", BOTH),
    "pp_size": (2, "--pp-size 2 (", BOTH),
    "dp_size": (4, "--dp-size 4 (", BOTH),
    "attn_cp_size": (2, "--attn-cp-size 2 (", BOTH),
    "dcp_size": (2, "--dcp-size 2 (", BOTH),
    "nnodes": (2, "--nnodes 2 (", BOTH),
    "speculative_algorithm": ("EAGLE", "--speculative-algorithm EAGLE (", BOTH),
    "enable_pd_role_switch": (True, "--enable-pd-role-switch (", BOTH),
    "enable_memory_saver": (True, "--enable-memory-saver (", BOTH),
    "enable_hisparse": (True, "--enable-hisparse (", BOTH),
    "enable_unified_memory": (True, "--enable-unified-memory (", BOTH),
    "enable_pdmux": (True, "--enable-pdmux (", BOTH),
    "disaggregation_enable_kv_checksum": (True, "--disaggregation-enable-kv-checksum (", BOTH),
    "enable_hierarchical_cache": (True, "--enable-hierarchical-cache (", ("decode",)),
    "disaggregation_decode_host_receive_threshold": (
        0.5, "--disaggregation-decode-host-receive-threshold 0.5 (", ("decode",),
    ),
    "disaggregation_decode_enable_offload_kvcache": (
        True, "--disaggregation-decode-enable-offload-kvcache (", ("decode",),
    ),
}  # fmt: skip


def options(**used: Any) -> Any:
    """Return the resolved options of a plain server, with some replaced."""
    plain = {refusal.option: getattr(server_args("prefill"), refusal.option) for refusal in support.REFUSALS}
    return SimpleNamespace(**(plain | used))


def test_the_table_has_every_refusal() -> None:
    assert list(USED) == [refusal.option for refusal in support.REFUSALS]


@pytest.mark.parametrize("mode", BOTH)
def test_a_plain_server_is_supported(mode: str) -> None:
    support.check(options(), mode)


@pytest.mark.parametrize("option", USED)
def test_an_option_is_refused_by_name_on_its_side_only(option: str) -> None:
    value, words, modes = USED[option]
    for mode in BOTH:
        if mode not in modes:
            support.check(options(**{option: value}), mode)
            continue
        with pytest.raises(ConfigurationError, match=re.escape(words)) as raised:
            support.check(options(**{option: value}), mode)
        assert "or choose another --disaggregation-transfer-backend" in str(raised.value)


def test_all_refusals_are_named_together() -> None:
    with pytest.raises(ConfigurationError, match=r"--tp-size 2 .*; --enable-pdmux "):
        support.check(options(tp_size=2, enable_pdmux=True), "decode")


def test_an_older_sglang_without_an_option_is_no_refusal() -> None:
    support.check(SimpleNamespace(tp_size=1), "decode")
