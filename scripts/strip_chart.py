"""Draw the memory of some ranks as two rows of strips, and the blocks between them as ribbons: one SVG, no library.

The law: a drawing shows only the data. A cell has the address and size of its layout, a ribbon goes from the bytes that
a block reads to the bytes that it writes, and a cell is coloured only if a block covers it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

MARGIN, RANK_GAP, PAGE_GAP = 20.0, 26.0, 5.0
CELL_HEIGHT, RIBBON_HEIGHT = 34.0, 96.0
COLOURS = ("#3b82f6", "#e07b20", "#2f9e58", "#a05bd6")
STYLE = """
text { font: 11px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328; text-anchor: middle }
.title { font-size: 15px; font-weight: 600; text-anchor: start }
.rank { font-size: 12.5px; font-weight: 600; text-anchor: start }
.note { font-size: 12.5px; text-anchor: start }
.page { font-size: 10px; fill: #59636e } .tight { font-size: 10px; letter-spacing: -0.4px }
.card { fill: #ffffff; stroke: #d1d9e0 } .cell { fill: none; stroke: #b7c0c9 } .tie { stroke: #8b949e; fill: none }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .page { fill: #9da7b1 }
.card { fill: #0d1117; stroke: #30363d } .cell { stroke: #484f58 } .tie { stroke: #6e7681 }
}
"""


class Cell(NamedTuple):
    """A labelled piece of memory; `page` names the page that it is part of, above or below a run of cells."""

    address: int
    nbytes: int
    label: tuple[str, ...]
    page: str


class Strip(NamedTuple):
    """The drawn part of one rank: cells in the order of their addresses."""

    title: str
    cells: Sequence[Cell]


class Move(NamedTuple):
    """One block from a strip of the upper row to a strip of the lower one."""

    source: int
    sink: int
    src: int
    dst: int
    nbytes: int


class Chart(NamedTuple):
    """A drawing. `reports`: (source, sink) pairs that exchange messages but no bytes."""

    title: str
    note: str
    sources: Sequence[Strip]
    sinks: Sequence[Strip]
    moves: Sequence[Move]
    reports: Sequence[tuple[int, int]] = ()
    width: float = 900.0


class _Box(NamedTuple):
    cell: Cell
    x: float
    width: float


class _Row:
    """The places of the cells of one row of strips, centred in the width; `scale` is the pixels of a byte."""

    def __init__(self, strips: Sequence[Strip], scale: float, width: float) -> None:
        self.strips: list[list[list[_Box]]] = []
        x = (width - _gaps(strips) - scale * _nbytes(strips)) / 2
        for strip in strips:
            placed = []
            for page in _pages(strip):
                boxes = []
                for cell in page:
                    boxes.append(_Box(cell, x, cell.nbytes * scale))
                    x += cell.nbytes * scale
                placed.append(boxes)
                x += PAGE_GAP
            self.strips.append(placed)
            x += RANK_GAP - PAGE_GAP

    def boxes(self, strip: int) -> list[_Box]:
        return [box for page in self.strips[strip] for box in page]

    def span(self, strip: int, address: int, nbytes: int) -> tuple[float, float]:
        """Return the two x coordinates at which these bytes begin and end."""
        touched = [
            box
            for box in self.boxes(strip)
            if box.cell.address < address + nbytes and address < box.cell.address + box.cell.nbytes
        ]
        first, last = touched[0], touched[-1]
        begin = first.x + first.width * (address - first.cell.address) / first.cell.nbytes
        end = last.x + last.width * (address + nbytes - last.cell.address) / last.cell.nbytes
        return begin, end


def _pages(strip: Strip) -> list[list[Cell]]:
    """Return runs of cells that follow each other and name the same page."""
    runs: list[list[Cell]] = []
    for cell in strip.cells:
        if runs and runs[-1][0].page == cell.page:
            runs[-1].append(cell)
        else:
            runs.append([cell])
    return runs


def _gaps(strips: Sequence[Strip]) -> float:
    return sum(len(_pages(strip)) - 1 for strip in strips) * PAGE_GAP + (len(strips) - 1) * RANK_GAP


def _nbytes(strips: Sequence[Strip]) -> int:
    return sum(cell.nbytes for strip in strips for cell in strip.cells)


def draw(chart: Chart) -> str:
    """Return the whole SVG, the same text for the same chart. A byte has the same width in both rows."""
    rows = chart.sources, chart.sinks
    scale = min((chart.width - 2 * MARGIN - _gaps(strips)) / _nbytes(strips) for strips in rows)
    upper, lower = (_Row(strips, scale, chart.width) for strips in rows)
    top = 92.0
    bottom = top + CELL_HEIGHT + RIBBON_HEIGHT
    height = bottom + CELL_HEIGHT + 74.0
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {chart.width:.0f} {height:.0f}" '
        f'width="{chart.width:.0f}" height="{height:.0f}" role="img" aria-label="{escape(chart.title)}">',
        f"<title>{escape(chart.title)}</title>",
        f"<desc>{escape(chart.note)}</desc>",
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{chart.width - 1:.0f}" height="{height - 1:.0f}" rx="8"/>',
        _text(MARGIN, 28, chart.title, "title"),
        *_ribbons(chart, upper, lower, top + CELL_HEIGHT, bottom),
        *_reports(chart, upper, lower, top + CELL_HEIGHT, bottom),
        *_strips(chart.sources, upper, top, page_y=top - 8, title_y=top - 28),
        *_strips(chart.sinks, lower, bottom, page_y=bottom + CELL_HEIGHT + 16, title_y=bottom + CELL_HEIGHT + 36),
        *_outlines(chart, upper, lower, top, bottom),
        *_labels(upper, top),
        *_labels(lower, bottom),
        _text(MARGIN, height - 14, chart.note, "note"),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _strips(strips: Sequence[Strip], row: _Row, y: float, *, page_y: float, title_y: float) -> Iterator[str]:
    for strip, pages in zip(strips, row.strips, strict=True):
        yield _text(pages[0][0].x, title_y, strip.title, "rank")
        for boxes in pages:
            middle = (boxes[0].x + boxes[-1].x + boxes[-1].width) / 2
            yield _text(middle, page_y, boxes[0].cell.page, "page")
            for box in boxes:
                yield _rect(box.x, y, box.width, 'class="cell"')


def _labels(row: _Row, y: float) -> Iterator[str]:
    for box in (box for strip in range(len(row.strips)) for box in row.boxes(strip)):
        lines = box.cell.label
        first = y + CELL_HEIGHT / 2 + 4 - 6.5 * (len(lines) - 1)
        for i, line in enumerate(lines):
            yield _text(box.x + box.width / 2, first + 13 * i, line, "" if box.width > 8 * len(line) else "tight")


def _ribbons(chart: Chart, upper: _Row, lower: _Row, top: float, bottom: float) -> Iterator[str]:
    bend = (bottom - top) * 0.5
    for move in chart.moves:
        a, b = upper.span(move.source, move.src, move.nbytes)
        c, d = lower.span(move.sink, move.dst, move.nbytes)
        colour = COLOURS[move.source % len(COLOURS)]
        yield (
            f'<path d="M{a:.1f} {top:.1f}C{a:.1f} {top + bend:.1f} {c:.1f} {bottom - bend:.1f} {c:.1f} {bottom:.1f}'
            f"H{d:.1f}C{d:.1f} {bottom - bend:.1f} {b:.1f} {top + bend:.1f} {b:.1f} {top:.1f}Z"
            f'" fill="{colour}" fill-opacity="0.3"/>'
        )


def _outlines(chart: Chart, upper: _Row, lower: _Row, top: float, bottom: float) -> Iterator[str]:
    """Yield the bytes of each block, tinted and framed, on both sides."""
    for move in chart.moves:
        colour = COLOURS[move.source % len(COLOURS)]
        look = f'fill="{colour}" fill-opacity="0.28" stroke="{colour}" stroke-width="1.6" rx="3"'
        for (a, b), y in (
            (upper.span(move.source, move.src, move.nbytes), top),
            (lower.span(move.sink, move.dst, move.nbytes), bottom),
        ):
            yield _rect(a + 1, y, b - a - 2, look)


def _reports(chart: Chart, upper: _Row, lower: _Row, top: float, bottom: float) -> Iterator[str]:
    for source, sink in chart.reports:
        above, below = upper.boxes(source), lower.boxes(sink)
        a = (above[0].x + above[-1].x + above[-1].width) / 2
        b = below[-1].x + below[-1].width - 12 * (len(chart.sources) - source)
        yield (
            f'<path class="tie" stroke-dasharray="4 4" d="M{a:.1f} {top + 22:.1f}'
            f'C{a:.1f} {bottom - 20:.1f} {b:.1f} {top + 40:.1f} {b:.1f} {bottom:.1f}"/>'
        )
        yield _text(a, top + 16, "only reports", "page")


def _rect(x: float, y: float, width: float, look: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{CELL_HEIGHT:.1f}" {look}/>'


def _text(x: float, y: float, words: str, kind: str) -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{named}>{escape(words)}</text>'
