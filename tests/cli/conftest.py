"""A tiny model for the commands that run one."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.kit import save_tiny_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
