"""The directory: entries expire by the time that is passed in, places are checked, limits hold, no entry is left."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvroom.bootstrap.directory import Contradiction, Directory, NotReady, PlaceHeld, RankInfo, ServerInfo
from kvroom.errors import BootstrapError, LimitExceeded
from kvroom.plan import Parallel, Place


@pytest.mark.parametrize(
    ("rank_ip", "address"),
    [
        ("[::1]", "[::1]:7000"),
        ("FD00::1", "[fd00::1]:7000"),
        ("Worker-3.", "worker-3:7000"),
        ("::ffff:10.0.0.1", "10.0.0.1:7000"),
    ],
)
def test_a_ranks_host_is_read_in_every_form(rank_ip: str, address: str) -> None:
    assert RankInfo(rank_ip=rank_ip, rank_port=7000, page_size=16).address == address


def rank(tp: int = 0, *, tp_size: int = 2, port: int = 7000, page_size: int = 16, http: int | None = None) -> RankInfo:
    return RankInfo(
        rank_ip="10.0.0.1",
        rank_port=port + tp,
        attn_tp_size=tp_size,
        attn_tp_rank=tp,
        page_size=page_size,
        prefill_http_port=http,
    )


def test_a_server_is_known_once_all_its_ranks_are() -> None:
    directory = Directory()
    with pytest.raises(NotReady, match="no prefill rank is registered"):
        directory.server(0)
    directory.register(rank(1), 0)
    with pytest.raises(NotReady, match="1 of 2 prefill ranks"):
        directory.find(Place(0, 0, 1, 0), 0)
    directory.register(rank(0), 0)
    assert directory.server(0).ranks == 2
    assert directory.ranks(0) == [rank(0), rank(1)]
    assert directory.find(Place(0, 0, 1, 0), 0).address == "10.0.0.1:7001"
    with pytest.raises(BootstrapError, match="no prefill rank is registered at dp 1, cp 0, tp 0, pp 0"):
        directory.find(Place(1, 0, 0, 0), 0)


def test_a_rank_lives_until_its_time_and_a_refresh_counts_from_now() -> None:
    directory = Directory(rank_ttl_s=30)
    directory.register(rank(0), 0)
    directory.register(rank(1), 10)
    directory.register(rank(0), 20)
    assert directory.ranks(39.9) == [rank(0), rank(1)]
    assert directory.ranks(40) == [rank(0)]
    assert directory.ranks(49.9) == [rank(0)]
    assert directory.ranks(50) == []
    with pytest.raises(NotReady):
        directory.server(50)
    assert not directory._ranks


def test_a_place_belongs_to_who_has_it_until_he_is_known_to_be_gone() -> None:
    directory = Directory()
    ours, theirs = (rank(0, tp_size=1, port=port) for port in (7000, 9000))
    assert directory.register(ours, 0) == ""
    assert directory.rivals(theirs, 1) == [ours]
    with pytest.raises(
        PlaceHeld, match=r"at dp 0, cp 0, tp 0, pp 0 .* at 10\.0\.0\.1:7000.* the engine at 10\.0\.0\.1:9000 a"
    ):
        directory.register(theirs, 1)
    assert directory.ranks(1) == [ours]
    assert directory.register(ours, 2) == "10.0.0.1:9000"  # the caller who waited was notified once
    assert directory.register(ours, 3) == ""
    directory.remove(theirs)  # a room that this directory does not have
    assert directory.ranks(3) == [ours]
    directory.remove(ours)
    assert directory.register(theirs, 4) == ""
    assert directory.ranks(4) == [theirs]


def test_a_lease_that_has_ended_keeps_nobody_out() -> None:
    directory = Directory(rank_ttl_s=30)
    ours, theirs = (rank(0, tp_size=1, port=port) for port in (7000, 9000))
    directory.register(ours, 0)
    why = str(directory.undecided(theirs, ours, 10))
    assert "registered by 10.0.0.1:7000, which does not answer: 10.0.0.1:9000 can take its place" in why
    assert "in 20 s" in why
    assert directory.rivals(theirs, 29.9) == [ours]
    assert directory.rivals(theirs, 30) == []
    directory.register(theirs, 30)
    assert directory.rivals(ours, 30) == [theirs]  # it was stopped for longer than its lease and lost its place


def test_a_process_that_was_restarted_at_its_address_replaces_its_earlier_run_at_once() -> None:
    directory = Directory()
    runs = [msgspec.structs.replace(rank(0, tp_size=1), incarnation=incarnation) for incarnation in (5, 3)]
    for run in runs:
        assert directory.register(run, 0) == ""
        assert directory.ranks(0) == [run]
    directory.remove(runs[0])  # a late message of a run that has a successor
    assert directory.ranks(0) == [runs[1]]


def test_ranks_that_contradict_each_other_are_refused_and_change_nothing() -> None:
    directory = Directory(rank_ttl_s=30)
    directory.register(rank(0), 0)
    assert directory.rivals(rank(1, page_size=32), 1) == [rank(0)]
    with pytest.raises(
        Contradiction, match=r"the rank at .*10\.0\.0\.1:7000\): .*page_size 32 \(not 16\).* all ranks .* same options"
    ):
        directory.register(rank(1, page_size=32), 1)
    assert directory.ranks(1) == [rank(0)]
    directory.register(rank(1, http=8000), 1)
    assert directory.rivals(rank(0, tp_size=4, port=9000), 2) == [rank(0), rank(1, http=8000)]
    with pytest.raises(PlaceHeld):
        directory.register(rank(0, tp_size=4, port=9000), 2)
    directory.register(rank(1, page_size=32), 30)
    assert directory.ranks(30) == [rank(1, page_size=32)]


def test_a_restarted_single_rank_may_change_its_mind() -> None:
    directory = Directory()
    directory.register(rank(0, tp_size=1), 0)
    directory.register(rank(0, tp_size=1, page_size=64), 1)
    assert directory.server(1).page_size == 64


def test_data_parallel_ranks_are_placed_as_sglang_places_them() -> None:
    attention = RankInfo(rank_ip="h", rank_port=1, attn_dp_size=4, attn_dp_rank=3, page_size=1)
    system = RankInfo(rank_ip="h", rank_port=1, system_dp_size=4, system_dp_rank=2, page_size=1)
    assert (attention.place.dp, attention.server.dp_size) == (3, 4)
    assert (system.place.dp, system.server.dp_size) == (2, 4)


def test_a_rank_says_how_its_engine_splits_the_model() -> None:
    told = {"attn_tp_size": 4, "attn_cp_size": 2, "attn_dp_size": 3, "pp_size": 2}
    more = {"kv_heads": 8, "stages": [20, 12], "interleave": 16}
    body = {"rank_ip": "h", "rank_port": 1, "page_size": 1}
    rank = msgspec.json.decode(msgspec.json.encode(body | told | more), type=RankInfo)
    assert rank.parallel == Parallel(tp=4, cp=2, dp=3, pp=2, kv_heads=8, stages=(20, 12), interleave=16)
    assert msgspec.json.decode(msgspec.json.encode(rank), type=RankInfo) == rank
    assert msgspec.json.decode(msgspec.json.encode(rank.server), type=ServerInfo) == rank.server
    plain = msgspec.json.decode(msgspec.json.encode(body | told), type=RankInfo)
    assert plain.parallel == Parallel(tp=4, cp=2, dp=3, pp=2)
    assert not more.keys() & msgspec.json.decode(msgspec.json.encode(plain.server)).keys()
    replicas = RankInfo(rank_ip="h", rank_port=1, page_size=1, system_dp_size=5, system_dp_rank=4)
    assert replicas.parallel == Parallel(dp=5)


def test_ranks_of_one_server_must_agree_on_how_the_model_is_split() -> None:
    directory = Directory()
    directory.register(msgspec.structs.replace(rank(0), kv_heads=8), 0)
    for other in (rank(1), msgspec.structs.replace(rank(1), kv_heads=8, interleave=1)):
        with pytest.raises(Contradiction, match=r"kv_heads 0 \(not 8\)|interleave 1 \(not 0\)"):
            directory.register(other, 0)
    directory.register(msgspec.structs.replace(rank(1), kv_heads=8), 0)


def test_many_hints_are_left_together_or_not_at_all() -> None:
    directory = Directory(max_hints=3, hint_ttl_s=10)
    directory.register_dp_ranks({1: 0, 2: 1}, 0)
    with pytest.raises(
        LimitExceeded, match=r"too many room hints: the directory holds 2 \(limit 3\) and cannot store 2 more"
    ):
        directory.register_dp_ranks({1: 5, 3: 5, 4: 5}, 1)
    assert directory.query_dp_ranks(range(5), 1) == {1: 0, 2: 1}
    directory.register_dp_ranks({1: 7, 3: 2}, 2)
    assert directory.query_dp_ranks(range(5), 9.9) == {1: 7, 2: 1, 3: 2}
    assert directory.query_dp_ranks(range(5), 10) == {1: 7, 3: 2}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kv_heads": -1}, "kv_heads is -1: give an int from 0"),
        ({"pp_size": 2, "stages": [1, 2, 3]}, "stages has 3 pipeline stages and pp is 2: give the layers"),
        ({"attn_tp_size": 64, "pp_size": 64}, "4096 ranks that share one request"),
        ({"attn_tp_rank": 2, "attn_tp_size": 2}, r"attn_tp_rank is 2, must be in \[0, 2\)"),
        ({"pp_rank": 1}, r"pp_rank is 1, must be in \[0, 1\)"),
        ({"rank_ip": "two..dots"}, "is not a host"),
        ({"rank_ip": "::"}, "every interface of a machine, which cannot be dialled"),
        ({"rank_ip": "fe80::1"}, "a link-local address without its interface"),
        ({"rank_ip": "10.0.0.1:7000"}, "give the port separately"),
        ({"rank_port": 0}, "rank_port"),
        ({"rank_port": 65536}, "rank_port"),
        ({"page_size": 0}, "page_size"),
        ({"attn_cp_size": 100_000}, "attn_cp_size"),
    ],
)
def test_a_bad_rank_is_refused_by_the_name_of_its_field(fields: dict[str, object], says: str) -> None:
    body = msgspec.json.encode({"rank_ip": "h", "rank_port": 1, "page_size": 1} | fields)
    with pytest.raises(msgspec.ValidationError, match=says):
        msgspec.json.decode(body, type=RankInfo)


def test_limits_are_named_and_what_is_known_may_still_be_refreshed() -> None:
    directory = Directory(max_ranks=1, max_hints=1, hint_ttl_s=10)
    directory.register(rank(0), 0)
    with pytest.raises(LimitExceeded, match=r"is full \(limit 1 ranks\)"):
        directory.register(rank(1), 0)
    directory.register(rank(0), 1)
    directory.register_dp_rank(5, 0, 0)
    with pytest.raises(
        LimitExceeded, match=r"the directory holds 1 \(limit 1\) and cannot store 1 more; each expires after 10 s"
    ):
        directory.register_dp_rank(6, 0, 9.9)
    directory.register_dp_rank(5, 1, 0)
    assert directory.query_dp_ranks([5, 6], 9.9) == {5: 1}
    directory.register_dp_rank(6, 2, 10)
    assert directory.query_dp_ranks([5, 6], 10) == {6: 2}


times = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), st.booleans()), max_size=60)


@given(times)
def test_what_is_kept_is_just_what_was_said_within_the_time_to_live(events: list[tuple[int, int, bool]]) -> None:
    """Compare with an obvious model, which keeps the time of each last statement and compares it with the clock."""
    directory = Directory(rank_ttl_s=10, hint_ttl_s=10)
    said_ranks: dict[int, int] = {}
    said_hints: dict[int, int] = {}
    now_s = 0
    for step_s, key, is_rank in events:
        now_s += step_s
        if is_rank:
            directory.register(rank(key, tp_size=8), now_s)
            said_ranks[key] = now_s
        else:
            directory.register_dp_rank(key, key % 3, now_s)
            said_hints[key] = now_s
        live = sorted(key for key, at_s in said_ranks.items() if now_s < at_s + 10)
        assert [entry.attn_tp_rank for entry in directory.ranks(now_s)] == live
        hints = {key: key % 3 for key, at_s in said_hints.items() if now_s < at_s + 10}
        assert directory.query_dp_ranks(range(8), now_s) == hints
        assert len(directory._hints) == len(hints)
