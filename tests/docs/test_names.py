"""Names that the documentation puts between backticks are there: files, tests, modules, members, settings, metrics."""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import kvroom
import kvroom.transports
from kvroom.engine.loop import EngineLoad
from kvroom.engine.pages import PoolCounts
from kvroom.serve.metrics import engine_families
from kvroom.status import manager_families

from .pages import ALL, CURRENT, FROM_SGLANG, ROOT, name_of, prose, spans

FOLDERS = ("src", "lab", "tests", "scripts", "bench", "examples", "docs", ".ci")
SUFFIXES = ("py", "sh", "md", "txt", "toml", "yml", "svg")
OURS = [page for page in CURRENT if page != FROM_SGLANG]
"""The pages whose names are all of this repository, or of what it uses."""
FOREIGN = {
    "kvroom.doubles": "a group of entry points",
    "MC_TCP_BIND_ADDRESS": "Mooncake's variable",
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "SGLang's variable",
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "SGLang's variable",
    "/pause_generation": "a route of SGLang",
    "/release_memory_occupation": "a route of SGLang",
    "maintainers": "a field of pyproject.toml",
    "prefill_not_found": "a code of smg",
    "tracestate": "a header of W3C Trace Context",
    "systemUUID": "a field of a Kubernetes node",
    "uuidgen": "a program",
}
"""Names that no file of the repository has."""
VARIABLES = {"handle": "Handle", "sender": "KVSender", "receiver": "KVReceiver", "manager": "KVManager"}
IDLE = EngineLoad(
    waiting=0, running=0, parting=0, succeeded=0, failed=0, prompt_tokens_computed=0, prompt_tokens_cached=0,
    pages_evicted=0, pool=PoolCounts(0, 0, 0, 0, 0), groups={}, error=None,
)  # fmt: skip
AXES = re.compile(r"[LCPTHD]{3,6}")


@cache
def paths() -> tuple[str, ...]:
    """Return every file and folder of the repository, folders with a slash behind, with a slash before."""
    found = [f"/{file.name}" for file in ROOT.iterdir() if file.is_file()]
    for folder in FOLDERS:
        files = [file.relative_to(ROOT) for file in (ROOT / folder).rglob("*") if "__pycache__" not in file.parts]
        found += [f"/{file.as_posix()}{'/' * (ROOT / file).is_dir()}" for file in files]
        found.append(f"/{folder}/")
    return tuple(found)


def is_path(span: str) -> bool:
    """Return whether a span can only be a file or folder of a repository."""
    return re.fullmatch(rf"[\w.-]+(/[\w.-]+)*\.({'|'.join(SUFFIXES)})|([a-z_]+/)+|tests(/\w+)+", span) is not None


def missing_path(span: str) -> bool:
    """Return whether no file or folder of the repository ends like this."""
    span = span.lstrip("./")
    ends = (f"/{span}", f"/{span}/") if not span.endswith("/") else (f"/{span}",)
    return not any(path.endswith(ends) for path in paths())


def misplaced(text: str) -> list[str]:
    """Return the names that stand behind a file, as in "`core/sink.py`, `Sink`", and do not occur in it."""
    found = []
    for file, name in re.findall(r"`([\w/]+\.py)`, `([A-Za-z]\w*(?:\.\w+)*)`", prose(text)):
        places = [ROOT / path[1:] for path in paths() if path.endswith(f"/{file}")]
        occurs = [place for place in places if re.search(rf"\b{name.rpartition('.')[2]}\b", place.read_text())]
        found += [] if occurs or not places or name.endswith(".py") else [f"{file}: {name}"]
    return found


@pytest.mark.parametrize("page", OURS, ids=name_of)
def test_names_behind_a_file_are_in_it(page: Path) -> None:
    assert misplaced(page.read_text()) == []


def missing_test(span: str) -> bool:
    """Return whether a test `FILE::NAME` is missing."""
    file, _, name = span.partition("::")
    return missing_path(file) or f"def {name}(" not in (ROOT / file).read_text()


@pytest.mark.parametrize("page", OURS, ids=name_of)
def test_files_and_folders_are_there(page: Path) -> None:
    assert [span for span in spans(page.read_text()) if is_path(span) and missing_path(span)] == []


@pytest.mark.parametrize("page", [page for page in ALL if page not in OURS], ids=name_of)
def test_scripts_modules_and_pages_are_there_where_other_paths_are_foreign_or_gone(page: Path) -> None:
    named = [span for span in spans(page.read_text()) if re.fullmatch(r"[\w./-]+\.(?:py|sh)|(?:\w+/)+\w+\.md", span)]
    assert [span for span in named if missing_path(span)] == []


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_tests_are_there(page: Path) -> None:
    assert [span for span in spans(page.read_text()) if "::test_" in span and missing_test(span)] == []


def missing_member(span: str) -> bool:
    """Return whether a dotted name that begins in kvroom leads nowhere."""
    names = span.partition("(")[0].split(".")
    if names[0] in ("kvroom", "kvroom_lab"):
        return span not in FOREIGN and not _found_in_modules(names)
    kind = getattr(kvroom, names[0], None) or getattr(kvroom.transports, names[0], None)
    return kind is not None and not _has(kind, names[1])


def _found_in_modules(names: list[str]) -> bool:
    """Follow a dotted name. An adapter's module that needs an engine to be imported is read as text instead."""
    for length in range(len(names), 0, -1):
        stem = ROOT / ("lab" if names[0] == "kvroom_lab" else "src") / "/".join(names[:length])
        file = stem.with_suffix(".py") if stem.with_suffix(".py").is_file() else stem / "__init__.py"
        if file.is_file():
            rest = names[length:]
            try:
                found: object = importlib.import_module(".".join(names[:length]))
            except (ImportError, kvroom.errors.ConfigurationError):
                if names[1:2] != ["adapters"]:
                    raise
                return all(re.search(rf"\b{name}\b", file.read_text()) for name in rest)
            return all((found := getattr(found, name, None)) is not None for name in rest)
    return False


def _has(kind: object, name: str) -> bool:
    """Return whether a class has a member, a field, or an attribute that its methods set."""
    own = [one for one in getattr(kind, "__mro__", ()) if one.__module__.startswith("kvroom")]
    return hasattr(kind, name) or any(re.search(rf"\bself\.{name}\b|\b{name}: ", inspect.getsource(one)) for one in own)


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_members_are_there(page: Path) -> None:
    dotted = [span for span in spans(page.read_text()) if re.fullmatch(r"\w+(\.\w+)+(\(.*\))?", span)]
    if page != FROM_SGLANG:
        dotted = [re.sub(r"^\w+", lambda one: VARIABLES.get(one[0], one[0]), span) for span in dotted]
    dotted = [span for span in dotted if span.rpartition(".")[2] not in SUFFIXES]
    assert [span for span in dotted if missing_member(span)] == []


@cache
def words() -> frozenset[str]:
    """Return every word of the code."""
    files = [ROOT / "Makefile", ROOT / "pyproject.toml"]
    for folder in FOLDERS:
        files += [file for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".sh")]
    return frozenset(word for file in files if file != Path(__file__) for word in re.findall(r"\w+", file.read_text()))


def unknown_words(span: str) -> list[str]:
    """Return the names in a span that is a name, or a call, that occur nowhere in the code."""
    if not re.fullmatch(r"\w+(\.\w+)*(\(.*\))?", span) or AXES.fullmatch(span):
        return []
    if re.match(r"kvroom_|KVROOM_", span) or span.rpartition(".")[2] in SUFFIXES:
        return []  # the tests of metrics, variables and paths have these
    return [
        word for word in re.findall(r"[A-Za-z_]\w+", span.partition("(")[0]) if word not in words() | FOREIGN.keys()
    ]


@pytest.mark.parametrize("page", OURS, ids=name_of)
def test_names_occur_in_the_code(page: Path) -> None:
    assert [word for span in spans(page.read_text()) for word in unknown_words(span)] == []


@cache
def sources() -> str:
    """Return the text of all modules."""
    return "".join(file.read_text() for folder in ("src", "lab") for file in (ROOT / folder).rglob("*.py"))


def missing_route(span: str) -> bool:
    """Return whether a span is a route of HTTP that no module has."""
    found = re.fullmatch(r"(?:(?:GET|POST|PUT|DELETE) )?(/[a-z_0-9]+(?:/[a-z_0-9{}]+)*)(\?.*)?", span)
    route = re.sub(r"/\{\w+\}", "/", found[1]).rstrip("/") if found else ""
    return f'"{route}' not in sources() and f'{route}"' not in sources() and f"{route}?" not in sources()


@pytest.mark.parametrize("page", OURS, ids=name_of)
def test_routes_are_there(page: Path) -> None:
    assert [span for span in spans(page.read_text()) if span not in FOREIGN and missing_route(span)] == []


@cache
def metrics() -> set[str]:
    """Return the names of all metrics as Prometheus reads them."""
    pool = np.zeros((1, 2, 1, 1, 1, 1), np.uint8)
    regions = kvroom.array_regions(pool.ctypes.data, pool.shape, pool.strides, "LCPTHD", itemsize=1)
    with kvroom.KVManager(kvroom.KVLayout(regions, dtype="uint8"), transport="memory") as manager:
        families = [*manager_families(manager.metrics()), *engine_families("prefill", IDLE)]
    names = {family.name + "_total" * (family.type == "counter") for family in families}
    source = (ROOT / "src" / "kvroom" / "adapters" / "vllm" / "stats.py").read_text()
    names |= {f"vllm:{name}" for name in re.findall(r'name="vllm:(kvroom_\w+)"', source)}
    names |= {f"vllm:kvroom_{name}_total" for name in re.findall(r'self\._counter\(\s*"(\w+)"', source)}
    return names | {f"vllm:kvroom_{name}" for name in re.findall(r'self\._gauge\(\s*"(\w+)"', source)}


def metrics_named(text: str) -> set[str]:
    """Return the metrics that a text names."""
    return set(re.findall(r"\b(?:vllm:)?kvroom_(?!lab\b)[a-z_]+", text))


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_metrics_are_there(page: Path) -> None:
    assert metrics_named(page.read_text()) - metrics() == set()


def test_every_metric_has_its_row() -> None:
    operating = (ROOT / "docs" / "operating.md").read_text()
    rows = [line.split("|")[1] for line in operating.splitlines() if line.startswith("| `")]
    assert metrics() - metrics_named("\n".join(rows)) == set()


def variables(text: str) -> set[str]:
    """Return the environment variables of kvroom that a text names."""
    return set(re.findall(r"\bKVROOM_[A-Z_]*[A-Z]\b", text))


def settings() -> set[str]:
    """Return the environment variables that the code reads: those it names, and one for each setting under SGLang."""
    from kvroom.adapters.sglang.settings import PREFIX, SGLangSettings

    files = [*ROOT.glob("src/**/*.py"), *ROOT.glob("examples/**/*.sh")]
    read = {name for file in files for name in variables(file.read_text())}
    return read | {f"{PREFIX}{name.upper()}" for name in SGLangSettings.__struct_fields__}


def option_variables() -> set[str]:
    """Return the variables of the options of all commands, for which one sentence stands in the documentation."""
    from kvroom.cli.options import options_of
    from kvroom.cli.parser import COMMANDS
    from kvroom.cli.variables import variable_of

    found = {variable_of(option) for command in COMMANDS for option in options_of(command.options)}
    return {name for name in found if name is not None}


def test_variables_of_the_environment_are_those_of_the_code() -> None:
    named = {name for page in CURRENT for name in variables(page.read_text())}
    assert named - settings() - option_variables() == set()
    assert settings() - option_variables() - named == set()


@pytest.mark.parametrize("span", ["core/rooms_of_none.py", "nowhere/", "tests/none", "test_nothing.py"])
def test_a_false_path_is_found(span: str) -> None:
    assert is_path(span)
    assert missing_path(span)


def test_a_name_behind_the_wrong_file_is_found() -> None:
    assert misplaced("`core/sink.py`, `Sink` and `core/sink.py`, `Nowhere`") == ["core/sink.py: Nowhere"]


def test_a_false_route_is_found() -> None:
    assert missing_route("/none_such")
    assert missing_route("POST /rooms_of/{id}")
    assert not missing_route("POST /fence")
    assert not missing_route("no route at all")


def test_a_false_test_is_found() -> None:
    assert missing_test("tests/core/test_rooms.py::test_none")
    assert missing_test("tests/core/test_none.py::test_none")


@pytest.mark.parametrize(
    "span",
    ["Timeouts.none_s", "KVSender.leave(cause)", "kvroom.none", "kvroom.core.Table", "kvroom.adapters.vllm.None_"],
)
def test_a_false_member_is_found(span: str) -> None:
    assert missing_member(span)


def test_a_false_word_and_a_false_metric_are_found() -> None:
    assert unknown_words("bootstrap_of_none_s") == ["bootstrap_of_none_s"]
    assert metrics_named("`kvroom_rooms` and `kvroom_none_total`") - metrics() == {"kvroom_none_total"}
    assert variables("`KVROOM_NONE`") - settings() == {"KVROOM_NONE"}
