"""Sharing a machine: with pytest-xdist's `--dist loadgroup`, the tests of one file run on one worker, in their order.

So a module's fixtures are made once. Folders that keep servers for several files are one group. Groups are handed out
in the order below, those that take minutes first, so that the workers end together.
"""

from __future__ import annotations

from pathlib import PurePath

import pytest

TOGETHER = {"chaos": "the real model", "e2e": "the real model", "serve": "serve"}
LONGEST_FIRST = (
    "the real model",
    "serve",
    "transports/test_conformance.py",
    "ranks/test_faults.py",
    "cli/test_soak.py",
    "mypy",
    "runtime/test_simulation.py",
    "core/test_explore.py",
    "plan/test_worlds.py",
    "runtime/test_agreement.py",
    "cli/test_up.py",
    "engine/test_hybrid.py",
    "transports/test_local_cuda.py",
    "runtime/test_aborts.py",
)


def sort_into_groups(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Name each test's group, and sort the groups."""
    if not config.getoption("loadgroup", False):  # set in workers
        return
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(group_of(item)))
    places = {group: place for place, group in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(next(item.iter_markers("xdist_group")).args[0], len(places)))


def group_of(item: pytest.Item) -> str:
    """The group of its folder, or else its file as a path below this one."""
    path = PurePath(item.path).relative_to(PurePath(__file__).parent)
    return TOGETHER.get(path.parts[0], str(path))
