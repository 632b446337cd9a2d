"""The command line as a whole: variables, suggestions, help, version, completion, and output that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest

import kvroom
from kvroom.cli.extras import CONTAINED, MODULES
from kvroom.cli.options import DecodeOptions, options_of
from kvroom.cli.parser import COMMANDS, parse, without_variables
from kvroom.cli.variables import variable_of
from serve.helpers import command, environment, run

ROUTED = ("router", "--prefill", "http://a:1", "8998", "--decode", "http://b:2")
FULL = Path("/dev/full")


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str, **environ: str) -> str:
    """Return the line with which a command line is refused."""
    with pytest.raises(SystemExit) as ended:
        parse(arguments, environ)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_kvroom_alone_shows_its_help() -> None:
    alone, asked = run(), run("--help")
    assert (alone.returncode, alone.stderr) == (0, "")
    assert alone.stdout == asked.stdout
    assert all(one.name in alone.stdout for one in COMMANDS)


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version").stdout == f"kvroom {kvroom.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("rom",), "unknown command 'rom': did you mean rooms?"),
        (("decod", "--port", "1"), "unknown command 'decod': did you mean decode?"),
        (("xyzzy",), "unknown command 'xyzzy': use one of prefill, decode,"),
        (("--verion",), "unknown option --verion: give a command first"),
        (("prefill", "--page-token", "4"), "unknown option --page-token: did you mean --page-tokens?"),
        (("prefill", "--pages-tokens=4"), "unknown option --pages-tokens: did you mean --page-tokens?"),
        (("decode", "--xyzzy"), "unknown option --xyzzy; see `kvroom decode --help`"),
        (("prefill", "--bootstrap-allow", "any"), "--bootstrap-allow is an option of `kvroom decode`, not of `kvroom"),
        (("doctor", "now"), "unexpected argument 'now'"),
        (("rooms", "--watc", "x:1"), "unknown option --watc: did you mean --watch?"),
        (("fence",), "required: HOST, URL"),
        (("router", "--decode", "http://b:2"), "--prefill is missing: give it, or set KVROOM_PREFILL"),
        (("completion", "fish"), "invalid choice: 'fish'"),
    ],
)
def test_a_mistyped_word_gets_a_suggestion(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in error_of(capsys, *arguments)


@pytest.mark.parametrize("level", ["warn", "warning", "WARN", "Warning"])
@pytest.mark.parametrize("arguments", [("prefill",), ("decode",), ("up",), ("demo",), ROUTED], ids=lambda one: one[0])
def test_warn_is_warning_everywhere(arguments: tuple[str, ...], level: str) -> None:
    assert parse([*arguments, "--log-level", level], {}).options.log_level == "warning"
    assert parse(arguments, {"KVROOM_LOG_LEVEL": level}).options.log_level == "warning"


@pytest.mark.parametrize(
    ("arguments", "name", "text", "value"),
    [
        (("prefill",), "page_tokens", "4", 4),
        (("prefill",), "checksum", "yes", True),
        (("prefill",), "prefix_cache", "0", False),
        (("decode",), "dtype", "bfloat16", "bfloat16"),
        (("decode",), "host", "::1", "::1"),
        (("decode",), "heartbeat_s", "0.5", 0.5),
        (("decode",), "bootstrap_allow", "10.0.0.0/8,*.svc any-host", ("10.0.0.0/8", "*.svc", "any-host")),
        (("up",), "transport_option", "a=1 'b={\"c\": \"d e\"}'", (("a", 1), ("b", {"c": "d e"}))),
        (ROUTED[:1] + ROUTED[4:], "prefill", "http://a:1 8998 http://c:3 9000",
         (("http://a:1", "8998"), ("http://c:3", "9000"))),
        (ROUTED[:4], "decode", "http://b:2 http://d:4", ("http://b:2", "http://d:4")),
        (("rooms", "x:1"), "every_s", "2", 2.0),
        (("doctor",), "between", "one.json two.json", ("one.json", "two.json")),
    ],
)  # fmt: skip
def test_a_variable_gives_an_option_its_value(arguments: tuple[str, ...], name: str, text: str, value: Any) -> None:
    assert getattr(parse(arguments, {f"KVROOM_{name.upper()}": text}).options, name) == value


@pytest.mark.parametrize(
    ("given", "variable", "text"),
    [
        (("decode", "--page-tokens", "8"), "KVROOM_PAGE_TOKENS", "4"),
        (("decode", "--no-prefix-cache"), "KVROOM_PREFIX_CACHE", "1"),
        (("decode", "--transport-option", "a=1"), "KVROOM_TRANSPORT_OPTION", "b=2"),
        (("decode", "--bootstrap-allow", "any"), "KVROOM_BOOTSTRAP_ALLOW", "10.0.0.0/8"),
        (ROUTED, "KVROOM_DECODE", "http://other:9"),
    ],
)
def test_an_option_replaces_its_variable(given: tuple[str, ...], variable: str, text: str) -> None:
    assert parse(given, {variable: text}) == parse(given, {})


def test_every_option_has_a_variable_that_no_other_meaning_has() -> None:
    """The library itself reads the two that are not read here, together with KVROOM_SECRET and KVROOM_API_KEY_FILE."""
    elsewhere = {
        option.name
        for one in COMMANDS
        for option in options_of(one.options)
        if not option.flag.is_positional and variable_of(option) is None
    }
    assert elsewhere == {"api_key", "secret_file", "parent_pid"}


@pytest.mark.parametrize("text", ["", "  ", "tcp://10.0.0.1:80", "udp://10.0.0.1:53"])
def test_what_compose_and_kubernetes_set_is_no_port(text: str) -> None:
    assert parse(["decode"], {"KVROOM_PORT": text}).options == DecodeOptions()


@pytest.mark.parametrize(
    ("arguments", "variable", "text", "words"),
    [
        (("decode",), "KVROOM_PAGES", "many", "variable KVROOM_PAGES: 'many' is not a whole number"),
        (("decode",), "KVROOM_PORT", "70000", "variable KVROOM_PORT: 70000 is not a port"),
        (("decode",), "KVROOM_CHECKSUM", "perhaps", "'perhaps' is neither true nor false: use 1 or 0"),
        (("decode",), "KVROOM_DTYPE", "int4", "variable KVROOM_DTYPE: invalid choice: 'int4' (choose from float32, b"),
        (("decode",), "KVROOM_TRANSPORT_OPTION", "a='1", "variable KVROOM_TRANSPORT_OPTION: No closing quotation"),
        (("decode",), "KVROOM_BOOTSTRAP_ALLOW", "10.0.0.1/8", "variable KVROOM_BOOTSTRAP_ALLOW: entry '10.0.0.1/8'"),
        (ROUTED[:1], "KVROOM_PREFILL", "http://a:1 2 http://b:2", "has 3 words: give 2 for each value"),
        (("doctor",), "KVROOM_BETWEEN", "a b c d", "has 4 words: give 2 for each value"),
    ],
)
def test_a_variable_with_an_invalid_value_is_named(
    arguments: tuple[str, ...], variable: str, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in error_of(capsys, *arguments, **{variable: text})


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_script_for_completion_names_commands_and_options(shell: str) -> None:
    shown = run("completion", shell)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert all(word in shown.stdout for word in ("doctor", "page-tokens", "float32"))


def test_bash_completes_a_command_an_option_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "the-secret").write_text("x")
    script = (
        run("completion", "bash").stdout
        + """
complete_line() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
  $function "$1" "${!#}"; echo "${COMPREPLY[@]}"; }
function=$(complete -p kvroom | sed 's/.*-F \\([^ ]*\\).*/\\1/')
complete_line kvroom dem
complete_line kvroom prefill --page-t
complete_line kvroom prefill --secret-file the
"""
    )
    shown = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert shown.stdout.split("\n")[:3] == ["demo", "--page-tokens", "the-secret"]


@pytest.mark.parametrize("arguments", [("doctor",), ("doctor", "--json"), ("completion", "bash")], ids=" ".join)
def test_a_reader_that_ends_first_gets_no_traceback(arguments: tuple[str, ...]) -> None:
    line = f"{sys.executable} -m kvroom {' '.join(arguments)} | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", line], env=environment(), capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.parametrize("arguments", [("doctor",), ("completion", "bash")], ids=" ".join)
def test_a_full_disk_is_one_line(arguments: tuple[str, ...]) -> None:
    with FULL.open("w") as disk:
        ended = subprocess.run(
            command(*arguments), env=environment(), stdout=disk, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (ended.returncode, ended.stderr) == (
        5, f"kvroom {arguments[0]}: error: the output cannot be written: No space left on device\n",
    )  # fmt: skip


def test_a_closed_output_is_no_error() -> None:
    line = f"{sys.executable} -m kvroom doctor >&-"
    ended = subprocess.run(["bash", "-c", line], env=environment(), capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


WITHOUT = """
import importlib.util, sys
hidden, found = set(sys.argv[1].split(",")), importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.split(".")[0] in hidden else found(name, *more)
from kvroom.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("hidden", "arguments", "words"),
    [
        ("rich", ("rooms", "x:1"), "`kvroom rooms` needs rich, which kvroom's extra 'cli' brings: install it as in "
         "`pip install '.[cli]'` in a clone, or run `pip install rich`"),
        ("shtab", ("completion", "bash"), "`kvroom completion` needs shtab"),
        ("torch", ("prefill",), "`kvroom prefill` needs torch, which kvroom's extra 'serve'"),
        ("torch,transformers,prometheus_client", ("decode",), "needs torch, transformers and prometheus-client, which"),
        ("smg", ROUTED, "`kvroom router` needs smg"),
        ("smg,rich", ("up",), "`kvroom up` needs smg, which kvroom's extra 'serve'"),
        ("rich", ("demo",), "`kvroom demo` needs rich, which kvroom's extra 'demo'"),
    ],
    ids=lambda one: one if isinstance(one, str) else one[0],
)  # fmt: skip
def test_a_command_without_its_packages_names_the_extra(hidden: str, arguments: tuple[str, ...], words: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT, hidden, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert words in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_the_extras_are_those_of_the_package() -> None:
    """Compare them with pyproject.toml, by the metadata of the package as it is installed."""
    stated: dict[str, set[str]] = {}
    for line in requires("kvroom") or ():
        requirement, _, marker = line.partition(";")
        if "extra ==" in marker:
            extra = marker.split("extra ==")[1].strip().strip("'\"")
            stated.setdefault(extra, set()).add(requirement.split(">=")[0].split("<")[0].strip())
    for extra, packages in MODULES.items():
        assert stated[extra] == set(packages.values())
    parts = {package for extra in CONTAINED["serve"] for package in MODULES[extra].values()}
    assert stated["serve"] == parts  # the metadata has the packages of an extra that another one includes
    assert stated["demo"] == parts | {"accelerate", "gguf"}


def test_a_worker_of_up_reads_no_variable_of_an_option() -> None:
    variables = {variable_of(option): "1" for one in COMMANDS for option in options_of(one.options)}
    environ = {name: value for name, value in variables.items() if name} | {"KVROOM_SECRET": "s", "PATH": os.defpath}
    assert without_variables(environ) == {"KVROOM_SECRET": "s", "PATH": os.defpath}
