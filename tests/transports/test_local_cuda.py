"""`local` with GPU memory, over the double of the CUDA driver: the bytes, the moment of completion, and the errors."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from cuda_helpers import DOUBLE, PLACED, CudaHost, CudaHosts, judge
from transport_helpers import PAGE, move_page, wait_until

from kvroom.conformance.ends import End, EndSetup, Host
from kvroom.conformance.suite import CHECKS, Check
from kvroom.errors import ConfigurationError, TransportError
from kvroom.plan.blocks import Blocks, MemoryRange
from kvroom.transports.kit.ranges import u64
from kvroom.transports.local import LocalOptions, LocalTransport, probe
from kvroom.transports.local import cuda_driver as real
from kvroom.transports.local.cuda_driver import CudaError
from kvroom.transports.local.peer import LocalDescription
from kvroom.transports.local.writers import Mapped
from kvroom_lab.doubles import cuda_driver as double

NBYTES = 1 << 16


@pytest.fixture(scope="module")
def hosts() -> Iterator[CudaHosts]:
    """Ends with memory on two GPUs and the host, and ends with less, in turn, so that all four pairs of kinds occur."""
    hosts = CudaHosts("cuda:0,cpu,cuda:1", "cpu,cuda:1")
    yield hosts
    hosts.close()


@pytest.mark.sampled(least=9)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_suite_over_the_double(check: Check, hosts: CudaHosts) -> None:
    judge(check, hosts)


def meet(source: Host, sink: Host, **options: Any) -> tuple[End, End, int]:
    ends = [host.open(EndSetup(PLACED, options, [NBYTES], seed)) for seed, host in enumerate((source, sink))]
    peer = ends[0].connect(ends[1].describe())
    ends[1].connect(ends[0].describe())
    return ends[0], ends[1], peer


@pytest.mark.parametrize(
    ("source", "sink", "why"),
    [
        ("cuda:0", "cuda:0", "local (cuda): GPU memory (cuda:0 to cuda:0) by CUDA IPC"),
        ("cuda:0", "cuda:1", "local (cuda): GPU memory (cuda:0 to cuda:1) by CUDA IPC"),
        ("cpu", "cuda:1", "local (cuda): GPU memory (cpu to cuda:1) by CUDA IPC"),
        (
            "cuda:1",
            "cpu",
            "local (vm+cuda): same machine, process_vm_writev permitted; GPU memory (cuda:1 to cpu) by CUDA IPC",
        ),
    ],
)
def test_a_page_between_devices(source: str, sink: str, why: str) -> None:
    with CudaHost(source) as one, CudaHost(sink) as other:
        source_end, sink_end, peer = meet(one, other)
        assert source_end.explain(peer) == why
        wanted = sink_end.contents()[0]
        wanted[:PAGE] = source_end.contents()[0][:PAGE]
        assert move_page(source_end, sink_end, peer) == PAGE
        assert np.array_equal(sink_end.contents()[0], wanted)


def test_a_gpu_has_another_number_in_each_process() -> None:
    """The source's cuda:0 is GPU 1, the sink's is GPU 0, and the source does not see that one."""
    with CudaHost("cuda:0", gpus="1") as one, CudaHost("cuda:0", gpus="0,1") as other:
        source, sink, peer = meet(one, other)
        assert move_page(source, sink, peer) == PAGE
        assert np.array_equal(sink.contents()[0][:PAGE], source.contents()[0][:PAGE])


def test_gpus_that_do_not_reach_each_other() -> None:
    text = (
        r"no access to the peer's GPU memory: .* cannot be opened on cuda:0 \(cuIpcOpenMemHandle_v2: "
        r"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED .*nvidia-smi topo"
    )
    with (
        CudaHost("cuda:0", no_peers="0-1") as one,
        CudaHost("cuda:1", no_peers="0-1") as other,
        pytest.raises(TransportError, match=text),
    ):
        meet(one, other)


def test_a_source_without_gpu_memory_must_see_the_sink_s_gpu() -> None:
    with (
        CudaHost("cpu", gpus="0") as one,
        CudaHost("cuda:1") as other,
        pytest.raises(
            TransportError, match="is not among those that this process sees: add it to CUDA_VISIBLE_DEVICES"
        ),
    ):
        meet(one, other)
    with CudaHost("cpu", no_peers="0-1") as one, CudaHost("cuda:1") as other:
        source, sink, peer = meet(one, other)
        assert move_page(source, sink, peer) == PAGE


def test_memory_is_opened_on_the_gpu_that_reads_for_it() -> None:
    """Both have their memory on GPU 1; from GPU 0 it could not be opened."""
    with CudaHost("cuda:1", no_peers="0-1") as one, CudaHost("cuda:1", no_peers="0-1") as other:
        source, sink, peer = meet(one, other)
        assert move_page(source, sink, peer) == PAGE


class Gpu:
    """A transport of this process with memory on a GPU of the double."""

    def __init__(self, device: int = 0, fill: int = 0, nbytes: int = NBYTES) -> None:
        self.memory = double.allocate(device, nbytes)
        self.bytes = np.frombuffer(self.memory.buffer, np.uint8)
        self.bytes[:] = fill
        self.transport = LocalTransport(LocalOptions(cuda=DOUBLE))
        self.transport.register([MemoryRange(self.memory.address, nbytes, f"cuda:{device}")])

    def block(self, sink: Gpu, nbytes: int = PAGE) -> Blocks:
        return Blocks(u64([self.memory.address]), u64([sink.memory.address]), u64([nbytes]))

    def close(self) -> None:
        self.transport.close()
        del self.bytes
        double.free(self.memory)


@pytest.fixture
def pair() -> Iterator[tuple[Gpu, Gpu, int]]:
    """Two ends on two GPUs; after the test, nothing of the driver is held any longer."""
    before = double.held()
    source, sink = Gpu(0, 7), Gpu(1, 1)
    yield source, sink, source.transport.connect(sink.transport.describe())
    source.close()
    sink.close()
    assert double.held() == before


def test_two_ends_of_one_process_need_no_handle(pair: tuple[Gpu, Gpu, int]) -> None:
    source, sink, peer = pair
    assert source.transport.submit(peer, source.block(sink), b"").result(10) == PAGE
    assert (sink.bytes[:PAGE] == 7).all()
    assert (sink.bytes[PAGE:] == 1).all()


def test_streams_are_used_again(pair: tuple[Gpu, Gpu, int]) -> None:
    source, sink, peer = pair
    transfers = [source.transport.submit(peer, source.block(sink), b"") for _ in range(50)]
    assert [transfer.result(10) for transfer in transfers] == [PAGE] * 50
    assert 1 <= double.held()[1] <= 2  # one for each worker


def test_a_transfer_is_done_when_the_stream_is(pair: tuple[Gpu, Gpu, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The submitting thread does not wait for the stream, however small the transfer is."""
    source, sink, peer = pair
    waiting, finish = threading.Event(), threading.Event()
    honest = double.CudaDriver.wait

    def slow(driver: double.CudaDriver, stream: int) -> None:
        waiting.set()
        finish.wait(10)
        honest(driver, stream)

    monkeypatch.setattr(double.CudaDriver, "wait", slow)
    transfer = source.transport.submit(peer, source.block(sink, 1), b"")
    assert waiting.wait(10)
    assert not transfer.done()
    assert sink.bytes[0] == 1
    assert not source.transport.fence(peer)
    assert not transfer.done()
    finish.set()
    assert transfer.result(10) == 1
    assert sink.bytes[0] == 7


def test_after_an_error_what_has_begun_is_waited_for(
    pair: tuple[Gpu, Gpu, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, sink, peer = pair
    honest = double.CudaDriver.copy
    blocks = Blocks(
        u64([source.memory.address, source.memory.address]),
        u64([sink.memory.address, sink.memory.address + PAGE]),
        u64([10, 10]),
    )

    def breaks(driver: double.CudaDriver, way: str, blocks: Blocks, stream: int) -> None:
        honest(driver, way, Blocks(*(part[:1] for part in blocks)), stream)
        raise CudaError("cuMemcpyAsync", 1, "planted")

    monkeypatch.setattr(double.CudaDriver, "copy", breaks)
    with pytest.raises(TransportError, match=r"writing into the peer failed: cuMemcpyAsync: planted"):
        source.transport.submit(peer, blocks, b"").result(10)
    assert (sink.bytes[:10] == 7).all()  # no copy is left that could land later
    monkeypatch.undo()
    assert source.transport.submit(peer, blocks, b"").result(10) == 20
    assert (sink.bytes[PAGE : PAGE + 10] == 7).all()


def test_the_caller_s_context_is_left_alone() -> None:
    driver = double.CudaDriver()
    context = driver.retain(1)
    driver.push(context)
    source, sink = Gpu(0), Gpu(1)
    peer = source.transport.connect(sink.transport.describe())
    assert source.transport.submit(peer, source.block(sink), b"").result(10) == PAGE
    source.close()
    sink.close()
    assert double._machine.stack() == [context]
    driver.pop()
    driver.release(1)


def refused(memory: double.Memory, device: str, message: str) -> None:
    transport = LocalTransport(LocalOptions(cuda=DOUBLE))
    with pytest.raises(ConfigurationError, match=message):
        transport.register([MemoryRange(memory.address, memory.nbytes, device)])
    transport.close()
    assert double.held() == (0, 0, 0)
    double.free(memory)


def test_memory_without_a_handle_is_refused_with_the_remedy() -> None:
    refused(
        double.allocate(0, PAGE, exportable=False),
        "cuda:0",
        r"cannot be shared with another process \(cuIpcGetMemHandle: CUDA_ERROR_INVALID_VALUE .*expandable_segments",
    )


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:1", "is on cuda:0: correct the device of the region"),
        ("cuda:2", "device 'cuda:2': name one of the 2 GPUs here"),
        ("cuda", "device 'cuda': name one of the 2 GPUs here, cuda:0"),
        ("npu:0", "transport local moves cpu and cuda memory only, but a region lies on 'npu:0'"),
    ],
)
def test_a_device_that_is_not_so(device: str, message: str) -> None:
    refused(double.allocate(0, PAGE), device, message)


def test_no_gpu_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = double.allocate(0, PAGE)
    monkeypatch.setenv("KVROOM_DOUBLE_GPUS", "")
    refused(memory, "cuda:0", r"CUDA_ERROR_NO_DEVICE .*let this process see a GPU and NVIDIA's driver")


def test_no_driver_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "_LIBRARY", "libcuda-of-no-machine.so.1")
    transport = LocalTransport()
    with pytest.raises(ConfigurationError, match=r"libcuda-of-no-machine.* let this process see a GPU and NVIDIA's dr"):
        transport.register([MemoryRange(4096, 4096, "cuda:0")])
    transport.close()
    for module in ("kvroom.transports.nowhere", "kvroom.transports.local"):
        with pytest.raises(ConfigurationError, match=f"cuda='{module}' is not a module with a class CudaDriver"):
            LocalTransport(LocalOptions(cuda=module))


def test_gpu_memory_without_a_handle_in_a_description(pair: tuple[Gpu, Gpu, int]) -> None:
    source, sink, _ = pair
    described = msgspec.msgpack.decode(sink.transport.describe(), type=LocalDescription)
    short = [msgspec.structs.replace(each, nbytes=each.nbytes - 1) for each in described.allocations]
    for allocations in ((), tuple(short)):
        forged = msgspec.structs.replace(described, endpoint=bytes(16), allocations=allocations)
        with pytest.raises(TransportError, match="malformed: it has GPU memory without a handle"):
            source.transport.connect(msgspec.msgpack.encode(forged))


@pytest.mark.parametrize("wrong", [{"handle": bytes(63)}, {"gpu": bytes(17)}, {"base": -1}, {"nbytes": "1"}])
def test_a_malformed_allocation(pair: tuple[Gpu, Gpu, int], wrong: dict[str, Any]) -> None:
    source, sink, _ = pair
    described = msgspec.msgpack.decode(sink.transport.describe(), type=LocalDescription)
    forged = msgspec.structs.replace(described.allocations[0], **wrong)
    raw = msgspec.msgpack.encode(msgspec.structs.replace(described, endpoint=bytes(16), allocations=(forged,)))
    with pytest.raises(TransportError, match="local: the peer's description is malformed"):
        source.transport.connect(raw)


def test_ranges_of_one_allocation_share_its_handle(pair: tuple[Gpu, Gpu, int]) -> None:
    _, sink, _ = pair
    (one,) = msgspec.msgpack.decode(sink.transport.describe(), type=LocalDescription).allocations
    assert (one.base, one.nbytes, len(one.handle), len(one.gpu)) == (sink.memory.address, NBYTES, 64, 16)
    behind = MemoryRange(sink.memory.address + 100, 200, "cuda:1")
    other = LocalTransport(LocalOptions(cuda=DOUBLE))
    other.register([behind, behind._replace(address=behind.address + 1000)])
    described = msgspec.msgpack.decode(other.describe(), type=LocalDescription)
    assert described.allocations == (one,)  # a handle is for the whole allocation
    assert described.ranges == {"cuda:1": ((behind.address, 200), (behind.address + 1000, 200))}
    other.close()


class Touching(double.CudaDriver):
    """A driver with allocations of 100 bytes each, side by side."""

    def device_of(self, address: int) -> int:
        return 0

    def allocation(self, address: int) -> tuple[int, int]:
        return address // 100 * 100, 100

    def export(self, base: int) -> bytes:
        return base.to_bytes(64, "little")


def test_a_range_over_allocations_that_touch_has_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout joins ranges that touch, so one range may lie in several allocations."""
    monkeypatch.setattr(double, "CudaDriver", Touching)
    transport = LocalTransport(LocalOptions(cuda=DOUBLE))
    transport.register([MemoryRange(1050, 250, "cuda:0"), MemoryRange(1310, 90, "cuda:0")])
    described = msgspec.msgpack.decode(transport.describe(), type=LocalDescription)
    assert [(each.base, each.nbytes) for each in described.allocations] == [
        (at, 100) for at in (1000, 1100, 1200, 1300)
    ]
    assert described.allocations[2].handle == (1200).to_bytes(64, "little")
    transport.close()


def test_a_closed_transport_takes_up_no_gpu_again() -> None:
    before = double.held()
    source, sink = Gpu(0), Gpu(1)
    description = sink.transport.describe()
    source.close()
    sink.close()
    with pytest.raises(TransportError, match="local: this transport is closed"):
        source.transport.connect(description)
    assert double.held() == before


def test_a_dead_sink_s_mapping_is_dropped() -> None:
    with CudaHost("cuda:0") as other:
        before = double.held()
        source = Gpu(0, 7)
        sink = other.open(EndSetup(PLACED, {}, [NBYTES]))
        peer = source.transport.connect(sink.describe())
        assert double.held()[2] == before[2] + 1
        assert not source.transport.fence(peer)
        other.kill()
        wait_until(lambda: source.transport.fence(peer))
        assert double.held()[2] == before[2]
        source.close()


def test_a_sink_that_freed_its_memory_is_refused() -> None:
    source, sink = Gpu(0), Gpu(1)
    description = sink.transport.describe()
    with CudaHost("cuda:0") as other:
        end = other.open(EndSetup(PLACED, {}, [NBYTES]))
        end.connect(description)
        end.reopen()
        sink.close()
        with pytest.raises(TransportError, match=r"CUDA_ERROR_INVALID_HANDLE \(400\)"):
            end.connect(description)
    source.close()


def test_memory_that_is_mapped_elsewhere() -> None:
    mapped = Mapped([(5000, 100), (1000, 100), (1100, 50)], [70, 2**63, 300])
    none = u64([])
    inside = Blocks(none, u64([1000, 1140, 5099, 1100]), u64([100, 10, 1, 1]))
    assert mapped.translate(inside).tolist() == [2**63, 340, 169, 300]
    assert mapped.translate(Blocks(none, none, none)).size == 0
    covered = [mapped.covers(address) for address in (999, 1000, 1149, 1150, 5099, 5100)]
    assert covered == [False, True, True, False, True, False]
    for dst, length in ((1099, 2), (1149, 2), (5099, 2)):
        with pytest.raises(OSError, match="a block crosses the boundary between two of the peer's pools"):
            mapped.translate(Blocks(none, u64([1000, dst]), u64([1, length])))


def public(kind: type) -> dict[str, inspect.Signature]:
    named = {name: value for name, value in vars(kind).items() if inspect.isfunction(value)}
    return {name: inspect.signature(value) for name, value in named.items() if name[0] != "_" or name == "__init__"}


def test_the_double_has_the_signatures_of_the_driver() -> None:
    assert public(double.CudaDriver) == public(real.CudaDriver)
    assert len(public(real.CudaDriver)) == 16


def outside(driver: double.CudaDriver) -> None:
    with_room = double.allocate(0, PAGE)
    stream = driver.stream()
    try:
        driver.copy("dtod", Blocks(u64([with_room.address]), u64([with_room.address + 1]), u64([PAGE])), stream)
    finally:
        driver.destroy(stream)
        double.free(with_room)


def through_the_host(driver: double.CudaDriver) -> None:
    memory = double.allocate(0, PAGE)
    stream = driver.stream()
    try:
        driver.copy("htod", Blocks(u64([memory.address]), u64([memory.address]), u64([1])), stream)
    finally:
        driver.destroy(stream)
        double.free(memory)


def twice(driver: double.CudaDriver) -> None:
    stream = driver.stream()
    driver.destroy(stream)
    driver.destroy(stream)


def own_handle(driver: double.CudaDriver) -> None:
    memory = double.allocate(0, PAGE)
    try:
        driver.open(driver.export(memory.address))
    finally:
        double.free(memory)


def middle(driver: double.CudaDriver) -> None:
    memory = double.allocate(0, PAGE)
    try:
        driver.export(memory.address + 1)
    finally:
        double.free(memory)


@pytest.mark.parametrize(
    ("act", "code"),
    [
        (outside, double.INVALID_VALUE),
        (through_the_host, double.INVALID_VALUE),
        (middle, double.INVALID_VALUE),
        (own_handle, double.INVALID_CONTEXT),
        (twice, double.INVALID_HANDLE),
        (lambda driver: driver.open(bytes(64)), double.INVALID_HANDLE),
        (lambda driver: driver.close(4096), double.INVALID_VALUE),
        (lambda driver: driver.allocation(4096), double.NOT_FOUND),
        (lambda driver: driver.uuid(2), double.INVALID_DEVICE),
        (lambda driver: driver.release(1), double.INVALID_CONTEXT),
        (lambda driver: driver.push(1), double.INVALID_CONTEXT),
        (lambda driver: (driver.pop(), driver.stream()), double.INVALID_CONTEXT),
    ],
)
def test_what_the_double_refuses(act: Callable[[double.CudaDriver], object], code: int) -> None:
    driver = double.CudaDriver()
    driver.push(driver.retain(0))
    try:
        with pytest.raises(CudaError, match="double of the CUDA driver") as caught:
            act(driver)
    finally:
        double._machine.stack().clear()
        driver.release(0)
    assert caught.value.code == code


def test_probe_says_which_ways_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = probe()
    assert finding.runs
    assert finding.notes[0].startswith(("vm: process_vm_writev is permitted", "only shm"))
    monkeypatch.setattr("kvroom.transports.local.transport.nvidia_gpus", lambda: 2)
    monkeypatch.setattr("kvroom.transports.local.transport.library", lambda *_: ())
    assert probe().devices == ("cpu", "cuda")
    assert probe().notes[1] == "cuda: 2 NVIDIA GPUs, by CUDA IPC"
    monkeypatch.setattr("kvroom.transports.local.transport.nvidia_gpus", lambda: 0)
    assert probe().devices == ("cpu",)
    assert "/dev/nvidia0" in probe().notes[1]
