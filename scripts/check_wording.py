"""Check the rules about words and names in CONTRIBUTING.md that a machine can check, and print each violation.

    python scripts/check_wording.py [FILE ...]

Without FILE it checks every Python file and page of `src`, `lab`, `bench`, `scripts`, `examples`, `tests` and `docs`,
and the pages beside them. The exit status is 1 if a rule is broken. The rules:

- A docstring opens with a verb or a noun phrase, never with a question word.
- No text contains a word or idiom of `IDIOMS`, which also gives a plainer one for each.
- A module in a package imports its neighbours relatively, and everything else by its full name.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("src", "lab", "bench", "scripts", "examples", "tests", "docs")
SUFFIXES = (".py", ".md")
EXEMPT = (Path(__file__).resolve(), ROOT / "tests" / "vllm" / "prompts.py")
"""Files in which the idioms may stand: this one, which lists them, and prompts for a model, which are data."""
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
    """Yield one line of text for each place in a file that breaks a rule."""
    text = path.read_text(encoding="utf-8")
    if path not in EXEMPT:
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
    """Return the package of a module; "" for a module of a top-level package and for a file outside of packages."""
    names: list[str] = []
    for folder in path.parents:
        if not (folder / "__init__.py").exists():
            break
        names.insert(0, folder.name)
    return ".".join(names) if len(names) > 1 else ""


def main(arguments: list[str]) -> int:
    """Check the named files, or all files; return 1 if a rule is broken."""
    files = [Path(name).resolve() for name in arguments]
    if not files:
        files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES]
        files += sorted(ROOT.glob("*.md"))
    broken = [line for path in files for line in found_in(path)]
    for line in broken:
        print(line)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
