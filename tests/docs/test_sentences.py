"""The sentences that the documentation quotes, and the record of the log in it, are those that the code writes."""

from __future__ import annotations

import ast
import json
import logging
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from kvroom import KVBootstrapServer, KVIdentity, KVLayout, KVManager, RoomFailed, Timeouts, array_regions
from kvroom.runtime.logs import JsonFormatter

from .pages import CURRENT, FROM_SGLANG, ROOT, blocks, name_of, spans

COMMANDS = re.compile(r"(make|kvroom|python|pip|vllm|export|openssl|curl)\b")
BOOTSTRAP_S = 0.25


def is_sentence(span: str) -> bool:
    """Return whether a span quotes a sentence: three of its words are plain ones, and it is no command."""
    words = [word for word in span.split() if re.fullmatch(r"[a-z']+[,:;]?", word)]
    return len(words) >= 3 and re.match(r"[a-z.]", span) is not None and not COMMANDS.match(span)


@cache
def templates() -> tuple[re.Pattern[str], ...]:
    """Return the texts of the code with three words at least, with anything in the place of what is put into them."""
    found = set()
    for file in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(file.read_text())
        nodes = list(ast.walk(tree))
        described = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
        for node in nodes:
            if id(node) in described:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
            elif isinstance(node, ast.Constant):
                parts = [node.value]
            else:
                continue
            texts = [part for part in parts if isinstance(part, str)]
            if len(re.findall(r"[A-Za-z]{2,}", " ".join(texts))) >= 3:
                found.add("".join(re.escape(part) if isinstance(part, str) else ".+" for part in parts))
    return tuple(re.compile(one, re.DOTALL) for one in found)


def unwritten(span: str) -> bool:
    """Return whether the code has no such sentence, nor one that is a part of it."""
    return not any(template.search(span) for template in templates())


@pytest.mark.parametrize("page", [page for page in CURRENT if page != FROM_SGLANG], ids=name_of)
def test_quoted_sentences_are_those_of_the_code(page: Path) -> None:
    assert [span for span in spans(page.read_text()) if is_sentence(span) and unwritten(span)] == []


def test_the_record_in_the_page_is_the_one_that_a_worker_writes(caplog: pytest.LogCaptureFixture) -> None:
    text = (ROOT / "docs" / "operating.md").read_text()
    shown = [json.loads(block.text) for block in blocks(text) if block.text.startswith('{"time"')]
    assert len(shown) == 1
    pool = np.zeros((1, 2, 1, 1, 1, 1), np.uint8)
    layout = KVLayout(array_regions(pool.ctypes.data, pool.shape, pool.strides, "LCPTHD", itemsize=1), dtype="uint8")
    with (
        caplog.at_level(logging.WARNING, "kvroom"),
        KVBootstrapServer() as directory,
        KVManager(layout, register_with=directory.address, timeouts=Timeouts(bootstrap_s=BOOTSTRAP_S)) as manager,
        manager.sender(shown[0]["room"], identity=KVIdentity.of([1])) as sender,
        pytest.raises(RoomFailed),
    ):
        sender.wait(timeout_s=60)
    (record,) = [record for record in caplog.records if hasattr(record, "cause")]
    written = json.loads(JsonFormatter().format(record).replace(f"{BOOTSTRAP_S:g} s", "60 s"))
    assert list(written) == list(shown[0])
    assert {**written, "time": ""} == {**shown[0], "time": ""}


def test_a_false_sentence_is_found() -> None:
    assert is_sentence("waited 60 s for a miracle to happen")
    assert unwritten("waited 60 s for a miracle to happen")
    assert not is_sentence("kvroom rooms and what they are")
