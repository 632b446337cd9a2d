"""The order of vLLM's tests, and the first import of vLLM, whose own warnings are ignored.

In the tests, warnings are errors, but those of vLLM's imports are not kvroom's. Therefore vLLM is imported here once.

Tests that use servers run one after the other on one worker of pytest-xdist, grouped by their set of servers. The other
workers run the tests without servers. A quick run draws one of the sets in `BREADTH` and omits the tests of the others.
"""

from __future__ import annotations

import warnings

import pytest
from aftermath import pytest_runtest_makereport, pytest_runtest_setup  # noqa: F401
from fixtures import garage, logs, model, set_of, truth  # noqa: F401
from sets import BREADTH, QUICK_ORDER

from sampling import generator, takes_all


def pytest_configure(config: pytest.Config) -> None:
    """Import vLLM in processes that run tests, which the main process of pytest-xdist does not."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vllm.v1.worker.gpu_model_runner  # noqa: F401 - with everything that the connector meets


@pytest.hookimpl(tryfirst=True)  # before tests without a group get one
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put tests with servers first, in the order of the sets, and omit those of sets that were not drawn."""
    if not takes_all(config) and not config.option.keyword:  # "-k sliding" means that set, whichever would be drawn
        asked = {set_of(item) for item in items}
        drawn = generator(config, "sets").choice([name for name in BREADTH if name in asked] or [""])
        left_out = [item for item in items if set_of(item) in BREADTH and set_of(item) != drawn]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    places = {name: place for place, name in enumerate(QUICK_ORDER)}
    items.sort(key=lambda item: places.get(set_of(item), len(places)))
    for item in items:
        if set_of(item):
            item.add_marker(pytest.mark.xdist_group("servers"))
