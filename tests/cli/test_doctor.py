"""`kvroom doctor` on this machine, between two machines, against a real worker, and with reports it cannot read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvroom.cli import main
from kvroom.cli.doctor import Document, between_lines, report_lines
from kvroom.cli.ports import free_port
from kvroom.transports import REGISTRY
from kvroom.transports.kit.machine import Process, this_machine
from kvroom.transports.kit.probing import Missing
from kvroom.transports.selection.choice import TransportReport, Verdict
from kvroom.transports.selection.doctor import FORMAT, AutoChoice, Between, Machine, MachineReport, between, examine
from serve.helpers import environment, get, look, run, running

LOOPBACK = "127.0.0.1"
CAUTION = "transport fake moves no bytes: the decode side's pages keep the content that they had before"

PLAIN = Machine(
    host="one", boot="boot-1", pid_namespace=1, uid=1000, kernel="6.1", python="3.11.7", kvroom="0.1.0", cores=8,
    rdma_devices=(), nvidia_gpus=0, amd_gpus=0, ascend_npus=0, yama_scope=1, memlock_bytes=8 << 20,
    transparent_huge_pages="madvise", huge_pages=0, shm_bytes=2 << 30, shm_free_bytes=1 << 30,
)  # fmt: skip
LOCAL = TransportReport("local", "yes", True, True, "machine", "kvroom", "", ("cpu",), False, (), ())
RAILS = TransportReport("nixl", "yes", True, False, "network", "nixl-cu12 1.5.1", "", ("cpu", "cuda"), True, (), ())
TCP = TransportReport("tcp", "yes", True, True, "network", "kvroom", "", ("cpu",), False, (), ())
MEMORY = TransportReport("memory", "yes", False, False, "process", "kvroom", "", ("cpu",), False, (), ())
DOUBLE = "a double imitates hardware that is not here, for tests only; it moves no production traffic"
ABSENT = (Missing("the Python package nixl-cu12", "package", "pip install nixl-cu12"),)


def report(*rows: TransportReport, **changes: Any) -> MachineReport:
    return MachineReport(machine=msgspec.structs.replace(PLAIN, **changes), transports=rows, choices=())


def but(row: TransportReport, **changes: Any) -> TransportReport:
    return msgspec.structs.replace(row, **changes)


def compared(one: MachineReport, other: MachineReport) -> Between:
    return between(("a", "b"), (one, other))


def test_it_lists_every_transport_and_what_auto_would_take() -> None:
    done = run("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    listed = lines[lines.index("transports, in the order in which `auto` prefers them:") :]
    assert [line.split()[0] for line in listed if line.startswith("  ") and line[2] != " "][: len(REGISTRY) - 1] == [
        name for name in REGISTRY if name != "auto"
    ]
    assert "`auto` for host memory: local within this machine, " in done.stdout
    assert "this machine:" in lines
    assert [line.partition(": ")[2] for line in lines if "double for tests: kvroom_lab" in line] == [
        "kvroom_lab.doubles.memfabric_hybrid", "kvroom_lab.doubles.mori_io",
    ]  # fmt: skip


def test_json_is_the_same_as_one_document() -> None:
    done = run("doctor", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["format"] == FORMAT
    me = Process.current()
    assert [found["machine"][name] for name in ("boot", "pid_namespace", "uid")] == [me.boot, me.pid_namespace, me.uid]
    assert [row["transport"] for row in found["transports"]] == [name for name in REGISTRY if name != "auto"]
    (host,) = [choice for choice in found["choices"] if choice["memory"] == "cpu"]
    assert host["here"] == "local"
    assert {verdict["transport"] for verdict in host["verdicts"]} == {n for n, entry in REGISTRY.items() if entry.auto}
    again = msgspec.json.decode(done.stdout, type=Document)
    assert msgspec.json.decode(msgspec.json.encode(again)) == found  # nothing is lost in reading


@pytest.mark.parametrize(
    ("stated", "line"),
    [
        ({"KVROOM_MACHINE_ID": "the UID of a node"}, "  identity       known to peers"),
        ({}, "  identity       not known to peers, so a reboot proves nothing to them: set KVROOM_MACHINE_ID"),
    ],
)
def test_it_says_if_peers_know_this_machine(stated: dict[str, str], line: str) -> None:
    known = bool(stated) or bool(this_machine())
    assert (line in run("doctor", **stated).stdout.splitlines()) == (known == bool(stated))
    assert json.loads(run("doctor", "--json", **stated).stdout)["identified"] == known


def test_what_it_says_it_says_of_the_same_machine_again() -> None:
    found = examine()
    assert found.machine.memory_kinds()[0] == "cpu"
    assert [choice.memory for choice in found.choices] == list(found.machine.memory_kinds())
    assert report_lines(found)


def test_the_first_lines_are_the_verdict() -> None:
    first, second, third, *others = run("doctor").stdout.splitlines()
    assert first == "this machine can hand over KV caches: local within this machine, tcp to other machines"
    assert second == "it can run: kvroom up, kvroom demo"
    assert third == "it cannot run: vLLM pairs (vLLM is not installed), SGLang pairs (SGLang is not installed)"
    explained = others.index(f"({DOUBLE})")
    assert explained < next(number for number, line in enumerate(others) if "double for tests" in line)


HIDDEN = """
import sys

class Hidden:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "nixl_cu12" else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
from kvroom.cli import main
sys.exit(main(sys.argv[1:]))
"""


def hidden(*arguments: str) -> str:
    """Return the output of `kvroom` in a process that cannot find NIXL's package."""
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN, *arguments], env=environment(), capture_output=True, text=True, check=True,
        timeout=60,
    )  # fmt: skip
    return done.stdout


def test_a_package_that_is_not_installed_is_named_with_how_to_get_it() -> None:
    (row,) = [row for row in json.loads(hidden("doctor", "--json"))["transports"] if row["transport"] == "nixl"]
    assert row["runs"] == "no"
    assert {"what": ABSENT[0].what, "kind": ABSENT[0].kind, "remedy": ABSENT[0].remedy} in row["missing"]
    said = hidden("doctor")
    assert f"missing (package): {ABSENT[0].what}; get it: {ABSENT[0].remedy}" in said
    assert "nixl      not chosen: it cannot run: missing the Python package nixl-cu12" in said


def test_it_needs_none_of_the_optional_packages() -> None:
    looking = "import sys; from kvroom.cli import main; assert main(['doctor']) == 0; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", looking], capture_output=True, text=True, check=True, timeout=60)
    assert not {"rich", "torch", "transformers", "prometheus_client"} & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("changes", "together", "taken", "refused"),
    [
        ({}, "the same machine, container and user", "local", None),
        ({"boot": "boot-2"}, "two machines", "tcp", "these are two machines"),
        (
            {"pid_namespace": 2}, "two containers (pid namespaces) of one machine", "tcp",
            "these are two containers (pid namespaces) of one machine",
        ),
        (
            {"uid": 0}, "two users (uid 1000 and 0) of one machine", "tcp",
            "these are two users (uid 1000 and 0) of one machine",
        ),
    ],
)  # fmt: skip
def test_the_same_machine_container_and_user_make_it_local(
    changes: dict[str, Any], together: str, taken: str, refused: str | None
) -> None:
    found = compared(report(LOCAL, TCP, MEMORY), report(LOCAL, TCP, MEMORY, **changes))
    assert found.together == together
    assert [(way.writer, way.reader, way.memory, way.transport) for way in found.ways] == [
        ("a", "b", "cpu", taken),
        ("b", "a", "cpu", taken),
    ]
    pairings = {pairing.transport: (pairing.works, pairing.reason) for pairing in found.pairings}
    assert pairings["local"] == ((True, "") if refused is None else (False, refused))
    assert pairings["tcp"] == (True, "")
    assert pairings["memory"] == (False, "both ends must be in one process")
    assert found.ways[0].passed_over == (() if refused is None else (f"local: {refused}",))


def test_what_only_one_side_has_is_not_taken_and_each_direction_says_why() -> None:
    plain = but(RAILS, fast=False)
    found = compared(report(LOCAL, RAILS, TCP), report(LOCAL, plain, TCP, boot="boot-2"))
    assert [(way.writer, way.transport, way.passed_over[1:]) for way in found.ways] == [
        ("a", "tcp", ("nixl: on b no RDMA or NVLink here, so it would be slower than local and tcp",)),
        ("b", "tcp", ("nixl: on b no RDMA or NVLink here, so it would be slower than local and tcp",)),
    ]
    assert compared(report(RAILS, TCP), report(RAILS, TCP, boot="boot-2")).ways[0].transport == "nixl"
    lacks = compared(report(RAILS, TCP), report(but(RAILS, runs="no", missing=ABSENT), TCP))
    assert lacks.pairings[0].reason == "it cannot run on b: missing the Python package nixl-cu12"
    assert lacks.ways[0].transport == "tcp"
    unknown = compared(report(RAILS, TCP), report(TCP))
    assert unknown.pairings[0].reason == "kvroom on b has no such transport"
    assert [way.transport for way in unknown.ways] == ["tcp", "tcp"]
    assert compared(report(TCP), report(RAILS, TCP)).ways[1].passed_over == ("nixl: kvroom on a has no such transport",)


def test_memory_of_gpus_is_compared_where_both_have_some() -> None:
    found = compared(report(RAILS, TCP, nvidia_gpus=8), report(RAILS, TCP, amd_gpus=4))
    assert [(way.memory, way.transport) for way in found.ways] == [
        ("cpu", "nixl"), ("cpu", "nixl"), ("cuda", "nixl"), ("cuda", "nixl"),
    ]  # fmt: skip
    assert [way.memory for way in compared(report(TCP, ascend_npus=1), report(TCP)).ways] == ["cpu", "cpu"]


def test_different_versions_of_a_part_are_to_be_minded() -> None:
    (pairing,) = compared(report(RAILS), report(but(RAILS, part="nixl-cu12 1.4.0"))).pairings
    assert (pairing.works, pairing.reason) == (True, "the versions differ: nixl-cu12 1.5.1 and nixl-cu12 1.4.0")


def saved(directory: Path, name: str, found: MachineReport) -> str:
    path = directory / name
    path.write_bytes(msgspec.json.encode(found))
    return str(path)


def test_two_files_are_compared(tmp_path: Path) -> None:
    one = saved(tmp_path, "one.json", report(LOCAL, TCP))
    other = saved(tmp_path, "other.json", report(LOCAL, TCP, host="two", boot="boot-2"))
    done = run("doctor", "--between", one, other)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{one} (one) and {other} (two): two machines" in done.stdout
    assert f"{other} -> {one}, host memory: `auto` takes tcp" in done.stdout
    as_json = run("doctor", "--between", one, other, "--json")
    found = msgspec.json.decode(as_json.stdout, type=Between)
    assert (found.names, found.machines, as_json.returncode) == ((one, other), ("one", "two"), 0)


def test_without_a_transport_between_them_the_status_is_1(tmp_path: Path) -> None:
    one = saved(tmp_path, "one.json", report(LOCAL))
    other = saved(tmp_path, "other.json", report(LOCAL, boot="boot-2"))
    done = run("doctor", "--between", one, other)
    assert done.returncode == 1
    assert f"{one} -> {other}, host memory: `auto` takes nothing\n  not local: these are two machines" in done.stdout


def test_where_auto_could_choose_nothing_the_status_is_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = AutoChoice("cpu", None, None, (Verdict("tcp", False, "it cannot run: missing a network"),))
    monkeypatch.setattr("kvroom.cli.doctor.examine", lambda _: msgspec.structs.replace(report(TCP), choices=(nothing,)))
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "`auto` for host memory: nothing within this machine, nothing to other machines" in said
    assert "  tcp       not chosen: it cannot run: missing a network" in said


def test_a_worker_answers_for_its_process(model_dir: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text(run("doctor", "--json").stdout)
    secret = "not to be told to anybody who asks"
    with running(
        "decode", "--model", str(model_dir), "--pages", "64", "--page-tokens", "4", KVROOM_SECRET=secret
    ) as one:
        answer = look(one.url, "/doctor")
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        assert msgspec.json.decode(answer.text, type=MachineReport).machine.boot == Process.current().boot
        assert secret not in answer.text
        assert str(model_dir) not in answer.text
        bare = one.url.removeprefix("http://")
        for source in (one.url, f"{one.url}/", bare):
            done = run("doctor", "--between", source, str(mine))
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.startswith(f"{source} (")
            assert "): the same machine, container and user" in done.stdout
        info = get(one.url, "/server_info").json()
        assert (info["transport"], info["transport_caution"]) == ("auto", "")


def test_a_worker_over_fake_says_so(model_dir: Path) -> None:
    sizes = ("--pages", "64", "--page-tokens", "4")
    with running("prefill", "--model", str(model_dir), *sizes, "--transport", "fake", KVROOM_SECRET="x" * 32) as one:
        info = get(one.url, "/server_info").json()
        assert (info["transport"], info["transport_caution"]) == ("fake", CAUTION)
        _, said = one.end()
    assert said.count(CAUTION) == 1


def refused(*arguments: str) -> str:
    """Run the doctor, which has to end with status 2, and return its only error line."""
    done = run("doctor", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    return line.removeprefix("kvroom doctor: error: ")


def test_what_cannot_be_read_is_one_line_with_a_remedy(tmp_path: Path, stranger: str) -> None:
    good = saved(tmp_path, "good.json", report(TCP))
    nowhere = str(tmp_path / "nowhere.json")
    assert refused("--between", good, nowhere) == (
        f"--between '{nowhere}' cannot be read: there is no such file; give a file with the output of `kvroom doctor "
        "--json`, or the URL of a worker, as in http://127.0.0.1:8000"
    )
    assert "cannot be read: Is a directory; give a file" in refused("--between", str(tmp_path), good)
    closed = f"http://{LOOPBACK}:{free_port(LOOPBACK)}"
    said = refused("--between", closed, good)
    assert said.startswith(f"--between {closed}: no answer: ")
    assert said.endswith("is the worker up?")
    assert refused("--between", good, "http://x:y") == (
        "--between 'http://x:y' has a port that is not a number in [0, 65536), 'y': write a URL, for example "
        "http://10.0.0.1:8000 or http://[fd00::1]:8000"
    )
    assert refused("--between", good, stranger) == (
        f"--between {stranger} answered 404: 'no such page'; is it a kvroom worker that supports /doctor?"
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("hello", "is not the output of `kvroom doctor --json`: JSON is malformed"),
        ("[]", "is not the output of `kvroom doctor --json`: Expected `object`"),
        ('{"open": []}', "is not the output of `kvroom doctor --json`: Object missing required field `format`"),
        ('{"format": 1}', "is not the output of `kvroom doctor --json`: Object missing required field `machine`"),
        ('{"format": 2}', "has document format 2, but this version of kvroom reads format 1; run `kvroom doctor"),
    ],
)
def test_what_is_no_report_is_named(tmp_path: Path, body: str, said: str) -> None:
    path = tmp_path / "junk.json"
    path.write_text(body)
    assert refused("--between", str(path), str(path)).startswith(f"--between {path} {said}")


def test_one_argument_is_not_two() -> None:
    done = run("doctor", "--between", "one")
    assert done.returncode == 2
    assert "expected 2 arguments" in done.stderr


def test_a_report_from_elsewhere_sends_no_control_codes_to_the_terminal() -> None:
    wicked = report(but(TCP, part="\x1b[2Jgone", notes=("two\nlines",)), host="\x1b]0;title\x07")
    lines = [*report_lines(wicked), *between_lines(compared(wicked, wicked))]
    assert all(line.isprintable() for line in lines)
    assert any("?[2Jgone" in line for line in lines)


def test_a_double_and_other_kinds_of_memory_are_shown_as_such() -> None:
    double = but(TCP, transport="mori", runs="double", missing=ABSENT, double="kvroom_lab.doubles.mori_io")
    said = "\n".join(report_lines(report(double, yama_scope=None, memlock_bytes=None, shm_bytes=None)))
    assert "  mori      double  kvroom; moves cpu memory to any machine" in said
    assert "double for tests: kvroom_lab.doubles.mori_io" in said
    assert "locked memory  no limit" in said
    assert "Yama scope     not in this kernel" in said
    assert "/dev/shm       not mounted" in said
