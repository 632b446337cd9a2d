"""Add pages to the documentation site for files outside docs/: a hook of MkDocs, named in mkdocs.yml.

A link in docs/ or README.md is written for the repository, `../examples/handoff.py`. In the site it leads to a page
that shows that file. A link without a file is left unchanged: MkDocs reports it, and `--strict` ends the build.

The hook also reports pages that load something from another host, and lists that GitHub reads as a list and
Python-Markdown as text.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = "docs/"
PAGES = {
    "README.md": "overview.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",
}
LANGUAGES = {".py": "python", ".sh": "bash", ".txt": "text"}
CODE_OR_LINK = re.compile(
    r"^(?P<fence>```+)[^`]*?\n.*?^(?P=fence)$|(?P<tick>`+).+?(?P=tick)|\]\((?P<target>[^)\s]+)\)", re.M | re.S
)
LOADED = re.compile(r"""<(?:script|img|iframe|link|source)\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")
LIST_IN_TEXT = re.compile(r"<p>(?:(?!</p>).)*?\n(?:[-*]|\d+\.) ", re.S)

log = logging.getLogger("mkdocs.plugins.site_pages")


def place(path: str) -> str:
    """Return where the site has this file of the repository, as MkDocs names its sources."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    if path in PAGES:
        return PAGES[path]
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def resolve(path: str, target: str) -> str:
    """Return the file that a link in the file `path` leads to, both as paths in the repository, or "" for none."""
    if ":" in target or target.startswith(("#", "/")):
        return ""
    found = posixpath.normpath(posixpath.join(posixpath.dirname(path), target.partition("#")[0]))
    return found if not found.startswith("..") and (ROOT / found).is_file() else ""


def with_links(markdown: str, path: str) -> str:
    """Return the text of the file `path` with its links rewritten for the site. Code is not changed."""
    here = posixpath.dirname(place(path))

    def replace(match: re.Match[str]) -> str:
        target = match["target"]
        found = resolve(path, target) if target else ""
        if not found:
            return match[0]
        _, mark, anchor = target.partition("#")
        return f"]({posixpath.relpath(place(found), here)}{mark}{anchor})"

    return CODE_OR_LINK.sub(replace, markdown)


def linked(markdown: str, path: str) -> set[str]:
    """Return the files that the links in the text of the file `path` lead to."""
    targets = [match["target"] for match in CODE_OR_LINK.finditer(markdown) if match["target"]]
    return {resolve(path, target) for target in targets} - {""}


def shown(path: str) -> str:
    """Return the text of the page of a file outside docs/: its own, if it is Markdown, or its lines as code."""
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        return with_links(text, path)
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    language = LANGUAGES.get(posixpath.splitext(path)[1], "text")
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n"


def outside() -> dict[str, str]:
    """Return the pages that docs/ does not have: their place in the site, and their text."""
    waiting = {f"{DOCS}{page.relative_to(ROOT / DOCS).as_posix()}" for page in (ROOT / DOCS).rglob("*.md")} | set(PAGES)
    found: dict[str, str] = {}
    while waiting:
        path = waiting.pop()
        if not path.startswith(DOCS):
            found[place(path)] = shown(path)
        if path.endswith(".md"):
            waiting |= {
                one
                for one in linked((ROOT / path).read_text(), path)
                if place(one) not in found and not one.startswith(DOCS)
            }
    return found


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of files outside docs/."""
    from mkdocs.structure.files import File

    for uri, text in sorted(outside().items()):
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page of docs/. Those of the other pages were rewritten when the pages were made."""
    return markdown if page.file.generated_by else with_links(markdown, f"{DOCS}{page.file.src_uri}")


def public_names(module: str) -> list[str]:
    """Return the names of a public module, as tests/public_api.txt lists them."""
    _, _, rest = (ROOT / "tests" / "public_api.txt").read_text().partition(f"\n# {module}\n")
    listed = rest.partition("\n# ")[0]
    return re.findall(r"^(?:class |def |async def )?(\w+)", listed, re.MULTILINE)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Report a list that has no blank line before it, and a public name that its module's page does not have."""
    for module in re.findall(r"^::: (\S+)$", page.markdown, re.MULTILINE):
        for name in public_names(module):
            if f'id="{module}.{name}"' not in html:
                log.warning("%s: %s.%s is missing", page.file.src_uri, module, name)
    for found in LIST_IN_TEXT.findall(html):
        log.warning("%s: a list needs a blank line before it: %r", page.file.src_uri, found[-80:])
    return html


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Report every file that a page would load from another host."""
    for url in LOADED.findall(output):
        log.warning("%s loads %s", page.file.src_uri, url)
    return output
