"""Every command that the documentation names can be given: commands and options of kvroom, targets of make, scripts."""

from __future__ import annotations

import importlib.util
import io
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from kvroom.cli.parser import COMMANDS, SOAK, parse
from kvroom.conformance import suite
from kvroom_lab.soak import command as soak

from .pages import ALL, CURRENT, ROOT, lines_of_code, name_of, spans

KINDS = {command.name: command for command in COMMANDS}
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):.*?## ", MAKEFILE, re.MULTILINE))
VALUES = {"URL": "http://127.0.0.1:8000", "HOST": "10.0.0.1", "N": "7", "KEY=VALUE": "a=b", "...": ""}
"""Words that stand for a value in a command, each with a value that can be given."""


def flags_in(text: str) -> frozenset[str]:
    """Return the options in these words."""
    return frozenset(re.findall(r"--[a-z][a-z-]*", text))


def helped(main: Callable[[list[str]], object], *command: str) -> frozenset[str]:
    """Return the options that `--help` of this command lists."""
    with redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    return flags_in(printed.getvalue())


@pytest.fixture(scope="module")
def known() -> dict[str, frozenset[str]]:
    """The options of each command."""
    found = {"python -m kvroom.conformance": helped(suite.main), "kvroom soak": helped(soak.main)}
    found |= {f"kvroom {one.name}": helped(parse, one.name) for one in COMMANDS if one is not SOAK}
    return found


def unusable(line: str) -> str:
    """Return why this line of code is no command line of kvroom, or "" where it is one, or another program's."""
    words = shlex.split(line.removeprefix("$ "), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    if words[:1] != ["kvroom"] or len(words) < 2:
        return ""
    if words[1] not in KINDS:
        return f"there is no command {words[1]!r}"
    given = [value for word in words[1:] if (value := VALUES.get(word, word)) and value not in ("&", "|")]
    try:
        command, _ = parse(given)
        if command is SOAK:  # this command passes its arguments on to the laboratory
            soak._parser().parse_args(given[1:])
    except SystemExit as end:
        return "" if end.code == 0 else f"the parser refuses {line!r}"
    return "" if command.name == given[0] else f"{line!r} is taken for {command.name}"


def unknown(text: str, known: dict[str, frozenset[str]]) -> Iterator[str]:
    """Yield the commands and options of kvroom in these words that do not exist."""
    for command, rest in re.findall(r"\b(kvroom [a-z][a-z-]*|python -m kvroom\.conformance)\b([^|&;#]*)", text):
        if command not in known:
            yield command
        else:
            yield from (f"{command} {flag}" for flag in flags_in(rest) if flag not in known[command] | {"--help"})


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_commands_in_blocks_are_accepted_by_the_parsers(
    page: Path, known: dict[str, frozenset[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = list(lines_of_code(page.read_text()))
    assert [reason for line in lines if (reason := reason_of(line))] == []
    assert [
        found for line in lines if re.match(r"(\$ )?(kvroom|python) ", line) for found in unknown(line, known)
    ] == []


def test_these_pages_have_commands_to_check() -> None:
    pages = ("README.md", "docs/operating.md", "docs/soak.md", "docs/sglang.md", "docs/vllm.md")
    assert [
        page
        for page in pages
        if not any(re.match(r"(\$ )?kvroom ", line) for line in lines_of_code((ROOT / page).read_text()))
    ] == []


def reason_of(line: str) -> str:
    """Return why a line of code is wrong. A line of another language need not be one that a shell can split."""
    return unusable(line) if re.match(r"(\$ )?([A-Z_]+=\S* )*kvroom ", line) else ""


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_commands_in_the_text_have_these_options(page: Path, known: dict[str, frozenset[str]]) -> None:
    assert [found for span in spans(page.read_text()) for found in unknown(span, known)] == []


def made(text: str) -> Iterator[tuple[str, str]]:
    """Yield each `make TARGET` of these words with the rest of its line."""
    yield from re.findall(r"(?:^|\s|`)make ([a-z][a-z-]*)([^`#]*)", text)


def wrong_targets(text: str) -> list[str]:
    """Return what is given to make and is no target, or sets a variable that the Makefile does not read."""
    found = []
    for target, rest in made(text):
        found += [] if target in TARGETS else [f"make {target}"]
        given = [name for name in re.findall(r"\b([A-Z_]+)=", rest) if not name.startswith("PIP_")]  # pip reads those
        found += [name for name in given if f"$({name})" not in MAKEFILE]
    return found


def code(page: Path) -> list[str]:
    """Return all code of a page, in blocks and in the text."""
    return [*lines_of_code(page.read_text()), *spans(page.read_text())]


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_targets_of_make_are_there(page: Path) -> None:
    assert [wrong for text in code(page) if text.startswith("make ") for wrong in wrong_targets(text)] == []


def missing_scripts(text: str) -> list[str]:
    """Return the scripts and modules of this repository that a command runs and that are not there."""
    scripts = re.findall(r"\bpython3? ((?:scripts|bench|examples)/\S+\.py)", text)
    modules = re.findall(r"\bpython3? -m (kvroom[\w.]*)", text)
    found = [script for script in scripts if not (ROOT / script).is_file()]
    return found + [module for module in modules if importlib.util.find_spec(module) is None]


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_scripts_and_modules_that_are_run_are_there(page: Path) -> None:
    assert [missing for text in code(page) for missing in missing_scripts(text)] == []


@pytest.mark.parametrize(
    "line",
    [
        "kvroom prefil --port 8000",
        "kvroom prefill --prot 8000  # a comment",
        "$ kvroom router --decode http://10.0.0.2:8000",
        "KVROOM_SECRET=x kvroom up --prefill none",
        "kvroom soak --none 3",
    ],
)
def test_a_false_command_line_is_found(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert reason_of(line)


@pytest.mark.parametrize("span", ["kvroom hospital", "kvroom rooms --watched", "python -m kvroom.conformance X --all"])
def test_a_false_option_is_found(span: str, known: dict[str, frozenset[str]]) -> None:
    assert list(unknown(span, known))


def test_a_false_target_and_a_false_script_are_found() -> None:
    assert wrong_targets("make tests") == ["make tests"]
    assert wrong_targets("make test COLOUR=1") == ["COLOUR"]
    assert missing_scripts("python scripts/none.py") == ["scripts/none.py"]
    assert missing_scripts("python -m kvroom_lab.none") == ["kvroom_lab.none"]
