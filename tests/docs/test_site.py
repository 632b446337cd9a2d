"""The site has every page, and its hook turns links that leave docs/ into links within the site."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest

from .pages import ROOT

CONFIG = (ROOT / "mkdocs.yml").read_text()
NAVIGATION = re.findall(r"^ +- [^:]+: (\S+\.md)$", CONFIG, re.MULTILINE)


def script(name: str) -> ModuleType:
    """Import a script."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOK = script("site_pages")


def test_every_page_is_in_the_navigation_once() -> None:
    docs = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(NAVIGATION) == sorted([*docs, *HOOK.PAGES.values()])


def test_every_public_module_has_a_page() -> None:
    pages = (ROOT / "docs" / "reference").glob("*.md")
    assert sorted(page.read_text() for page in pages) == sorted(f"::: {name}\n" for name in script("list_api").MODULES)


def test_the_hook_knows_the_public_names() -> None:
    assert {"KVManager", "array_regions", "LATENCY_BOUNDS_S"} <= set(HOOK.public_names("kvroom"))
    assert all(HOOK.public_names(module) for module in script("list_api").MODULES)
    assert "KVRoomError" not in HOOK.public_names("kvroom.http")


def test_the_site_is_made_in_ci_and_every_warning_is_an_error() -> None:
    assert "\nmake docs\n" in (ROOT / ".ci" / "run").read_text()
    recipe = (ROOT / "Makefile").read_text().partition("\ndocs: ")[2].partition("\n\n")[0]
    assert "$(or $(ARGS),build --strict)" in recipe
    checks = CONFIG.partition("\nvalidation:\n")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^    (\w+): warn$", checks, re.MULTILINE)) == sorted(
        ["omitted_files", "not_found", "absolute_links", "not_found", "anchors", "absolute_links", "unrecognized_links"]
    )


@pytest.mark.parametrize(
    ("path", "written", "turned"),
    [
        ("docs/vllm.md", "[a](../examples/handoff.py)", "[a](source/examples/handoff.py.md)"),
        ("docs/vllm.md", "[a](../README.md#transports)", "[a](overview.md#transports)"),
        ("docs/vllm.md", "[a](../examples/vllm/README.md)", "[a](source/examples/vllm/README.md)"),
        ("docs/vllm.md", "[a](rooms.md#x) ![b](layouts/hybrid.svg)", "[a](rooms.md#x) ![b](layouts/hybrid.svg)"),
        ("README.md", "[a](docs/rooms.md#x)", "[a](rooms.md#x)"),
        ("examples/vllm/README.md", "[a](../../docs/vllm.md)", "[a](../../../vllm.md)"),
        ("docs/vllm.md", "[a](https://x.org/a.md) [b](#c)", "[a](https://x.org/a.md) [b](#c)"),
        ("docs/vllm.md", "`[a](../README.md)`", "`[a](../README.md)`"),
        ("docs/vllm.md", "```\n[a](../README.md)\n```", "```\n[a](../README.md)\n```"),
        ("docs/vllm.md", "[a](../none.py) [b](../../etc/passwd)", "[a](../none.py) [b](../../etc/passwd)"),
    ],
)
def test_a_link_is_turned(path: str, written: str, turned: str) -> None:
    assert HOOK.with_links(written, path) == turned


def test_every_file_that_is_linked_has_a_page() -> None:
    made = HOOK.outside()
    for path in ("README.md", "CONTRIBUTING.md", "examples/handoff.py", "examples/vllm/README.md"):
        assert HOOK.place(path) in made
    assert (ROOT / "examples" / "handoff.py").read_text().rstrip() in made["source/examples/handoff.py.md"]
    assert not any(place.startswith("..") for place in made)


def test_what_loads_from_another_host_is_found() -> None:
    assert HOOK.LOADED.findall('<script src="https://a.org/x.js"></script><link href=//b.org/y.css>') == [
        "https://a.org/x.js",
        "//b.org/y.css",
    ]
    assert HOOK.LOADED.findall('<a href="https://a.org"></a><script src="x.js"></script>') == []


def test_a_list_that_is_read_as_text_is_found() -> None:
    assert HOOK.LIST_IN_TEXT.findall("<p>some text:\n- one\n- two</p>")
    assert not HOOK.LIST_IN_TEXT.findall("<p>some text</p>\n<ul>\n<li>one - two</li></ul>")
