"""Check the rules of CONTRIBUTING about words and imports that a machine can check; print each place that breaks one.

    python scripts/check_wording.py [FILE ...]

Without files: every Python file of `src`, `lab`, `bench`, `scripts` and `examples`, and every page of the
documentation.
Ends with 1 if a rule is broken. The rules:

- A docstring opens with a verb or a noun phrase, never with a question word.
- Words and idioms of `IDIOMS` are used nowhere: each has a plainer one, given here.
- A module imports its neighbours in the same folder relatively, and everything else by its full name.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("src", "lab", "bench", "scripts", "examples")
QUESTION = re.compile(r"(What|Who|Whom|Whose|Whether|Where|How|Why|Which|When)\b")
IDIOMS = {
    "any more": "no longer",
    "nobody": "no peer, no room, no caller",
    "somebody": "a peer, a caller",
    "whoever": "the peer that, the caller that",
    "under way": "in flight, running",
    "so many": "the number",
    "meanwhile": "in between, since then",
    "for ever": "without end",
    "anew": "again",
    "in vain": "timed out",
    "shall": "must, may",
}
_IDIOM = re.compile(rf"\b({'|'.join(IDIOMS)})\b", re.IGNORECASE)


def found_in(path: Path) -> Iterator[str]:
    """Yield a line for each place of a file that breaks a rule."""
    text = path.read_text(encoding="utf-8")
    if path != Path(__file__).resolve():
        for number, line in enumerate(text.splitlines(), 1):
            for idiom in _IDIOM.findall(line):
                yield f"{path}:{number}: {idiom!r}: write {IDIOMS[idiom.lower()]}"
    if path.suffix == ".py":
        yield from _found_in_code(path, ast.parse(text))


def _found_in_code(path: Path, tree: ast.Module) -> Iterator[str]:
    own = _package(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and (word := QUESTION.match(text)):
                line = node.body[0].lineno
                yield f"{path}:{line}: a docstring opens with {word[0]!r}: begin with a verb or a noun phrase"
        elif isinstance(node, ast.ImportFrom) and own and not node.level and f"{node.module}.".startswith(f"{own}."):
            module = (node.module or "").removeprefix(own)
            yield f"{path}:{node.lineno}: a neighbour is imported by its full name: write `from {module or '.'} import`"


def _package(path: Path) -> str:
    """Return the package that a module is in; "" for the top of a package and for files outside of one."""
    names: list[str] = []
    for folder in path.parents:
        if not (folder / "__init__.py").exists():
            break
        names.insert(0, folder.name)
    return ".".join(names) if len(names) > 1 else ""


def main(arguments: list[str]) -> int:
    """Check the files that are named, or all of them; return 1 if a rule is broken."""
    files = [Path(name).resolve() for name in arguments]
    if not files:
        files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
        files += [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    broken = [line for path in files for line in found_in(path)]
    for line in broken:
        print(line)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
