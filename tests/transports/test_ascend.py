"""`ascend`: its treatment of memfabric's results, its double, and the real wheel's errors where there is no NPU."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transport_helpers import PAGE, Side, block

from kvroom.errors import ConfigurationError, TransportError
from kvroom.plan.blocks import Blocks, MemoryRange
from kvroom.transports import create, probe
from kvroom.transports.kit.probing import installed_doubles
from kvroom.transports.kit.ranges import u64
from kvroom.transports.onesided import ascend as ascend_module
from kvroom.transports.onesided import mooncake
from kvroom.transports.onesided.ascend import AscendTransport
from kvroom_lab.doubles import memfabric_hybrid as double

DOUBLE = double.__name__
INSTALLED = importlib.util.find_spec("memfabric_hybrid") is not None
needs_wheel = pytest.mark.skipif(not INSTALLED, reason="memfabric-hybrid is not installed")
OK, FAILED, INVALID = 0, -1, -2000

ASK_REAL = """
import json, memfabric_hybrid as real
def docs(owner):
    return {name: getattr(owner, name).__doc__ for name in dir(owner) if callable(getattr(owner, name))}
kinds = {name: int(member) for name, member in real.TransDataOpType.__members__.items()}
found = {"module": docs(real), "engine": docs(real.TransferEngine), "kinds": kinds}
print("\\n" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return the real module's docstrings, in which pybind11 puts the signature first, and an enum's members."""
    where = tmp_path_factory.mktemp("memfabric")
    done = subprocess.run([sys.executable, "-c", ASK_REAL], cwd=where, capture_output=True, text=True, check=True)
    reported: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return reported


def reported_arguments(docstring: str) -> list[tuple[str, str | None]]:
    """Return names and defaults in the first line of such a docstring; an enum's default is written <Kind.NAME: 1>."""
    line = re.sub(r"<(\w+\.\w+): \d+>", r"\1", docstring.splitlines()[0])
    function = ast.parse(f"def {line}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    names = [argument.arg for argument in function.args.args]
    defaults: list[str | None] = [ast.unparse(default) for default in function.args.defaults]
    return list(zip(names, [None] * (len(names) - len(defaults)) + defaults, strict=True))


def arguments(function: Any) -> list[tuple[str, str | None]]:
    def text(default: Any) -> str | None:
        if default is inspect.Parameter.empty:
            return None
        is_kind = isinstance(default, double.TransDataOpType)
        return f"{type(default).__name__}.{default.name}" if is_kind else repr(default)

    return [(name, text(each.default)) for name, each in inspect.signature(function).parameters.items()]


def public(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if not name.startswith("_") and inspect.isroutine(value)}


@needs_wheel
def test_the_double_has_the_signatures_of_the_real_module(real: dict[str, dict[str, Any]]) -> None:
    mine = {name: each for name, each in public(double).items() if each.__module__ == DOUBLE}
    assert len(mine) == 4
    for name, function in mine.items():
        assert arguments(function) == reported_arguments(real["module"][name]), name
    methods = public(double.TransferEngine)
    assert len(methods) == 8
    for name, function in methods.items():
        assert arguments(function) == reported_arguments(real["engine"][name]), name
    assert {kind.name: kind.value for kind in double.TransDataOpType} == real["kinds"]


@needs_wheel
def test_all_that_the_transport_calls_is_there(real: dict[str, dict[str, Any]]) -> None:
    used = {
        node.attr
        for module in (ascend_module, mooncake)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in ("module", "self._module", "engine", "session.engine", "self._served")
    }
    of_mooncake = {"batch_transfer_async_write", "get_batch_transfer_status"}
    assert used > of_mooncake | {"TransferEngine", "batch_transfer_sync_write", "unInitialize", "get_rpc_port"}
    assert (used - of_mooncake) <= real["module"].keys() | real["engine"].keys()
    assert set(ascend_module._KINDS) == set(real["kinds"])


TRY_REAL = """
import os, sys, numpy as np
from kvroom.errors import ConfigurationError
from kvroom.plan.blocks import MemoryRange
from kvroom.transports import create
from kvroom.transports.onesided import ascend
import memfabric_hybrid
def held():
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
memory = np.zeros(4096, np.uint8)
before = held()
for _ in range(20):
    transport = create("ascend", data_op_type="HOST_RDMA", trusted_fabric=True)
    try:
        transport.register([MemoryRange(memory.ctypes.data, memory.nbytes)])
    except ConfigurationError as error:
        print(error, file=sys.stderr)
    transport.close()
assert held() == before, (before, held())
assert not ascend._engines
print("healthy", file=sys.stderr)
"""


@needs_wheel
@pytest.mark.skipif(not probe("ascend").missing, reason="there is an NPU: the wheel does not refuse")
def test_the_real_wheel_refuses_without_a_driver_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", TRY_REAL], cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    assert (done.returncode, lines[-1]) == (0, "healthy"), done.stderr
    assert len(lines) == 21
    assert set(lines[:-1]) == {
        "ascend: memfabric cannot start an engine at 127.0.0.1 for HOST_RDMA (code -1, no message; see its "
        "output): install the Ascend driver and CANN, and give this container the NPU's device files (/dev/davinci*)"
    }
    assert not list(tmp_path.iterdir())


def test_the_finding_says_what_is_missing() -> None:
    finding = probe("ascend")
    assert installed_doubles()["ascend"] == DOUBLE
    assert finding.fast == finding.runs
    kinds = {missing.kind for missing in finding.missing}
    assert ("device" in kinds) == (not any(Path("/dev").glob("davinci[0-9]*")))
    assert ("package" in kinds) == (not INSTALLED)


class Engines:
    """An engine that serves, one that writes, and a registered page of each."""

    def __init__(self) -> None:
        self.memory = np.arange(4 * PAGE, dtype=np.uint8)
        self.address = int(self.memory.ctypes.data)
        self.sink, self.source = double.TransferEngine(), double.TransferEngine()
        assert self.sink.initialize("tcp://", "127.0.0.1", "Decode", 0) == OK
        assert self.source.initialize("tcp://", "127.0.0.1", "Prefill", 0) == OK
        assert self.source.register_memory(self.address, PAGE) == OK
        assert self.sink.batch_register_memory([self.at(2), self.at(3)], [PAGE, PAGE]) == OK
        self.session = f"127.0.0.1:{self.sink.get_rpc_port()}"

    def at(self, page: int) -> int:
        return self.address + page * PAGE

    def write(self, src: int, dst: int, nbytes: int = 100) -> int:
        before = self.memory.copy()
        code = self.source.batch_transfer_sync_write(self.session, [src], [dst], [nbytes])
        if code == OK:
            before[dst - self.address :][:nbytes] = before[src - self.address :][:nbytes]
        assert np.array_equal(self.memory, before)
        return code


@pytest.fixture
def engines() -> Iterator[Engines]:
    made = Engines()
    yield made
    made.source.destroy()
    made.sink.destroy()
    made.sink.unInitialize()


def test_the_double_writes_registered_memory_only(engines: Engines) -> None:
    assert engines.write(engines.address, engines.at(2) + 7) == OK
    assert engines.write(engines.at(1) - 99, engines.at(2)) == INVALID
    assert double.get_last_err_msg() == "local address is not registered"
    assert engines.write(engines.address, engines.at(1)) == INVALID
    assert double.get_and_clear_last_err_msg() == "remote address is not registered"
    assert double.get_last_err_msg() == ""
    assert engines.write(engines.address, engines.at(3) - 50) == INVALID  # the write spans two pieces
    assert engines.sink.unregister_memory(engines.at(2)) == OK
    assert engines.sink.unregister_memory(engines.at(2)) == INVALID
    assert engines.write(engines.address, engines.at(2)) == INVALID
    assert engines.write(engines.address, engines.at(3)) == OK


def test_the_double_refuses_what_is_no_list_of_blocks(engines: Engines) -> None:
    write, address = engines.source.batch_transfer_sync_write, engines.address
    assert write(engines.session, [address, address], [engines.at(2)], [1]) == FAILED
    wrongs: tuple[Any, ...] = ([-1], [2**64], [1.5], ["1"])
    for wrong in wrongs:
        with pytest.raises(TypeError):
            write(engines.session, [address], [engines.at(2)], wrong)
    assert engines.sink.batch_register_memory([engines.address], []) == FAILED
    assert engines.sink.register_memory(engines.address, 0) == INVALID


def test_the_double_refuses_who_is_not_initialised(engines: Engines) -> None:
    fresh = double.TransferEngine()
    assert fresh.get_rpc_port() == 0
    assert fresh.register_memory(engines.address, PAGE) == OK  # only noted
    assert fresh.batch_transfer_sync_write(engines.session, [engines.address], [engines.at(2)], [1]) == FAILED
    assert fresh.initialize("tcp://", "127.0.0.1", "both", 0) == FAILED
    assert engines.sink.batch_transfer_sync_write(engines.session, [engines.at(2)], [engines.at(3)], [1]) == FAILED
    engines.sink.unInitialize()  # applies to the whole process
    assert engines.write(engines.address, engines.at(2)) == FAILED
    assert double.get_last_err_msg() == "smem trans not initialized yet"


def test_the_double_refuses_sessions_that_are_not_there(engines: Engines) -> None:
    assert engines.source.batch_transfer_sync_write("127.0.0.1:1", [engines.address], [engines.at(2)], [1]) == FAILED
    assert "127.0.0.1:1" in double.get_last_err_msg()
    assert engines.source.batch_transfer_sync_write("nowhere", [engines.address], [engines.at(2)], [1]) == FAILED
    assert engines.write(engines.address, engines.at(2)) == OK
    engines.sink.destroy()
    assert engines.write(engines.address, engines.at(2)) == FAILED


def test_the_double_takes_a_store_of_its_own() -> None:
    assert double.create_config_store("tcp://127.0.0.1:0") == OK
    assert double.create_config_store("tcp://127.0.0.1:none") == INVALID


def make(**options: Any) -> AscendTransport:
    made = create("ascend", **{"part": DOUBLE, "data_op_type": "HOST_RDMA", "trusted_fabric": True, **options})
    assert isinstance(made, AscendTransport)
    return made


@pytest.fixture
def pair() -> Iterator[tuple[Side[AscendTransport], Side[AscendTransport]]]:
    with Side(make(), 1) as source, Side(make(), 2) as sink:
        yield source, sink


def test_a_code_of_memfabric_is_an_error_with_its_words(
    pair: tuple[Side[AscendTransport], Side[AscendTransport]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, sink = pair
    peer = source.transport.connect(sink.transport.describe())
    with monkeypatch.context() as patch:
        patch.setattr(double.TransferEngine, "_write", lambda *_: double._library.refuse("the link is down", -7))
        failure = source.transport.submit(peer, block(source, sink, PAGE), b"").exception(10)
    assert isinstance(failure, TransportError)
    assert re.fullmatch(r"ascend could not write to 127\.0\.0\.1:\d+ \(code -7, 'the link is down'\)", str(failure))
    assert (sink.bytes == 2).all()
    assert source.transport.submit(peer, block(source, sink, PAGE), b"").result(10) == PAGE


def libraries() -> int:
    """Return how many libraries are initialised in this process: one or none."""
    return int(double._library.initialised)


def test_the_library_ends_with_its_last_engine() -> None:
    with Side(make(), 1) as source:
        with Side(make(), 2) as sink:
            peer = source.transport.connect(sink.transport.describe())
            assert source.transport.submit(peer, block(source, sink, PAGE), b"").result(10) == PAGE
            assert len(ascend_module._engines) == 3  # two that serve, one that writes
        assert libraries() == 1
    assert libraries() == 0
    assert not ascend_module._engines


def test_npu_memory_moves_by_sdma_and_host_memory_does_not() -> None:
    memory = np.arange(2 * PAGE, dtype=np.uint8)
    address = int(memory.ctypes.data)
    ends = [make(data_op_type="sdma", device_id=3) for _ in range(2)]
    for at, end in enumerate(ends):
        end.register([MemoryRange(address + at * PAGE, PAGE, "npu:3")])
    blocks = Blocks(u64([address]), u64([address + PAGE + 8]), u64([100]))
    assert ends[0].submit(ends[0].connect(ends[1].describe()), blocks, b"").result(10) == 100
    assert np.array_equal(memory[PAGE + 8 : PAGE + 108], memory[:100])
    for end in ends:
        end.close()
    with pytest.raises(ConfigurationError, match="ascend moves npu memory only, but a region lies on 'cpu'"):
        Side(make(data_op_type="SDMA"), 0)


def test_a_block_may_lie_across_pieces_of_an_npu() -> None:
    """Pieces that touch may be different allocations, so they stay apart; memfabric finds a block in one of them."""
    memory = np.arange(4 * PAGE, dtype=np.uint8)
    address, ends = int(memory.ctypes.data), [make(data_op_type="sdma") for _ in range(2)]
    for at, end in enumerate(ends):
        end.register([MemoryRange(address + (2 * at + half) * PAGE, PAGE, "npu:0") for half in range(2)])
    blocks = Blocks(u64([address + PAGE - 50]), u64([address + 3 * PAGE - 20]), u64([100]))
    assert ends[0].submit(ends[0].connect(ends[1].describe()), blocks, b"").result(10) == 100
    assert np.array_equal(memory[3 * PAGE - 20 : 3 * PAGE + 80], memory[PAGE - 50 : PAGE + 50])
    for end in ends:
        end.close()


def test_both_sides_must_move_bytes_alike(pair: tuple[Side[AscendTransport], Side[AscendTransport]]) -> None:
    words = "this side uses 'HOST_RDMA' and the peer 'DEVICE_RDMA'"
    with Side(make(data_op_type="DEVICE_RDMA"), 3) as other, pytest.raises(TransportError, match=words):
        pair[0].transport.connect(other.transport.describe())


def test_an_engine_that_does_not_start_leaves_nothing_behind() -> None:
    transport = make(host="203.0.113.1")  # an address that no machine has
    with pytest.raises(ConfigurationError, match=r"cannot start an engine at 203\.0\.113\.1.*no available port"):
        transport.register([MemoryRange(4096, 1)])
    transport.close()
    assert not ascend_module._engines


def test_memory_that_memfabric_does_not_take_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(double.TransferEngine, "batch_register_memory", lambda *_: INVALID)
    with pytest.raises(ConfigurationError, match=r"cannot register this memory \(code -2000"):
        Side(make(), 0)
    assert not ascend_module._engines


def test_wrong_options_are_told() -> None:
    with pytest.raises(ConfigurationError, match="data_op_type='TCP' is invalid: choose one of SDMA, HOST_RDMA"):
        make(data_op_type="tcp")
    with pytest.raises(ConfigurationError, match=r"no_such_part cannot be loaded .*: pip install memfabric-hybrid"):
        make(part="no_such_part")


def test_the_environment_of_the_field_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def initialize(engine: object, *arguments: object) -> int:
        asked.extend(arguments)
        return FAILED

    monkeypatch.setattr(double.TransferEngine, "initialize", initialize)
    monkeypatch.setenv("ASCEND_MF_STORE_URL", "tcp://10.0.0.1:24669")
    monkeypatch.setenv("ASCEND_MF_TRANSFER_PROTOCOL", "device_rdma")
    with pytest.raises(ConfigurationError):
        Side(make(data_op_type=None, advertise="10.0.0.2", nic="tcp://10.0.0.2:0"), 0)
    kind = double.TransDataOpType.DEVICE_RDMA
    assert asked == ["tcp://10.0.0.1:24669", "10.0.0.2", "Decode", 0, kind, "Decode", "tcp://10.0.0.2:0"]


def test_a_dead_process_is_a_refusal() -> None:
    """The double's session with a killed process fails; the conformance suite has the transport's own checks."""
    serve = (
        f"import numpy as np, {DOUBLE} as d\n"
        "memory, engine = np.zeros(4096, np.uint8), d.TransferEngine()\n"
        "engine.initialize('tcp://', '127.0.0.1', 'Decode', 0), engine.register_memory(memory.ctypes.data, 4096)\n"
        "print(engine.get_rpc_port(), memory.ctypes.data, flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", serve], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as peer:
        assert peer.stdout is not None
        port, address = peer.stdout.readline().split()
        memory, engine = np.ones(PAGE, np.uint8), double.TransferEngine()
        assert engine.initialize("tcp://", "127.0.0.1", "Prefill", 0) == OK
        assert engine.register_memory(int(memory.ctypes.data), PAGE) == OK
        rows = ([int(memory.ctypes.data)], [int(address)], [PAGE])
        assert engine.batch_transfer_sync_write(f"127.0.0.1:{port}", *rows) == OK
        peer.kill()
        os.waitid(os.P_PID, peer.pid, os.WEXITED | os.WNOWAIT)
        assert engine.batch_transfer_sync_write(f"127.0.0.1:{port}", *rows) == FAILED
        engine.destroy()
        engine.unInitialize()
