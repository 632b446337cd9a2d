"""For all tests: a busy machine is no fault of a property, and of many cases a quick run draws some."""

import pytest
from hypothesis import HealthCheck, settings

import sampling
import sharing
from sampling import (  # noqa: F401 - hooks
    pytest_addoption,
    pytest_configure,
    pytest_configure_node,
    pytest_report_header,
)

# Hypothesis draws the same examples in every run that it takes for one of CI, unless it is told not to.
settings.register_profile("patient", deadline=None, derandomize=False, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    sampling.pytest_collection_modifyitems(config, items)
    sharing.sort_into_groups(config, items)
