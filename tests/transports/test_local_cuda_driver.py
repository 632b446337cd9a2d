"""The CUDA driver itself, through ctypes: on NVIDIA's library where there is a GPU, and everywhere on a stub in C.

The stub has the driver's prototypes, which the compiler compares with NVIDIA's header where that is installed; it shows
that each call passes the right arguments. Two processes run the conformance suite on either.
"""

from __future__ import annotations

import glob
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cuda_helpers import CudaHosts, judge

from kvroom.conformance import failures, moves, refusals
from kvroom.conformance.suite import CHECKS, Check
from kvroom.plan.blocks import Blocks
from kvroom.transports.kit.ranges import u64
from kvroom.transports.local import cuda_driver as local_cuda_driver
from kvroom.transports.local.cuda_driver import CudaDriver, CudaError

SOURCE = Path(__file__).with_name("libcuda_stub.c")
REAL = "libcuda.so.1"
STUB_CHECKS = (
    moves.moves_scattered_unaligned_blocks,
    moves.moves_both_ways_at_once,
    refusals.refuses_unregistered_destination,
    failures.a_killed_peer_fails_transfers_and_is_fenced,
    failures.opens_and_closes_without_growth,
)


def gpus() -> str:
    """Return the devices of this machine as a list for `CudaHosts`; skip, with the reason, where there are none."""
    try:
        return ",".join(f"cuda:{device}" for device in range(CudaDriver().count()))
    except OSError as error:
        pytest.skip(f"no NVIDIA GPU can be used here: {error}")


@pytest.fixture(scope="module")
def real_hosts() -> Iterator[CudaHosts]:
    hosts = CudaHosts(gpus(), f"{gpus()},cpu", library=REAL)
    yield hosts
    hosts.close()


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler for the stub of libcuda")
    library = tmp_path_factory.mktemp("stub") / "libcuda.so.1"
    headers = [f"-I{found}" for found in glob.glob("/usr/local/cuda*/include")]
    command = [compiler, "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(library), *headers, str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return str(library)


@pytest.fixture(scope="module")
def stub_hosts(stub: str) -> Iterator[CudaHosts]:
    hosts = CudaHosts("cuda:0", "cuda:0,cpu", library=stub)
    yield hosts
    hosts.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_suite_on_real_gpus(check: Check, real_hosts: CudaHosts) -> None:
    judge(check, real_hosts)


@pytest.mark.parametrize("check", STUB_CHECKS, ids=lambda check: check.__name__)
def test_two_processes_on_the_stub(check: Check, stub_hosts: CudaHosts) -> None:
    judge(check, stub_hosts)


def test_calls_on_the_stub(stub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_cuda_driver, "_LIBRARY", stub)
    driver = CudaDriver()
    assert driver.count() == 2
    assert driver.uuid(1) == b"\xa1" * 16
    context = driver.retain(0)
    assert context == 0xC000
    driver.push(context)
    stream = driver.stream()
    with pytest.raises(CudaError, match=r"^cuMemGetAddressRange_v2: CUDA_ERROR \(500\), an error$") as unknown:
        driver.allocation(2**63)
    assert unknown.value.code == 500
    with pytest.raises(CudaError, match=r"^cuIpcGetMemHandle: CUDA_ERROR_INVALID_VALUE \(1\), invalid argument$"):
        driver.export(4096)
    with pytest.raises(CudaError, match=r"cuIpcOpenMemHandle_v2: CUDA_ERROR \(400\)"):
        driver.open(b"/proc/none".ljust(64, b"\0"))
    with pytest.raises(CudaError, match=r"cuMemcpyAsync: CUDA_ERROR \(201\)"):
        driver.copy("dtod", Blocks(u64([4096]), u64([4096]), u64([1])), 0)
    driver.wait(stream)
    driver.destroy(stream)
    driver.pop()
    driver.release(0)
    with pytest.raises(CudaError, match="cuDevicePrimaryCtxRelease_v2"):
        driver.release(2)


def test_a_library_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_cuda_driver, "_LIBRARY", "libc.so.6")
    with pytest.raises(OSError, match=r"the NVIDIA driver here is older than 11\.4"):
        CudaDriver()
