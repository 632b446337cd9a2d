"""One tiny model and one cluster for all tests of this folder; after each test every worker must be idle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from .helpers import Process, assert_idle, get, running, save_tiny_model

# One thread, as in the engine's tests: the matrices are tiny, and spinning threads cost tenfold on a busy machine.
torch.set_num_threads(1)

SIZES = ("--page-tokens", "4", "--pages", "128", "--chunk-tokens", "32", "--bootstrap-s", "3")
SECRET = "the secret of the workers under test"


class Served(NamedTuple):
    """A cluster of one prefill and one decode worker behind a router."""

    process: Process
    prefill: str
    decode: str

    @property
    def url(self) -> str:
        return self.process.url


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def cluster(model_dir: Path) -> Iterator[Served]:
    with running("up", "--port", "0", "--model", str(model_dir), *SIZES, KVROOM_SECRET=SECRET) as process:
        workers = {one["worker_type"]: one["url"] for one in get(process.url, "/workers").json()["workers"]}
        yield Served(process, workers["prefill"], workers["decode"])


@pytest.fixture
def served(cluster: Served) -> Iterator[Served]:
    yield cluster
    assert_idle([cluster.prefill, cluster.decode])
