"""The soak: thousands of rooms with faults between two processes leave nothing, and it finds every planted leak."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import Pool
from typing import Any

import msgspec
import psutil
import pytest

import sampling
from cli import soak_helpers
from kvroom.cli import main
from kvroom_lab.soak import command as soak
from kvroom_lab.soak.mix import ABORTS, FAULTS, End, Kind, Mix
from kvroom_lab.soak.pool import SoakPool
from kvroom_lab.soak.report import SideReport, combine
from serve.helpers import command, environment, run

OTHER = soak_helpers.OTHER
ROOMS = sampling.amount(4_000, full=20_000)
MIX_1 = Mix(rooms=500)


@pytest.mark.timeout(900)
def test_thousands_of_rooms_with_faults_leave_nothing(pytestconfig: pytest.Config) -> None:
    mix = mix_of_everything(sampling.seed(pytestconfig))
    ended = subprocess.run(
        command(
            "soak", "--rooms", str(mix.rooms), "--seed", str(mix.seed), "--fault-share", str(mix.faults), "--json"
        ),
        env=environment(), text=True, capture_output=True, timeout=800, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(ended.stdout)
    assert found["good"] is True
    assert [found[name] for name in ("unexpected", "wrong_bytes", "rooms_left", "pages_left", "entries_left")] == [
        0
    ] * 5
    assert found["bytes_checked"] > 25_000 * ROOMS
    kinds = found["kinds"]
    assert sum(kinds.values()) == ROOMS
    assert set(kinds) == {kind.title for kind in Kind} - {Kind.MEETING.title, Kind.AGAIN.title}
    for side in found["sides"]:
        must_succeed = sum(count for title, count in kinds.items() if expected(side["side"], title) is End.SUCCESS)
        never = sum(count for title, count in kinds.items() if expected(side["side"], title) is End.NONE)
        assert side["opened"] >= mix.rooms - never
        assert side["opened"] == side["succeeded"] + side["failed"]
        assert side["succeeded"] >= must_succeed - side["excused"]
        assert side["succeeded"] == side["counters"]["succeeded"]
        assert side["unfinished"] == 0
        assert set(side["audit"].values()) == {0}
        assert {"aborted", "cleared", "transfer_broke", "link_lost", "bootstrap_timeout"} <= set(
            side["failed_by_cause"]
        )
        assert len(side["memory"]["tenths"]) == 10
        assert side["leftovers"]["walked"] > 20_000


def mix_of_everything(first_seed: int) -> Mix:
    """Return the first mix with rooms of every kind, in which some rooms time out after the last cut of the link."""
    mixes = (Mix(rooms=ROOMS, seed=seed, faults=0.02) for seed in itertools.count(first_seed))
    return next(mix for mix in mixes if has_everything(mix))


def has_everything(mix: Mix) -> bool:
    drawn = [mix.kind(index) for index in range(ROOMS)]
    times_out = {Kind.PREFILL_NEVER, Kind.DECODE_NEVER} <= set(drawn[3 * ROOMS // 4 :])
    return times_out and Kind.LINK_CUT not in drawn[ROOMS // 2 :] and set(drawn) == {Kind.PLAIN, *dict(ABORTS + FAULTS)}


def expected(side: str, title: str) -> End:
    kind = next(kind for kind in Kind if kind.title == title)
    return kind.source if side == "source" else kind.sink


# -- planted leaks --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def child() -> Iterator[Pool]:
    """Yield a process that runs the functions of `soak_helpers` on one small soak."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        yield process


def good(reports: list[SideReport]) -> bool:
    return combine(soak_helpers.MIX.rooms, soak_helpers.MIX.seed, {}, reports, None).good


def test_where_nothing_is_planted_nothing_is_found(child: Pool) -> None:
    reports = child.apply(soak_helpers.with_nothing)
    assert good(reports), reports


def test_a_page_that_is_never_released_is_found(child: Pool) -> None:
    reports = child.apply(soak_helpers.with_a_page_kept)
    assert [one.pages_left for one in reports] == [0, 1]
    assert not good(reports)


def test_a_room_that_is_never_cleared_is_found(child: Pool) -> None:
    found = child.apply(soak_helpers.with_a_room_kept)[0]
    assert found.rooms_left == 1
    assert found.audit["sources"] == 1
    assert found.leftovers.alive == 2, found.leftovers  # the room and its handle
    assert not found.good


def test_a_wrong_byte_is_reported(child: Pool) -> None:
    reports = child.apply(soak_helpers.with_wrong_bytes)
    assert [one.wrong_bytes for one in reports] == [0, 2]
    assert not good(reports)


@pytest.mark.sampled
@pytest.mark.parametrize("place", soak_helpers.PLACES)
def test_a_leak_anywhere_in_a_manager_is_found_and_named(child: Pool, place: str) -> None:
    found = child.apply(soak_helpers.with_a_leak, (place,))[0]
    assert found.leftovers.entries == 1
    where = found.leftovers.where[0]
    assert f"dict < {place}.planted" in where or f"dict < dict[planted] < {place}" in where
    assert not found.good


@pytest.mark.sampled("what", "holder")
@pytest.mark.parametrize("what", ["number", "generation"])
@pytest.mark.parametrize("holder", soak_helpers.HOLDERS)
def test_the_walk_finds_every_kind_of_holder(child: Pool, holder: str, what: str) -> None:
    found = child.apply(soak_helpers.held_by, (holder, what))
    assert (found.entries, found.alive) == (1, 0), found
    assert "Box.kept" in found.where[0] or "dict[kept] < Box" in found.where[0]


def test_the_walk_finds_what_only_a_running_function_of_another_thread_holds(child: Pool) -> None:
    found = child.apply(soak_helpers.held_by_a_running_function)
    assert found.entries == 1
    assert "hold:last" in found.where[0]


def test_the_walk_finds_rooms_and_handles_without_a_number(child: Pool) -> None:
    assert child.apply(soak_helpers.rooms_and_handles_alive) == [1, 2, 0]


# -- the pool and the mix ---------------------------------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[SoakPool]:
    made = SoakPool(8)
    yield made
    made.close()


def landed(pool: SoakPool, stamp: int, start: int, stop: int) -> list[int]:
    """Return pages into which a transfer has written tokens [start, stop) of a request."""
    written = pool.take(pages := -(-stop // 16))
    pool.write(written, stamp)
    taken = pool.take(pages - start // 16)
    for token in range(start, stop):
        page = taken[token // 16 - start // 16]
        pool._pages[page, :, :, token % 16] = pool._pages[written[token // 16], :, :, token % 16]
    pool.give(written)
    return taken


@pytest.mark.parametrize(("start", "stop"), [(0, 16), (0, 3), (5, 40), (16, 32), (17, 18)])
def test_a_pool_knows_the_bytes_of_a_room_from_all_others(pool: SoakPool, start: int, stop: int) -> None:
    mine, other = MIX_1.request(3).stamp, MIX_1.request(4).stamp
    pages = landed(pool, mine, start, stop)
    pool.check(pages, mine, start, stop)
    assert pool.wrong_bytes == 0
    pool.check(pages, other, start, stop)
    assert pool.wrong_bytes > (stop - start) * 512 * 0.9  # 512 bytes per token; few bytes are equal by chance
    pool.give(pages)
    assert pool.free == pool.total


@pytest.mark.parametrize("place", ["inside", "beside", "guard"])
def test_one_wrong_byte_is_found(pool: SoakPool, place: str) -> None:
    pages = landed(pool, 5, 2, 9)
    token = {"inside": 2, "beside": 9}.get(place)
    if token is None:
        pool._rows[pages[0], -1] ^= 1
    else:
        pool._pages[pages[0], 1, 1, token, 1, 7] ^= 1
    pool.check(pages, 5, 2, 9)
    assert pool.wrong_bytes == 1


def test_what_lands_in_a_free_page_is_found(pool: SoakPool) -> None:
    pages = pool.take(2)
    pool.give(pages)
    pool.check_rest()
    assert pool.wrong_bytes == 0
    pool._pages[pages[1], 0, 0, 3, 0, 0] ^= 1  # a late write
    pool.take(2)
    assert pool.wrong_bytes == 1


def test_what_lands_before_the_first_page_is_found(pool: SoakPool) -> None:
    pool._front[0] ^= 1
    pool.check_rest()
    assert pool.wrong_bytes == 1


def test_a_freed_page_is_the_next_to_be_used(pool: SoakPool) -> None:
    pages = pool.take(2)
    pool.give(pages)
    assert pool.take(2) == pages


def test_both_sides_of_a_mix_agree_and_its_numbers_are_told_from_others() -> None:
    assert [Mix(rooms=500).request(index) for index in range(500)] == [MIX_1.request(index) for index in range(500)]
    assert MIX_1.request(3) != Mix(rooms=500, seed=2).request(3)
    assert MIX_1.owns(MIX_1.number(17))
    assert MIX_1.owns(MIX_1.generation(17))
    assert not any(MIX_1.owns(value) for value in (0, 17, 1 << 40, OTHER.number(17), OTHER.generation(17)))


@pytest.mark.parametrize(("share", "kinds"), [("aborts", ABORTS), ("faults", FAULTS)])
def test_the_shares_are_as_asked(share: str, kinds: Sequence[tuple[Kind, int]]) -> None:
    mix = Mix(rooms=1, **{"aborts": 0.0, "faults": 0.0, share: 0.25})  # type: ignore[arg-type]
    drawn = [mix.kind(index) for index in range(8000)]
    wanted = {kind for kind, _ in kinds}
    assert set(drawn) == wanted | {Kind.PLAIN}
    assert sum(kind in wanted for kind in drawn) == pytest.approx(2000, rel=0.1)


# -- the command ------------------------------------------------------------------------------------------------------


def side_report(name: str) -> SideReport:
    nothing: dict[str, Any] = dict.fromkeys(SideReport.__struct_fields__, 0)
    strings = {"side": name, "transport": "tcp", "failed_by_cause": {}, "examples": [], "counters": {}, "audit": {}}
    memory = {"start": 1 << 20, "tenths": [2 << 20] * 9 + [5 << 20], "end": 4 << 20}
    found = {**nothing, **strings, "seconds": 1.0, "leftovers": {}, "memory": memory}
    return msgspec.convert(found, SideReport)


PLANTED: dict[str, Callable[[SideReport], None]] = {
    "unexpected": lambda side: setattr(side, "unexpected", 3),
    "wrong_bytes": lambda side: setattr(side, "wrong_bytes", 3),
    "rooms_left": lambda side: setattr(side, "rooms_left", 3),
    "pages_left": lambda side: setattr(side, "pages_left", 3),
    "entries_left": lambda side: setattr(side.leftovers, "entries", 3),
}


def finished(capsys: pytest.CaptureFixture[str], sides: list[SideReport], *arguments: str) -> tuple[int, str]:
    """Return exit status and output of a soak whose two processes have sent these reports."""

    def reported(*_: object) -> list[SideReport]:
        return sides

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soak, "_run", reported)
        return main(["soak", "--rooms", "10", *arguments]), capsys.readouterr().out


@pytest.mark.parametrize("field", PLANTED)
def test_anything_wrong_or_left_ends_with_status_1(capsys: pytest.CaptureFixture[str], field: str) -> None:
    sides = [side_report("source"), side_report("sink")]
    assert finished(capsys, sides, "--json")[0] == 0
    PLANTED[field](sides[1])
    status, out = finished(capsys, sides, "--json")
    assert status == 1
    found = json.loads(out)
    assert found["good"] is False
    assert found[field] == 3
    assert finished(capsys, sides)[1].endswith("the soak FAILED: see above\n")


def test_growth_is_judged_only_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    sides = [side_report("source"), side_report("sink")]
    status, out = finished(capsys, sides, "--json")
    assert (status, json.loads(out)["growth_bytes"]) == (0, 3 << 20)
    assert finished(capsys, sides, "--max-growth-mib", "3")[0] == 0
    assert finished(capsys, sides, "--max-growth-mib", "2")[0] == 1
    assert "every byte right, nothing left" in finished(capsys, sides)[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--abort-share", "2"), "'2' is not a share"),
        (("--abort-share", "0.6", "--fault-share", "0.6"), "at most 1 in all"),
        (("--transport", "pigeon", "--rooms", "10"), "choose one of ascend, auto"),
    ],
)
def test_a_wrong_setting_is_named(arguments: tuple[str, ...], words: str) -> None:
    ended = run("soak", *arguments)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


# -- its two processes ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running() -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """Yield a soak that has handed over a tenth of its rooms, and its two processes.

    It starts with SIGINT ignored, as a shell starts jobs in the background.
    """
    with subprocess.Popen(
        ["env", "--ignore-signal=INT", *command("soak", "--rooms", "5000")],
        env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as soaking:  # fmt: skip
        assert soaking.stderr is not None
        try:
            for line in soaking.stderr:
                if line.startswith("500 of 5,000"):
                    break
            sides = psutil.Process(soaking.pid).children()
            assert len(sides) == 2
            yield soaking, sides
        finally:
            soaking.kill()


@pytest.mark.sampled
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_soak_that_is_interrupted_leaves_no_process(number: signal.Signals) -> None:
    with running() as (soaking, sides):
        soaking.send_signal(number)
        out, errors = soaking.communicate(timeout=60)
        assert (soaking.returncode, out) == (130, "")
        assert errors.endswith("kvroom soak: interrupted\n")
        assert not psutil.wait_procs(sides, 0)[1]


def test_the_sides_of_a_soak_that_is_killed_die_with_it() -> None:
    with running() as (soaking, sides):
        for side in sides:
            side.suspend()  # so that neither process can notice by itself that its reader is gone
        soaking.kill()
        left = psutil.wait_procs(sides, 30)[1]
        for side in left:
            side.kill()
        assert not left


@pytest.mark.sampled
@pytest.mark.parametrize("which", [0, 1])
def test_a_side_that_dies_ends_the_soak_with_an_error(which: int) -> None:
    with running() as (soaking, sides):
        sides[which].kill()
        _, errors = soaking.communicate(timeout=60)
        assert soaking.returncode == 4
        name = ("source", "sink")[which]
        assert f"kvroom soak: error: the process of the {name} ended before it had reported" in errors
        assert not psutil.wait_procs(sides, 0)[1]
