"""The findings of transports about the machine: every probe of the registry, and the functions below them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvroom.transports import REGISTRY, probe
from kvroom.transports.kit import probing
from kvroom.transports.kit.probing import (
    DOUBLES_GROUP,
    Missing,
    amd_gpus,
    ascend_npus,
    installed_doubles,
    library,
    nvidia_gpus,
    package,
    rdma_devices,
)

PROBED = [name for name in REGISTRY if name != "auto"]
KINDS = {"package", "system package", "device", "driver", "permission"}
PROBE_ALL = """
import json, sys, threading, time
from kvroom.transports import REGISTRY, probe
began = time.process_time()
for name in REGISTRY:
    if name != "auto":
        probe(name)
cpu_s = time.process_time() - began
print(json.dumps([cpu_s, threading.active_count(), list(sys.modules)]))
"""


@pytest.mark.parametrize("name", PROBED)
def test_a_probe_says_which_part_and_what_is_missing_and_how_to_get_it(name: str) -> None:
    found = probe(name)
    assert found.part
    assert found.devices
    assert all(device.isalpha() for device in found.devices)  # kinds, not "cuda:0"
    assert {missing.kind for missing in found.missing} <= KINDS
    assert all(missing.what and missing.remedy for missing in found.missing)


def test_probes_are_quick_and_start_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE_ALL], capture_output=True, text=True, check=True, timeout=60)
    cpu_s, threads, modules = json.loads(done.stdout)
    assert cpu_s < 0.3
    assert threads == 1
    assert not {"nixl", "nixl_cu12", "mooncake", "memfabric_hybrid", "mori", "torch"} & {
        module.partition(".")[0] for module in modules
    }


def test_a_package_that_is_there_is_named_with_its_version() -> None:
    name, missing = package("msgspec", "msgspec")
    assert name.startswith("msgspec ")
    assert name.split()[1][0].isdigit()
    assert missing == ()


def test_a_package_that_is_not_there_is_said_to_be_missing() -> None:
    assert package("no-such-part", "no_such_part") == (
        "no-such-part",
        (Missing("the Python package no-such-part", "package", "pip install no-such-part"),),
    )


def test_looking_for_a_package_does_not_import_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "heavy_part").mkdir()
    (tmp_path / "heavy_part" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert package("heavy-part", "heavy_part.engine") == ("heavy-part", ())


def test_a_library_is_there_or_named_with_its_debian_package() -> None:
    assert library("libc.so.6", "libc6") == ()
    (missing,) = library("libnosuch.so.7", "libnosuch7")
    assert missing.what.startswith("the library libnosuch.so.7 (")
    assert (missing.kind, missing.remedy) == ("system package", "apt-get install libnosuch7")


def test_devices_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, folder in (("_DEV", "dev"), ("_RDMA", "infiniband"), ("_KFD_NODES", "nodes")):
        monkeypatch.setattr(probing, name, tmp_path / folder)
    assert (nvidia_gpus(), ascend_npus(), amd_gpus(), rdma_devices()) == (0, 0, 0, [])
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia11", "nvidiactl", "nvidia-uvm", "davinci3", "davinci_manager"):
        (tmp_path / "dev" / name).touch()
    for node, gpu in enumerate(("0", "51234", "7")):
        (tmp_path / "nodes" / str(node)).mkdir(parents=True)
        (tmp_path / "nodes" / str(node) / "gpu_id").write_text(f"{gpu}\n")
    for name in ("mlx5_1", "mlx5_0"):
        (tmp_path / "infiniband" / name).mkdir(parents=True)
    assert (nvidia_gpus(), ascend_npus(), amd_gpus()) == (2, 1, 0)  # the kernel lists AMD's, but no device file
    (tmp_path / "dev" / "kfd").touch()
    assert amd_gpus() == 2
    assert rdma_devices() == ["mlx5_0", "mlx5_1"]


def test_a_double_is_known_where_a_package_offers_it_and_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = installed_doubles()
    offered = tmp_path / "somebodys_doubles-1.0.dist-info"
    offered.mkdir()
    (offered / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-doubles\nVersion: 1.0\n")
    (offered / "entry_points.txt").write_text(f"[{DOUBLES_GROUP}]\nrail = somebodys.rail\n\n[others]\nx = y\n")
    (tmp_path / "somebodys").mkdir()
    (tmp_path / "somebodys" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_doubles() == {**before, "rail": "somebodys.rail"}
