"""docs/layouts.md and its drawings: they are those of the plans, they can be read, and what they advise works."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from kvroom.plan import KVLayout, array_regions

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "layouts.md").read_text()
DRAWN = sorted((ROOT / "docs" / "layouts").glob("*.svg"))
COUNTS = {"L": 3, "C": 2, "P": 5, "T": 4, "H": 2, "D": 8}
AXES = {
    "layers": "L",
    "2": "C",
    "tokens": "T",
    "elements": "T",
    "heads": "H",
    **dict.fromkeys(("blocks", "pages", "slots"), "P"),
    **dict.fromkeys(("lanes", "latent", "state", "scales", "bytes"), "D"),
}
ROWS = re.findall(r"^\| ([^|]+?) \| `\[([^\]]+)\]` \| `([LCPTHD]+)` \|", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module("draw_layouts")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def test_the_drawings_and_figures_are_those_of_the_plans() -> None:
    drawn = subprocess.run([sys.executable, str(ROOT / "scripts" / "draw_layouts.py"), "--check"], check=False)
    assert drawn.returncode == 0, "docs/layouts.md is out of date: run python scripts/draw_layouts.py"


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: path.stem)
def test_a_drawing_is_xml_that_says_what_it_is_in_light_and_dark(path: Path) -> None:
    root = ElementTree.fromstring(path.read_text())
    space = {"svg": "http://www.w3.org/2000/svg"}
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.findtext("svg:title", namespaces=space)
    assert "blocks of" in (root.findtext("svg:desc", namespaces=space) or "")
    assert "prefers-color-scheme: dark" in (root.findtext("svg:style", namespaces=space) or "")
    assert f"layouts/{path.name})" in PAGE


def test_every_block_that_is_drawn_joins_cells_of_the_same_name_and_no_named_cell_is_left_out(
    drawing: ModuleType,
) -> None:
    for make in drawing.DRAWINGS.values():
        chart = make()
        written: list[tuple[int, int]] = []
        for move in chart.moves:
            read = named_cells(chart.sources[move.source], move.src, move.nbytes)
            into = named_cells(chart.sinks[move.sink], move.dst, move.nbytes)
            assert [what for _, what in read] == [what for _, what in into]
            written += [(move.sink, cell) for cell, _ in into]
        wanted = [(i, cell.address) for i, strip in enumerate(chart.sinks) for cell in strip.cells if cell.label]
        assert sorted(written) == sorted(wanted), f"{chart.title}: cells are written twice or not at all"


def named_cells(strip: Any, address: int, nbytes: int) -> list[tuple[int, tuple[str, tuple[str, ...]]]]:
    """Address, region and label of each labelled cell that these bytes touch."""
    return [
        (cell.address, (re.sub(r"( · )?p(age )?\d+$", "", cell.page), cell.label))
        for cell in strip.cells
        if cell.address < address + nbytes and address < cell.address + cell.nbytes and cell.label
    ]


@pytest.mark.parametrize(("cache", "shape", "axes"), ROWS, ids=[row[0] for row in ROWS])
def test_a_cache_of_the_table_is_declared_as_the_table_says(cache: str, shape: str, axes: str) -> None:
    names = [name.strip() for name in shape.split(",")]
    assert "".join(AXES[name] for name in names) == axes
    array = np.zeros([COUNTS[axis] for axis in axes], np.uint8)
    layers = range(COUNTS["L"]) if "L" in axes else (0,)
    components = ("k", "v") if "C" in axes else ("k",)
    span = COUNTS["T"] if "T" not in axes else 1
    regions = array_regions(
        array.ctypes.data, array.shape, array.strides, axes, itemsize=1, layers=layers, components=components, span=span
    )
    pool = KVLayout(regions, dtype="uint8")
    assert len(regions) == len(layers) * len(components)
    assert (pool.pages, pool.page_tokens) == (COUNTS["P"], COUNTS["T"])
    assert sum(memory.nbytes for memory in pool.memory()) == array.nbytes


def test_the_table_has_its_rows() -> None:
    assert len(ROWS) >= 11


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
def test_the_examples_run(code: str) -> None:
    names: dict[str, object] = {}
    exec(code, names)
    assert isinstance(names["layout"], KVLayout)
