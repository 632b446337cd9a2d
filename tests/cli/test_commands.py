"""Commands with wrong arguments or settings end with status 2 and one line that names the value and the remedy."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvroom.cli.cluster import hint
from kvroom.cli.options import WorkerOptions, child_arguments
from kvroom.cli.parser import parse
from kvroom.cli.router import check_passed_on, without_proxies
from kvroom.errors import ConfigurationError
from kvroom.transports.selection.options import in_words
from serve.helpers import command, environment, run


def error_of(*arguments: str, **changes: str) -> str:
    """Run a command that has to end with status 2, and return its only error line."""
    ended = run(*arguments, **changes)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("kvroom") and ": error: " in line]
    assert ended.returncode == 2, ended.stderr
    assert len(errors) == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "never retrieved" not in ended.stderr
    assert ended.stdout == ""
    return errors[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prefill", "--port", "70000"), "70000 is not a port"),
        (("prefill", "--pages", "0"), "0 is too small"),
        (("decode", "--dtype", "int4"), "'int4'"),
        (("decode", "--bootstrap-s", "never"), "'never' is not a number of seconds"),
        (("decode", "--transport", "pigeon"), "unknown transport 'pigeon': choose one of ascend, auto,"),
        (("decode", "--transport", "no_such_package:Make"), "the module no_such_package cannot be imported"),
        (("decode", "--transport-option", "protocol"), "'protocol' is not KEY=VALUE"),
        (("decode", "--host", "0.0.0.0"), "KVROOM_SECRET"),
        (("decode", "--host", "::", "--advertise-host", "[::]"), "every interface, which cannot be dialled"),
        (("prefill", "--host", "[::1]:8000"), "argument --host: host '[::1]:8000' is not a host alone: give the port"),
        (("prefill", "--host", "fe80::1"), "a link-local address without its interface"),
        (("decode", "--advertise-host", "http://worker-3"), "argument --advertise-host: host 'http://worker-3' is"),
        (("router", "--host", "a b", "--prefill", "x:1", "2", "--decode", "x:3"), "host 'a b' is not a host"),
        (("router", "--prefill", "::1:8000", "2", "--decode", "x:3"), "'::1:8000' has an IPv6 address that needs br"),
        (
            ("router", "--prefill", "x:1", "2", "--decode", "[fe80::1%25eth0]:3"),
            "is a link-local address, which the router smg does not support",
        ),
        (
            ("router", "--prefill", "x:1", "2", "--decode", "grpc://x:3"),
            "argument --decode: 'grpc://x:3' does not begin with http:// or https://",
        ),
        (("decode", "--host", "0.0.0.0", "--advertise-host", "10.0.0.7"), "KVROOM_SECRET"),
        (("decode", "--admin-host", "0.0.0.0"), "needs a token: set KVROOM_ADMIN_TOKEN_FILE or KVROOM_ADMIN_TOKEN"),
        (("prefill", "--admin-host", "worker-3"), "admin address worker-3 is not loopback and needs a token"),
        (("decode", "--admin-port", "70000"), "argument --admin-port: 70000 is not a port"),
        (("decode", "--secret-file", "/nowhere/secret"), "/nowhere/secret"),
        (("decode", "--bootstrap-allow", "10.0.0.1/8"), "argument --bootstrap-allow: entry '10.0.0.1/8' of the bootst"),
        (("decode", "--bootstrap-allow", "any", "--bootstrap-allow", "*.pd.svc,127.1"), "entry '127.1' of the bootstr"),
        (("prefill", "--bootstrap-allow", "any"), "--bootstrap-allow"),
        (("router", "--prefill", "http://127.0.0.1:1", "none", "--decode", "http://127.0.0.1:2"), "'none'"),
        (("nonsense",), "nonsense"),
    ],
)
def test_a_wrong_setting_is_named(arguments: tuple[str, ...], words: str) -> None:
    assert words in error_of(*arguments)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "worker-3"])
def test_a_decode_worker_beyond_loopback_needs_a_list(host: str) -> None:
    words = "list those that they may name, for example --bootstrap-allow '10.0.0.0/8,*.pd.svc'"
    reached = ("--advertise-host", "10.0.0.7")
    said = error_of("decode", "--host", host, *reached, KVROOM_SECRET="a secret that is long enough")
    assert f"address {host} is not loopback" in said
    assert words in said


def test_the_list_is_one_whatever_way_it_is_written() -> None:
    one = parse(["decode", "--bootstrap-allow", "10.0.0.0/8, *.pd.svc"]).options
    two = parse(["decode", "--bootstrap-allow", "10.0.0.0/8", "--bootstrap-allow", "*.pd.svc"]).options
    assert one.bootstrap_allow == two.bootstrap_allow == ("10.0.0.0/8", "*.pd.svc")
    assert parse(["decode"]).options.bootstrap_allow is None


def test_the_transports_options_reach_the_workers_that_up_starts() -> None:
    given = ["--transport", "nixl", "--transport-option", "backend=UCX", "--transport-option", 'parameters={"a": "1"}']
    options = parse(["up", *given]).options
    child = parse(["decode", *child_arguments(options)]).options
    assert (child.transport, child.trusted_fabric) == ("nixl", False)
    trusting = parse(["up", *given, "--trusted-fabric"]).options
    assert parse(["decode", *child_arguments(trusting)]).options.trusted_fabric
    assert child.transport_option == (("backend", "UCX"), ("parameters", {"a": "1"}))


@pytest.mark.parametrize(("given", "kept"), [((), True), (("--no-prefix-cache",), False), (("--prefix-cache",), True)])
def test_the_prefix_cache_is_on_unless_switched_off_for_all_workers(given: tuple[str, ...], kept: bool) -> None:
    options = parse(["up", *given]).options
    child = parse(["prefill", *child_arguments(options)]).options
    assert options.prefix_cache is child.prefix_cache is kept


EVERY_OPTION = (
    *("--model", "m", "--served-model-name", "n", "--dtype", "bfloat16", "--device", "cuda:1", "--page-tokens", "4"),
    *("--pages", "5", "--chunk-tokens", "6", "--max-running", "7", "--max-waiting", "8", "--transport", "tcp"),
    *("--transport-option", 'a={"b": [1, null]}', "--transport-option", "c=d e", "--transport-option", 'e="1"'),
    *("--trusted-fabric", "--checksum", "--no-prefix-cache", "--secret-file", "s", "--bootstrap-s", "1e-3"),
    *("--waiting-s", "2.5", "--stall-s", "0.1", "--drain-s", "4", "--heartbeat-s", "0.3"),
    *("--log-level", "debug", "--log-format", "json"),
)
"""Every option of a worker, each with another value than its default."""


@pytest.mark.parametrize("name", ["up", "demo"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_child_is_told_every_option_of_a_worker(name: str, role: str) -> None:
    given, usual = parse([name, *EVERY_OPTION]).options, parse([name]).options
    child = parse([role, *child_arguments(given)]).options
    for option in WorkerOptions.__struct_fields__:
        assert getattr(given, option) != getattr(usual, option), f"{option} has its default: give it another value"
        assert getattr(child, option) == getattr(given, option), option


def test_what_up_is_told_for_itself_reaches_no_child() -> None:
    given = ("--prefill", "2", "--decode", "3", "--port", "4000", "--verbose", "--api-key", "a-key-of-clients")
    assert child_arguments(parse(["up", *given]).options) == []


def test_the_router_gets_the_environment_without_proxies() -> None:
    kept = {"PATH": "/bin", "no_proxy": "x", "MY_HTTP_PROXY": "y"}
    environ = {**kept, "http_proxy": "a", "HTTPS_PROXY": "b", "All_Proxy": "c"}
    assert without_proxies(environ) == kept


@pytest.mark.parametrize("environ", [{}, {"no_proxy": "x"}, {"HTTP_PROXY": "http://10.0.0.1:3128"}])
def test_what_up_says_to_try_works_behind_a_proxy(environ: dict[str, str]) -> None:
    asked = hint("http://127.0.0.1:30000", "tiny", environ).splitlines()[0]
    assert ("--noproxy '*'" in asked) == ("HTTP_PROXY" in environ)


def test_a_short_secret_is_refused_and_not_shown() -> None:
    error = error_of("decode", KVROOM_SECRET="tooshort")
    assert "too short" in error
    assert "tooshort" not in error


def test_a_short_admin_token_is_refused_and_not_shown() -> None:
    error = error_of("decode", KVROOM_ADMIN_TOKEN="tooshort")
    assert "KVROOM_ADMIN_TOKEN holds a token of 8 bytes, too short" in error
    assert "tooshort" not in error


def test_an_identity_of_the_machine_that_is_none_is_refused_before_anything_is_loaded() -> None:
    error = error_of("decode", KVROOM_MACHINE_ID="$(NODE_UID)")
    assert error.startswith(
        "kvroom decode: error: KVROOM_MACHINE_ID is '$(NODE_UID)', a template that was not filled in: set"
    )


@pytest.mark.parametrize("option", ["--port", "--admin-port", "--bootstrap-port", "--link-port"])
def test_a_port_in_use_is_named_before_anything_is_loaded(option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"{option}: port {port} on 127.0.0.1 is in use" in error_of("prefill", option, str(port))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prefill", "--port", "9000", "--link-port", "9000"), "--port and --link-port are both 9000"),
        (("prefill", "--bootstrap-port", "9000", "--link-port", "9000"), "--link-port and --bootstrap-port are both"),
        (("decode", "--admin-port", "9000", "--link-port", "9000"), "--link-port and --admin-port are both 9000"),
        (
            ("decode", "--link-port", "9000", "--transport-option", "port=9000"),
            "--link-port and --transport-option port are both 9000: give each a port of its own",
        ),
    ],
)
def test_one_port_for_two_purposes_is_refused(arguments: tuple[str, ...], words: str) -> None:
    assert words in error_of(*arguments)


@pytest.mark.parametrize("name", ["up", "router"])
def test_the_routers_port_in_use_is_named(name: str, tmp_path: Path) -> None:
    workers = ("--prefill", "http://127.0.0.1:1", "2", "--decode", "http://127.0.0.1:3") if name == "router" else ()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1 is in use" in error_of(
            name, "--port", str(port), *workers, TMPDIR=str(tmp_path)
        )
    assert list(tmp_path.iterdir()) == []  # a folder for logs that were never written


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    assert missing in error_of("prefill", "--model", missing)


def test_a_worker_that_cannot_start_ends_the_whole_with_its_message(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    error = error_of("up", "--port", "0", "--model", missing)
    assert missing in error
    assert "prefill-0" in error or "decode-0" in error


def test_help_needs_no_torch() -> None:
    script = "import sys; from kvroom.cli.parser import parse; parse(['decode']); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout == "False\n"


@pytest.mark.parametrize("name", ["prefill", "decode", "up", "demo"])
def test_help_lists_the_options_of_every_transport(name: str) -> None:
    shown = subprocess.run(command(name, "--help"), env=environment(), capture_output=True, text=True, check=True)
    assert in_words() in " ".join(shown.stdout.split())


@pytest.mark.parametrize("name", ["prefill", "decode", "router", "up", "demo", "doctor", "soak"])
def test_every_command_has_help(name: str) -> None:
    shown = subprocess.run(command(name, "--help"), env=environment(), capture_output=True, text=True, check=True)
    assert f"kvroom {name}" in shown.stdout


ROUTER = ("router", "--prefill", "http://127.0.0.1:1", "2", "--decode", "http://127.0.0.1:3")


@pytest.mark.parametrize(
    ("given", "own"),
    [
        (("--port", "1"), "--port"), (("--log-json", "--port=1"), "--port"), (("--po", "1"), "--port"),
        (("--host", "::"), "--host"), (("--policy", "random"), "--policy"), (("--prefill", "http://x"), "--prefill"),
        (("--decode", "http://x"), "--decode"), (("--log-level", "debug"), "--log-level"),
        (("--api-key", "k"), "--api-key"),
    ],
)  # fmt: skip
def test_an_argument_of_smg_for_which_the_router_has_an_option_is_refused(given: tuple[str, ...], own: str) -> None:
    with pytest.raises(ConfigurationError, match=f"kvroom router sets smg's {own} itself; give its own option {own}"):
        check_passed_on(given)


def test_other_arguments_reach_smg_unchanged() -> None:
    given = ("--log-json", "--prefill-policy", "cache_aware", "--decode-policy=random", "--", "-h", "word")
    check_passed_on(given)
    options = parse([*ROUTER, "--policy", "power_of_two", "--", *given]).options
    assert (options.smg, options.policy) == (given, "power_of_two")
    assert parse(ROUTER).options.smg == ()
    assert parse([*ROUTER, "--"]).options.smg == ()


def test_a_conflict_is_reported_by_the_command() -> None:
    assert "-- --port: kvroom router sets smg's --port itself" in error_of(*ROUTER, "--", "--port", "1")


@pytest.mark.parametrize("name", ["up", "doctor"])
def test_other_commands_pass_nothing_on(name: str) -> None:
    assert "--log-json" in error_of(name, "--", "--log-json")
