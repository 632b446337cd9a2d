"""docs/engine.md shows the program that the tests run, and names options and names that it has."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from .engine_helpers import PROGRAM

PAGE = (PROGRAM.parents[2] / "docs" / "engine.md").read_text()
TEXT = PROGRAM.read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^python two_to_one\.py (.*)$", PAGE, re.MULTILINE)


def test_the_first_block_is_the_whole_program() -> None:
    assert BLOCKS[0] == TEXT, f"copy {PROGRAM.name} into the first python block of docs/engine.md"


@pytest.mark.parametrize("block", BLOCKS[1:], ids=lambda block: block.strip().splitlines()[0][:40])
def test_a_block_of_a_section_is_in_the_program(block: str) -> None:
    assert textwrap.dedent(block) != block, "a block of a section is indented as it is in the program"
    assert block in TEXT


def test_each_part_of_the_program_that_needs_a_reason_is_shown() -> None:
    assert len(BLOCKS) > 10


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_options_that_the_program_knows(command: str) -> None:
    for option in re.findall(r"--[a-z-]+", command):
        assert f'parser.add_argument("{option}"' in TEXT


def test_the_page_names_three_commands() -> None:
    assert [command.split()[0] for command in COMMANDS] == ["prefill", "prefill", "decode"]


def test_the_page_names_files_that_are_there() -> None:
    for named in re.findall(r"`(tests/[\w/.]+)`", PAGE):
        assert (Path(PROGRAM.parents[2]) / named).exists()
