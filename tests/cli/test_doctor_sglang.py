"""`kvroom doctor` about SGLang: without SGLang, and with imitations of it that lack what the adapter needs."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from kvroom.adapters.sglang.plugin import TESTED
from kvroom.cli import engines
from kvroom.cli.doctor import Document, engine_lines, read_report
from kvroom.cli.engines import Engine
from kvroom.transports.selection.doctor import FORMAT, MachineReport
from serve.helpers import run

ABSENT = {
    "engine": "SGLang",
    "version": None,
    "tested": list(TESTED),
    "works": False,
    "missing": [],
    "double": "",
    "remedy": "",
}


@pytest.fixture
def sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install an empty SGLang for this process and those that it starts, and return its `__init__.py`."""
    info = tmp_path / "sglang-9.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 9.9.9\n")
    # The entry point of kvroom's metadata, written here because an editable installation may have older metadata.
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nkvroom = kvroom.adapters.sglang.plugin:register\n")
    package = tmp_path / "sglang"
    package.mkdir()
    init = package / "__init__.py"
    init.touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    return init


def test_an_sglang_that_is_not_installed_is_said_to_be_so() -> None:
    done = run("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"\n  SGLang    not installed; tested with {', '.join(TESTED)}\n")


def test_the_document_has_it_too_and_is_read_as_a_report() -> None:
    done = run("doctor", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["engines"][1] == ABSENT
    document = msgspec.json.decode(done.stdout, type=Document)
    report = read_report("here", done.stdout.encode())
    assert report == MachineReport(machine=document.machine, transports=document.transports, choices=document.choices)
    assert document.format == FORMAT


@pytest.mark.usefixtures("sglang")
def test_what_another_version_lacks_is_named() -> None:
    found = engines.sglang()
    assert (found.version, found.works) == ("9.9.9", False)
    assert "sglang.srt.server_args (No module named 'sglang.srt')" in found.missing
    assert "sglang.srt.disaggregation.utils (No module named 'sglang.srt')" in found.missing
    lines = engine_lines((found,))
    assert f"  SGLang    no      9.9.9 is installed; not tested; tested with {', '.join(TESTED)}" in lines
    assert f"{'':<20}missing: sglang.srt.server_args (No module named 'sglang.srt')" in lines


def test_an_import_that_ends_its_process_leaves_the_doctor_well(sglang: Path) -> None:
    sglang.write_text("import os, sys\nprint('CUDA is out of order', file=sys.stderr, flush=True)\nos._exit(3)\n")
    (missing,) = engines.sglang().missing
    assert missing == "an SGLang that can be imported: the import ended with status 3: CUDA is out of order"


def test_an_import_that_never_ends_is_ended(sglang: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sglang.write_text("import threading\nthreading.Event().wait()\n")
    monkeypatch.setattr(engines, "WITHIN_S", 0.2)
    (missing,) = engines.sglang().missing
    assert missing == "an answer: importing SGLang timed out after 0.2 s"


@pytest.mark.usefixtures("sglang")
def test_a_list_of_plug_ins_without_kvroom_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "one, other")
    assert engines.sglang().missing[0] == "kvroom in the variable SGLANG_PLUGINS, which is 'one, other'"
    monkeypatch.setenv("SGLANG_PLUGINS", "one, kvroom")
    assert "SGLANG_PLUGINS" not in engines.sglang().missing[0]


@pytest.mark.usefixtures("sglang")
def test_an_installation_that_sglang_would_not_find_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_GROUP", "another.group")
    assert engines.sglang().missing[0] == (
        "kvroom's entry point in the group another.group: install kvroom with pip into the environment of SGLang"
    )


def test_what_an_engine_says_sends_no_control_codes_to_the_terminal() -> None:
    wicked = Engine("SGLang", "\x1b[2J", ("1",), False, ("two\nlines",), "\x1b]0;title\x07")
    assert all(line.isprintable() for line in engine_lines((wicked,)))
