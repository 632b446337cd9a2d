"""Sampling: of many cases of one test a quick run takes a few, drawn from a seed; `--full` runs all of them.

A test says with `@pytest.mark.sampled("cause", "moment")` which of its arguments must not lose a value: cases are drawn
until each value of each of these arguments has occurred. `kinds`, a function of a case's arguments, returns further
values that must not be lost. `least` asks for more cases than that takes. Without any of these one case is drawn.
Fixtures with parameters are arguments, too.

`together` names one argument, usually a fixture of the module: of its values `least` are drawn, the same ones for every
test of the module that names it, and all cases with these values run. If each test drew values of its own, a fixture
that starts servers would start them for every value that any test has drawn.

The seed is in pytest's header, and `--sample-seed` draws the same cases again. Tests that are named in full on the
command line (`file.py::test[case]`) always run. Property tests draw their examples from the same seed, and a test that
has many of something, such as examples, says with `amount` how many a quick run takes.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import pytest

Case = TypeVar("Case")
MARKER = (
    "sampled(*arguments, kinds=None, least=1, together=None): a run without --full draws some of the cases "
    "(tests/sampling.py)"
)
_full: bool | None = None
"""None until pytest has read its options, which is after it has loaded the first conftest modules."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sampling")
    group.addoption("--full", action="store_true", help="run all cases of sampled tests")
    group.addoption("--sample-seed", type=int, metavar="N", help="draw the cases that the run with this seed drew")


@pytest.hookimpl(tryfirst=True)  # before Hypothesis reads its seed
def pytest_configure(config: pytest.Config) -> None:
    """Settle the seed, which a worker of pytest-xdist has been given."""
    config.addinivalue_line("markers", MARKER)
    if config.option.sample_seed is None:
        given: dict[str, int] = getattr(config, "workerinput", {})
        config.option.sample_seed = given.get("sample_seed", secrets.randbelow(1_000_000))
    if getattr(config.option, "hypothesis_seed", 0) is None:
        config.option.hypothesis_seed = config.option.sample_seed
    global _full
    _full = config.option.full


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give a worker of pytest-xdist the seed."""
    node.workerinput["sample_seed"] = seed(node.config)


def pytest_report_header(config: pytest.Config) -> str:
    if config.option.full:
        return f"sampling: none, all cases run (drawn numbers: --sample-seed {seed(config)})"
    return f"sampling: repeat this run's cases with --sample-seed {seed(config)}, run all with --full"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the cases that were not drawn."""
    if takes_all(config):
        return
    functions: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("sampled"):
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out: set[pytest.Item] = set()
    for name, cases in functions.items():
        left_out |= set(cases) - set(_drawn(config, name, cases))
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


def takes_all(config: pytest.Config) -> bool:
    """Return whether all cases run: with --full, or where the command line names tests in full."""
    return bool(config.option.full) or any("::" in argument for argument in config.args)


def seed(config: pytest.Config) -> int:
    """The number that everything in this run is drawn from."""
    number: int = config.option.sample_seed
    return number


def amount(quick: int, full: int) -> int:
    """One of these numbers of examples, seeds or rooms, as this run has `--full`.

    Test modules and fixtures may ask; a conftest module, and what it imports, is loaded too early.
    """
    assert _full is not None, "this is called before pytest has read its options: call it in a fixture"
    return full if _full else quick


def generator(config: pytest.Config, name: str) -> random.Random:
    """Random numbers of this run for the test or purpose of this name."""
    return random.Random(f"{seed(config)} {name}")


def covering(draw: random.Random, cases: Sequence[Case], values: Sequence[Iterable[Any]], least: int = 1) -> list[Case]:
    """Cases in their order, drawn so that each value of each case occurs, `least` of them if there are as many.

    `values`: those of each case, hashable.
    """
    order = draw.sample(range(len(cases)), len(cases))
    wanted = {value for some in values for value in some}
    taken: list[int] = []
    for at in order:
        if not wanted.isdisjoint(values[at]):
            taken.append(at)
            wanted.difference_update(values[at])
    taken += [at for at in order if at not in taken][: max(0, least - len(taken))]
    return [cases[at] for at in sorted(taken)]


def _drawn(config: pytest.Config, name: str, cases: Sequence[pytest.Function]) -> list[pytest.Function]:
    marker = cases[0].get_closest_marker("sampled")
    assert marker is not None
    wish: dict[str, Any] = {"kinds": lambda _: (), "least": 1, "together": None, **marker.kwargs}
    params = [case.callspec.params for case in cases]
    if (shared := wish["together"]) is not None:
        found = [repr(one[shared]) for one in params]
        draw = generator(config, f"{name.partition('::')[0]} {shared}")
        distinct = list(dict.fromkeys(found))
        taken = draw.sample(distinct, min(wish["least"], len(distinct)))
        return [case for case, value in zip(cases, found, strict=True) if value in taken]
    values = [[*((name, repr(one[name])) for name in marker.args), *wish["kinds"](one)] for one in params]
    return covering(generator(config, name), cases, values, wish["least"])
