"""Checks of the source: addresses are written, names dialled and HTTP requests made in one place each."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "kvroom"
FILES = [path for path in sorted(SOURCE.rglob("*.py")) if "doubles" not in path.parts]
"""The doubles of other projects' libraries do as those do."""
SHIPPED = [*FILES, *sorted((ROOT / "examples").rglob("*.py")), *sorted((ROOT / "bench").rglob("*.py"))]
ADDRESSES = {SOURCE / "wire" / "address.py"}
SOCKETS = {SOURCE / "dialling" / name for name in ("dial.py", "names.py", "advertised.py")}
SOCKETS |= {SOURCE / "listening" / name for name in ("sockets.py", "acceptor.py")}
CLIENTS = {SOURCE / "dialling" / "http.py"}


def pieces(node: ast.JoinedStr) -> list[str]:
    """The parts of an f-string: the text of those that are constant, and `{...}` with the code of the others."""
    return [str(part.value) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part)}}}" for part in node.values]


def glued(node: ast.AST) -> bool:
    """Return True if this makes a URL or an address out of a host and a port, or splits one."""
    if isinstance(node, ast.JoinedStr):
        parts = pieces(node)
        if any(text.endswith(("http://", "https://")) and after.startswith("{") for text, after in pairwise(parts)):
            return True
        return any(
            first.startswith("{") and "host" in first.lower() and middle.startswith(":") and last.startswith("{")
            for first, middle, last in zip(parts, parts[1:], parts[2:], strict=False)
        )
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        of_colon = isinstance(node.args[0], ast.Constant) and node.args[0].value == ":"
        return of_colon and node.func.attr in ("rpartition", "rsplit")
    return False


def requested(node: ast.AST) -> bool:
    """Return True if this makes a request without `dialling.http.request`, or concatenates a URL and a path."""
    if isinstance(node, ast.JoinedStr):
        parts = pieces(node)
        return any(
            first.startswith("{") and "url" in first.lower() and after.startswith(("/", "?", "#"))
            for first, after in pairwise(parts)
        )
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        methods = ("request", "get", "post", "put", "delete", "head", "patch", "options", "ws_connect")
        return node.func.attr in methods and "session" in ast.unparse(node.func.value).lower()
    return False


def connected(node: ast.AST) -> bool:
    """Return True if this resolves a name or connects by name without `dialling`: by `socket` or by a loop."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    if node.func.attr in ("create_connection", "open_connection"):
        return not any(keyword.arg == "happy_eyeballs_delay" for keyword in node.keywords)
    return node.func.attr in ("getaddrinfo", "gethostbyname", "create_server", "start_server")


def asked(node: ast.AST) -> bool:
    """Return True if this is an HTTP client other than that of `dialling`, or one that may use a proxy."""
    if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level):
        names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        return any(name.split(".")[0] in ("requests", "httpx", "urllib3") for name in names)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in ("urlopen", "ClientSession", "HTTPConnection", "HTTPSConnection", "urlretrieve")
    return isinstance(node, ast.keyword) and node.arg == "trust_env" and ast.unparse(node.value) != "False"


Rule = Callable[[ast.AST], bool]


@cache
def nodes(path: Path) -> list[ast.AST]:
    """All of a file's code."""
    return list(ast.walk(ast.parse(path.read_text())))


def found(path: Path, rule: Rule) -> Iterator[str]:
    for node in nodes(path):
        if rule(node):
            yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    ("rule", "files", "places"),
    [
        (glued, FILES, ADDRESSES),
        (connected, FILES, SOCKETS),
        (asked, SHIPPED, CLIENTS),
        (requested, FILES, CLIENTS),
    ],
    ids=["glued", "connected", "asked", "requested"],
)
def test_there_is_one_place_for_it(rule: Rule, files: list[Path], places: set[Path]) -> None:
    elsewhere = [line for path in files if path not in places for line in found(path, rule)]
    assert elsewhere == []
    assert any(found(path, rule) for path in places)


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (glued, 'f"http://{where}/rooms"'),
        (glued, 'f"{self.host}:{self.port}"'),
        (glued, 'address.rpartition(":")[0]'),
        (glued, 'address.rsplit(":", 1)'),
        (connected, "socket.create_connection(where)"),
        (connected, "loop.create_connection(make, host, port)"),
        (connected, "socket.getaddrinfo(host, port)[0]"),
        (asked, "urllib.request.urlopen(url)"),
        (asked, "aiohttp.ClientSession()"),
        (asked, "session(trust_env=True)"),
        (asked, "import requests"),
        (requested, 'session.get(f"{base}")'),
        (requested, 'self._session.request("PUT", where)'),
        (requested, 'f"{url}/rooms"'),
        (requested, 'f"{self.base_url}?oldest={limit}"'),
    ],
)
def test_a_further_place_would_be_found(rule: Rule, code: str) -> None:
    assert any(rule(node) for node in ast.walk(ast.parse(code)))


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (glued, 'device.partition(":")'),
        (glued, 'f"{name}: {why}"'),
        (connected, "loop.create_connection(make, host, port, happy_eyeballs_delay=0.25)"),
        (asked, "session(trust_env=False)"),
        (requested, 'request(session, "GET", url, "/rooms")'),
        (requested, 'f"{url}: no answer"'),
        (requested, "options.get(name)"),
    ],
)
def test_other_code_is_left_alone(rule: Rule, code: str) -> None:
    assert not any(rule(node) for node in ast.walk(ast.parse(code)))
