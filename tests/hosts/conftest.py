"""Hosts for the tests of this folder. Where namespaces cannot be made the tests are skipped, and in CI they fail."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .network import Network, Unavailable, sweep


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Three hosts, made once, and removed even after an error."""
    made = Network(tmp_path_factory.mktemp("hosts"))
    try:
        try:
            sweep()
            made.up()
        except (Unavailable, OSError) as error:
            refuse(f"this machine gives no network namespaces: {error}")
        yield made
    finally:
        made.down()


def refuse(reason: str) -> None:
    """Skip the tests, but fail in CI, where a run without these tests would look like a good one."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}; with CI=true these tests must run: give the job root and CAP_SYS_ADMIN")
    pytest.skip(f"{reason}; run `make test-hosts` as root")


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")
