"""`mori`: its treatment of mori's statuses and failures, and its double, compared with the API file in mori's wheel.

The last test is for a machine on which mori itself loads.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from transport_helpers import PAGE, Side, block, wait_until

from kvroom.conformance.ends import Hosts
from kvroom.conformance.stage import Skipped
from kvroom.conformance.suite import CHECKS, Case, Check, run
from kvroom.errors import ConfigurationError, TransportError
from kvroom.plan.blocks import Blocks, MemoryRange
from kvroom.transports import create, probe
from kvroom.transports.kit.probing import installed_doubles
from kvroom.transports.kit.ranges import u64
from kvroom.transports.onesided import mori as mori_module
from kvroom.transports.onesided.mori import MoriTransport
from kvroom_lab.doubles import mori_io as double

DOUBLE = double.__name__
MISSING = probe("mori").missing
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "kvroom", "wheels")
Sides = tuple[Side[MoriTransport], Side[MoriTransport]]


class Wheel(NamedTuple):
    """The two files of mori's API, and the shared library with the bindings under them."""

    engine: ast.Module
    names: ast.Module
    bindings: bytes


@pytest.fixture(scope="module")
def wheel() -> Wheel:
    paths = ("mori/io/engine.py", "mori/io/__init__.py", "mori/libmori_pybinds.so")
    spec = importlib.util.find_spec("mori")
    if spec is not None and spec.submodule_search_locations:
        top = Path(spec.submodule_search_locations[0]).parent
        files = [(top / path).read_bytes() for path in paths]
    else:
        found = sorted(CACHE.glob("amd_mori-1.2.4-*.whl"))
        if not found:
            pytest.skip(f"amd-mori is not installed, and its wheel is not in {CACHE} (`make` fetches it)")
        with zipfile.ZipFile(found[0]) as archive:
            files = [archive.read(path) for path in paths]
    return Wheel(ast.parse(files[0]), ast.parse(files[1]), files[2])


def classes(tree: ast.Module) -> dict[str, dict[str, ast.FunctionDef]]:
    return {
        node.name: {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def written_arguments(function: ast.FunctionDef) -> list[tuple[str, str | None]]:
    names = [argument.arg for argument in function.args.args]
    defaults: list[str | None] = [ast.unparse(default) for default in function.args.defaults]
    listed = list(zip(names, [None] * (len(names) - len(defaults)) + defaults, strict=True))
    return listed + ([(f"*{function.args.vararg.arg}", None)] if function.args.vararg else [])


def arguments(function: Any) -> list[tuple[str, str | None]]:
    return [
        (
            f"*{name}" if each.kind is each.VAR_POSITIONAL else name,
            None if each.default is each.empty else repr(each.default),
        )
        for name, each in inspect.signature(function).parameters.items()
    ]


def public(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if not name.startswith("_") and inspect.isroutine(value)}


def test_the_double_has_the_methods_of_the_engine(wheel: Wheel) -> None:
    engine, mine = classes(wheel.engine)["IOEngine"], public(double.IOEngine)
    assert len(mine) == 11
    for name, method in {**mine, "__init__": double.IOEngine.__init__}.items():
        assert arguments(method) == written_arguments(engine[name]), name
    called = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(mori_module)))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self._engine"
    }
    assert called == mine.keys() - {"remove_backend"}


def test_the_double_has_the_names_of_the_module(wheel: Wheel) -> None:
    exported = classes(wheel.engine).keys() | {
        alias.name for node in wheel.names.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    mine = {name for name, each in vars(double).items() if inspect.isclass(each) and each.__module__ == DOUBLE}
    assert {name for name in mine if not name.startswith("_")} - exported == {"TransferStatus"}  # of mori.cpp
    used = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(mori_module)))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("mori", "self._mori")
    }
    assert len(used) == 9
    assert used <= exported
    assert used <= mine


def test_fields_members_and_methods_are_in_the_bindings(wheel: Wheel) -> None:
    """pybind11 keeps these names as strings of their own in the library; it makes signatures only when it is loaded."""
    enums = (double.BackendType, double.MemoryLocationType, double.StatusCode, double.PollCqMode)
    names = {member.name for kind in (*enums, double.PeerFailureReason) for member in kind}
    for kind in (double.RdmaBackendConfig, double.XgmiBackendConfig, double.IOEngineConfig):
        names |= {*kind.__slots__, *(name for name, _ in arguments(kind.__init__) if name != "self")}
    names |= public(double.TransferStatus).keys() | set(double.PeerFailureEvent.__dataclass_fields__)
    names |= {*double.EngineDesc.__struct_fields__, *double.MemoryDesc.__struct_fields__, "pack", "unpack"}
    assert len(names) > 50
    assert not {name for name in names if b"\0" + name.encode() + b"\0" not in wheel.bindings}


def test_the_finding_says_what_is_missing() -> None:
    finding = probe("mori")
    assert installed_doubles()["mori"] == DOUBLE
    assert finding.fast == finding.runs
    packages = [missing for missing in finding.missing if missing.kind == "package"]
    if importlib.util.find_spec("mori") is None:
        assert len(packages) == 1 + (sys.version_info[:2] not in ((3, 10), (3, 12)))
    else:
        assert not packages


@pytest.mark.skipif(not MISSING, reason="mori can run here")
def test_what_is_missing_is_one_clear_error() -> None:
    with pytest.raises(ConfigurationError, match=r"^mori: mori\.io cannot be loaded \(.*\)\. Missing here: ") as raised:
        create("mori")
    for missing in MISSING:
        assert f"{missing.what}: {missing.remedy}" in str(raised.value)


def desc_of(engine: double.IOEngine) -> double.EngineDesc:
    desc: double.EngineDesc = double.EngineDesc.unpack(engine.get_engine_desc().pack())
    return desc


class Engines:
    """Two engines of the double with a page each, and one write between them."""

    def __init__(self) -> None:
        self.memory = np.arange(4 * PAGE, dtype=np.uint8)
        address, cpu = int(self.memory.ctypes.data), double.MemoryLocationType.CPU
        self.source, self.sink = (double.IOEngine(key, double.IOEngineConfig("127.0.0.1", 0)) for key in ("a", "b"))
        for engine in (self.source, self.sink):
            with pytest.raises(RuntimeError, match="create backend first"):
                engine.register_memory(address, PAGE, -1, cpu)
            engine.create_backend(double.BackendType.RDMA)
        self.mine = self.source.register_memory(address, PAGE, -1, cpu)
        self.theirs = self.sink.register_memory(address + 2 * PAGE, PAGE, -1, cpu)
        self.source.register_remote_engine(desc_of(self.sink))

    def write(self, offset: int = 0, peer_offset: int = 0, size: int = PAGE, **other: Any) -> double.TransferStatus:
        rows = [other.get("mine", self.mine)], [[offset]], [other.get("theirs", self.theirs)], [[peer_offset]], [[size]]
        (status,) = self.source.batch_write(*rows, [self.source.allocate_transfer_uid()])
        return status

    def ends(self, *args: int, **other: Any) -> tuple[double.StatusCode, str]:
        """Write, and return how that ended; check that nothing was written unless it succeeded."""
        before = self.memory.copy()
        status = self.write(*args, **other)
        self.source.wait_all([status], 10_000)
        if not status.Succeeded():
            assert np.array_equal(self.memory, before)
        return status.Code(), status.Message()


@pytest.fixture
def engines() -> Engines:
    return Engines()


def test_the_double_writes_later(engines: Engines) -> None:
    with engines.source._core.lock:  # its worker waits
        status = engines.write(5, 7, 100)
        assert status.InProgress()
        assert engines.source.wait_all([status], 0) is double.StatusCode.IN_PROGRESS
        assert engines.memory[2 * PAGE + 7] == (2 * PAGE + 7) % 256
    assert engines.source.wait_all([status]) is double.StatusCode.SUCCESS
    assert np.array_equal(engines.memory[2 * PAGE + 7 :][:100], engines.memory[5:105])


def test_the_double_refuses_what_mori_refuses(engines: Engines) -> None:
    codes = double.StatusCode
    assert engines.ends(1, 0, PAGE) == (codes.ERR_INVALID_ARGS, "transfer offsets/lengths leave the registered range")
    assert engines.ends(0, 1, PAGE)[0] is codes.ERR_INVALID_ARGS
    assert engines.ends(mine=engines.theirs)[0] is codes.ERR_INVALID_ARGS
    stranger = double.MemoryDesc.unpack(engines.theirs.pack().replace(b"\xa1b", b"\xa1c"))
    assert engines.ends(theirs=stranger) == (codes.ERR_NOT_FOUND, "remote engine c is not registered")
    assert engines.ends()[0] is codes.SUCCESS
    engines.sink.deregister_memory(engines.theirs)
    assert engines.ends() == (codes.ERR_RDMA_OP, "remote access error")
    engines.source.deregister_memory(engines.mine)
    assert engines.ends()[0] is codes.ERR_INVALID_ARGS
    engines.source.remove_backend(double.BackendType.RDMA)
    assert engines.ends() == (codes.ERR_BAD_STATE, "No available backend found, create backend first")


def test_the_double_refuses_lists_that_do_not_match(engines: Engines) -> None:
    uid = engines.source.allocate_transfer_uid()
    (status,) = engines.source.batch_write([engines.mine], [[0, 1]], [engines.theirs], [[0]], [[1]], [uid])
    assert status.Code() is double.StatusCode.ERR_INVALID_ARGS
    with pytest.raises(RuntimeError, match="batchSize"):
        engines.source.batch_write([engines.mine], [], [engines.theirs], [[0]], [[1]], [uid])
    with pytest.raises(RuntimeError):
        double.EngineDesc.unpack(b"garbage")


def test_an_engine_that_ended_is_a_failure_of_the_peer(engines: Engines) -> None:
    assert engines.ends()[0] is double.StatusCode.SUCCESS
    assert engines.source.pop_peer_failure() is None
    del engines.sink
    wait_until(lambda: bool(engines.source._core.failures))
    event = engines.source.pop_peer_failure()
    assert event is not None
    assert (event.remote_engine_key, event.reason) == ("b", double.PeerFailureReason.PEER_UNREACHABLE)
    assert engines.ends() == (double.StatusCode.ERR_RDMA_OP, "the peer has failed")


def make(**options: Any) -> MoriTransport:
    made = create("mori", **{"part": DOUBLE, "trusted_fabric": True, **options})
    assert isinstance(made, MoriTransport)
    return made


@pytest.fixture
def sides() -> Iterator[Sides]:
    with Side(make(), 1) as source, Side(make(), 2) as sink:
        yield source, sink


def failure(sides: Sides, peer: int) -> str:
    error = sides[0].transport.submit(peer, block(*sides, PAGE), b"").exception(10)
    assert isinstance(error, TransportError)
    return str(error)


def test_a_failed_status_is_an_error_with_its_words(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    source, sink = sides
    peer = source.transport.connect(sink.transport.describe())
    with monkeypatch.context() as patch:
        code = double.StatusCode.ERR_RDMA_OP
        patch.setattr(double._Core, "_carry_out", lambda _, work: work.status.Update(code, "retry counter exceeded"))
        assert failure(sides, peer) == f"mori could not write to the peer ({code}): retry counter exceeded"
    assert (sink.bytes == 2).all()
    assert source.transport.submit(peer, block(source, sink, PAGE), b"").result(10) == PAGE


def test_one_bad_status_among_several_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch between pairs of pieces, the first of which is refused.

    A GPU's pieces stay apart even where they touch.
    """
    memory = np.arange(4 * PAGE, dtype=np.uint8)
    address, ends = int(memory.ctypes.data), [make(), make()]
    for at, end in enumerate(ends):
        end.register([MemoryRange(address + (2 * at + half) * PAGE, PAGE, "cuda:0") for half in range(2)])
    real = double.IOEngine._write

    def refuse_first(engine: double.IOEngine, local: double.MemoryDesc, *rest: Any) -> None:
        if local.data == address:
            raise double._Refused(double.StatusCode.ERR_BAD_STATE, "not this one")
        real(engine, local, *rest)

    blocks = Blocks(u64([address, address + PAGE - 4]), u64([address + 2 * PAGE, address + 3 * PAGE - 8]), u64([8, 8]))
    peer = ends[0].connect(ends[1].describe())
    with monkeypatch.context() as patch:
        patch.setattr(double.IOEngine, "_write", refuse_first)
        assert "not this one" in str(ends[0].submit(peer, blocks, b"").exception(10))
    assert ends[0].submit(peer, blocks, b"").result(10) == 16
    assert np.array_equal(memory[2 * PAGE :][:8], memory[:8])
    assert np.array_equal(memory[3 * PAGE - 8 : 3 * PAGE], memory[PAGE - 4 : PAGE + 4])
    for end in ends:
        end.close()


def test_a_transfer_that_a_failed_peer_never_ends_is_given_up(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    """mori may lose completions with the peer; the status object stays, because mori may still write to it."""
    source, sink = sides
    peer = source.transport.connect(sink.transport.describe())
    engine: Any = source.transport._engine
    monkeypatch.setattr(mori_module, "_GRACE_S", 0.05)

    def lose(core: Any, work: Any) -> None:
        reason = double.PeerFailureReason.LOCAL_CQ_ERROR
        core.failures.append(double.PeerFailureEvent(work.peer.desc.key, reason, detail="IBV_EVENT_CQ_ERR"))
        core.failures.append(double.PeerFailureEvent("", reason, detail="of a device, not of this peer"))

    with monkeypatch.context() as patch:
        patch.setattr(double._Core, "_carry_out", lose)
        words = "mori: a transfer in flight was abandoned (PeerFailureReason.LOCAL_CQ_ERROR, IBV_EVENT_CQ_ERR)"
        assert failure(sides, peer) == words
    assert len(engine._given_up) == 1
    assert source.transport.submit(peer, block(source, sink, PAGE), b"").result(10) == PAGE  # registered again


def test_close_gives_up_what_does_not_end(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    source, sink = sides
    peer = source.transport.connect(sink.transport.describe())
    under_way = threading.Event()
    monkeypatch.setattr(double._Core, "_carry_out", lambda *_: under_way.set())
    begun = source.transport.submit(peer, block(source, sink, PAGE), b"")
    assert under_way.wait(10)
    start_s = time.monotonic()
    source.transport.close()
    assert time.monotonic() - start_s < 10
    assert "abandoned (this transport closes)" in str(begun.exception(0))


def test_a_failure_is_told_before_the_next_write(sides: Sides) -> None:
    source, sink = sides
    peer = source.transport.connect(sink.transport.describe())
    engine: Any = source.transport._engine
    assert source.transport.submit(peer, block(source, sink, PAGE), b"").result(10) == PAGE
    (known,) = engine._engine._core.peers.values()
    event = double.PeerFailureEvent(
        known.desc.key, double.PeerFailureReason.LOCAL_QP_ERROR, detail="IBV_EVENT_QP_FATAL"
    )
    engine._engine._core.failures.append(event)
    assert failure(sides, peer).startswith("mori: the peer has failed (PeerFailureReason.LOCAL_QP_ERROR, IBV_EVENT_QP")
    assert source.transport.submit(peer, block(source, sink, PAGE), b"").result(10) == PAGE  # registered again


def test_settings_are_mori_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[Any] = []
    monkeypatch.setattr(double.IOEngine, "create_backend", lambda *args: configs.append(args[2]))
    monkeypatch.setattr(double.IOEngine, "register_memory", lambda *args: double.MemoryDesc("", 1, -1, 1, 1, args[4]))
    chosen = {"qp_per_transfer": 4, "num_nics_per_transfer": 2, "poll_cq_mode": "event"}
    for options in ({}, {"settings": chosen}, {"backend": "xgmi", "settings": {"num_streams": 8}}):
        transport = make(**options)
        transport.register([MemoryRange(4096, 1, "cuda:0")])
        transport.close()
    plain, tuned, xgmi = configs
    assert (plain.qp_per_transfer, plain.post_batch_size, plain.enable_notification) == (1, -1, False)
    assert (tuned.qp_per_transfer, tuned.num_nics_per_transfer) == (4, 2)
    assert tuned.poll_cq_mode is double.PollCqMode.EVENT
    assert not tuned.enable_notification
    assert (xgmi.num_streams, xgmi.num_events) == (8, 64)


@pytest.mark.parametrize("settings", [{"qps": 1}, {"qp_per_transfer": "4"}, {"poll_cq_mode": "often"}])
def test_settings_that_mori_does_not_have_are_refused(settings: dict[str, Any]) -> None:
    ((field, value),) = settings.items()
    with pytest.raises(ConfigurationError, match=f"mori cannot be set to {field}={value!r} for RDMA"):
        make(settings=settings)


def test_a_backend_that_does_not_start_is_one_error() -> None:
    transport = make(settings={"num_nics_per_transfer": 0})
    with pytest.raises(ConfigurationError, match="mori cannot use this memory through RDMA: numNicsPerTransfer must"):
        transport.register([MemoryRange(4096, 1)])
    transport.close()
    with pytest.raises(ConfigurationError, match="backend='tcp' is not supported: choose rdma or xgmi"):
        make(backend="tcp")
    unreachable = make(host="203.0.113.1")  # an address that no machine has
    with pytest.raises(ConfigurationError, match=r"cannot listen on 203\.0\.113\.1"):
        unreachable.register([MemoryRange(4096, 1)])
    unreachable.close()


def test_xgmi_moves_gpu_memory_only() -> None:
    memory = np.arange(2 * PAGE, dtype=np.uint8)
    address, ends = int(memory.ctypes.data), [make(backend="xgmi") for _ in range(2)]
    for at, end in enumerate(ends):
        end.register([MemoryRange(address + at * PAGE, PAGE, f"cuda:{at}")])
    blocks = Blocks(u64([address]), u64([address + PAGE + 8]), u64([100]))
    assert ends[0].submit(ends[0].connect(ends[1].describe()), blocks, b"").result(10) == 100
    assert np.array_equal(memory[PAGE + 8 : PAGE + 108], memory[:100])
    descs = [each for end in ends for each in vars(end._engine)["_memory"]]
    assert [(each.device_id, each.loc) for each in descs] == [(at, double.MemoryLocationType.GPU) for at in range(2)]
    with Side(make(), 0) as other, pytest.raises(TransportError, match="this side uses RDMA and the peer XGMI"):
        other.transport.connect(ends[0].describe())
    for end in ends:
        end.close()
    with pytest.raises(ConfigurationError, match="mori moves cuda memory only, but a region lies on 'cpu'"):
        Side(make(backend="xgmi"), 0)


def test_a_killed_process_is_a_failure_of_the_peer() -> None:
    serve = (
        f"import numpy as np, {DOUBLE} as d\n"
        "memory, engine = np.zeros(4096, np.uint8), d.IOEngine('peer', d.IOEngineConfig('127.0.0.1', 0))\n"
        "engine.create_backend(d.BackendType.RDMA)\n"
        "desc = engine.register_memory(memory.ctypes.data, 4096, -1, d.MemoryLocationType.CPU)\n"
        "print(engine.get_engine_desc().pack().hex(), desc.pack().hex(), flush=True)\n"
        "input()\n"
    )
    engines = Engines()
    with subprocess.Popen(
        [sys.executable, "-c", serve], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as peer:
        assert peer.stdout is not None
        engine, theirs = (bytes.fromhex(each) for each in peer.stdout.readline().split())
        engines.source.register_remote_engine(double.EngineDesc.unpack(engine))
        memory = double.MemoryDesc.unpack(theirs)
        assert engines.ends(theirs=memory)[0] is double.StatusCode.SUCCESS
        peer.kill()
        wait_until(lambda: bool(engines.source._core.failures))
        event = engines.source.pop_peer_failure()
        assert event is not None
        assert event.remote_engine_key == "peer"
        assert engines.ends(theirs=memory)[0] is double.StatusCode.ERR_RDMA_OP


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    yield hosts
    hosts.close()


@pytest.mark.skipif(bool(MISSING), reason=f"mori cannot run here: {'; '.join(each.what for each in MISSING)}")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_mori_itself_passes_the_conformance_suite(check: Check, hosts: Hosts) -> None:
    try:
        run(check, Case("mori"), hosts)
    except Skipped as reason:
        pytest.skip(str(reason))
