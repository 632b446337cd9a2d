"""Which ranks feed which: from the parallel descriptions of two engines to the links between their ranks.

The law: both sides compute the same links from the same two descriptions, every sink rank is linked with ranks that
together hold all that it needs, every source rank is linked at least once, and no smaller set of links does both.

A rank holds a box: layers [of its pipeline stage] x heads [of its tensor rank] x tokens [of its context rank]. Source
ranks whose boxes are equal are replicas; they differ in their tensor rank only. One replica writes for a sink:

    sinks that need the box      0 1 2 3 4        0 1
    replicas that hold it        0 1 0 1 0        0 1 (2 for sink 0) (3 for sink 1): they only report
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from math import gcd
from typing import NamedTuple

import msgspec

from kvroom.errors import ConfigurationError, PlanError

MAX_GROUP = 1024
"""Ranks of one data-parallel group: context x tensor x pipeline."""
MAX_DP = 4096
MAX_LAYERS = 1 << 16
MAX_HEADS = 1 << 16
MAX_INTERLEAVE = 1 << 20

_SIZES = (("tp", 1, MAX_GROUP), ("pp", 1, MAX_GROUP), ("cp", 1, MAX_GROUP), ("dp", 1, MAX_DP))
_NUMBERS = (*_SIZES, ("kv_heads", 0, MAX_HEADS), ("interleave", 0, MAX_INTERLEAVE))


class Place(NamedTuple):
    """A rank's coordinates; SGLang's table is keyed in the same order."""

    dp: int
    cp: int
    tp: int
    pp: int

    def __str__(self) -> str:
        return f"dp {self.dp}, cp {self.cp}, tp {self.tp}, pp {self.pp}"


class Parallel(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one engine splits a model over its ranks. All of its ranks say the same.

    `tp`, `pp`, `cp`, `dp` are sizes, in ranks. `tp` is what the attention is split over: where the attention is data
    parallel (SGLang's `--enable-dp-attention`), the server's tensor parallel size divided by `dp` and `cp`.

    `stages` are the layers of each pipeline stage, in order, every layer that holds cache counted, those of a draft
    model behind the others. It may be empty with one stage, or where both sides leave it out and have as many.

    `kv_heads` are the KV heads of the model; 0: one latent (MLA) that each tensor rank holds. Where layers differ, or
    states have heads, give the largest count: one that divides it needs no other links. See `heads` for the split.

    `interleave`: with `cp` > 1, tokens are dealt to the context ranks in turn, so many at a time (DCP): rank r holds
    each token t with (t // interleave) % cp == r. 0: which tokens a rank holds is said with each send.

    vLLM's decode context parallelism takes its ranks from the tensor parallel group: `dcp` neighbours in a group of T
    hold the same heads and different tokens. Here that is tp = T // dcp, cp = dcp, interleave =
    cp_kv_cache_interleave_size, and its rank r stands at tp r // dcp, cp r % dcp. With prefill context parallelism
    besides, cp = pcp * dcp, and the rank stands at cp pcp_rank * dcp + r % dcp.

    Raises `ConfigurationError`; nothing was made then.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    stages: tuple[int, ...] = ()
    kv_heads: int = 0
    interleave: int = 0

    def __post_init__(self) -> None:
        for name, least, most in _NUMBERS:
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ConfigurationError(f"{name} is {value!r}: give an int from {least} to {most}")
        if self.group > MAX_GROUP:
            raise ConfigurationError(
                f"cp {self.cp} x tp {self.tp} x pp {self.pp} are {self.group} ranks that share one request: "
                f"at most {MAX_GROUP} are possible"
            )
        if self.stages and len(self.stages) != self.pp:
            raise ConfigurationError(f"stages names {len(self.stages)} pipeline stages: name {self.pp}, as pp says")
        for layers in self.stages:
            if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:
                raise ConfigurationError(f"a stage of {layers!r} layers: give an int from 1 to {MAX_LAYERS} for each")

    @property
    def group(self) -> int:
        """How many ranks share one request: those of one data-parallel group."""
        return self.cp * self.tp * self.pp

    def places(self, dp: int = 0) -> Iterator[Place]:
        """Every place of one data-parallel group, in order."""
        return (Place(dp, *rest) for rest in product(range(self.cp), range(self.tp), range(self.pp)))

    def heads(self, tp_rank: int) -> tuple[int, int]:
        """Half-open range of the model's KV heads that a tensor rank holds; the latent of MLA is head 0.

        Fewer heads than ranks: each rank holds one, and neighbours share it. Heads that do not divide evenly: the first
        ranks hold one more. `PlanError` for a rank that there is not.
        """
        _check("tp", tp_rank, self.tp)
        if self.kv_heads < self.tp:
            head = tp_rank * self.kv_heads // self.tp
            return head, head + 1
        each, more = divmod(self.kv_heads, self.tp)
        return tp_rank * each + min(tp_rank, more), (tp_rank + 1) * each + min(tp_rank + 1, more)

    def layers(self, pp_rank: int) -> tuple[int, int]:
        """Half-open range of the layers of a pipeline stage. `PlanError` without `stages`, or for a stage too many."""
        _check("pp", pp_rank, self.pp)
        if not self.stages:
            raise PlanError(f"which layers the {self.pp} pipeline stages hold is not known: give stages")
        first = sum(self.stages[:pp_rank])
        return first, first + self.stages[pp_rank]

    def check(self, place: Place) -> None:
        """`PlanError` unless the engine has a rank at `place`."""
        for name, rank in zip(Place._fields, place, strict=True):
            _check(name, rank, getattr(self, name))


class RankMap:
    """The links between one data-parallel group of a source engine and one of a sink engine. Make it with `feeds`.

    `source` and `sink` are the two descriptions. Every question costs time in proportion to its answer.
    """

    def __init__(self, source: Parallel, sink: Parallel, stages: _Axis) -> None:
        self.source = source
        self.sink = sink
        self._pp = stages
        step = gcd(source.interleave * source.cp, sink.interleave * sink.cp)

        def share_tokens(one: int, other: int) -> bool:
            """Return True if two context ranks can hold the same token, in a request that is long enough."""
            if source.cp == 1 or sink.cp == 1 or not source.interleave or not sink.interleave:
                return True
            # Token a of one rank's first turn and b of the other's meet, in some later turns, if the step divides
            # a - b.
            least = one * source.interleave - (other + 1) * sink.interleave + 1
            most = (one + 1) * source.interleave - other * sink.interleave - 1
            return most // step * step >= least

        self._cp = _axis(source.cp, sink.cp, share_tokens)
        held = [source.heads(rank) for rank in range(source.tp)]
        borders = [rank for rank, heads in enumerate(held) if not rank or heads != held[rank - 1]]
        self._replicas = [range(lo, hi) for lo, hi in pairwise([*borders, source.tp])]
        wanted = [sink.heads(rank) for rank in range(sink.tp)]
        self._tp = _axis(len(borders), sink.tp, lambda one, other: _overlap(held[borders[one]], wanted[other]))

    def sources(self, sink: Place, dp: int = 0) -> tuple[Place, ...]:
        """Where a sink rank offers to, in the source's group `dp`: first those that write for it, then those that only
        report. As many reports complete a room there. `PlanError` for a place or group that there is not.
        """
        self.sink.check(sink)
        _check("dp", dp, self.source.dp)
        write: list[Place] = []
        report: list[Place] = []
        for pp, cp, heads in product(self._pp.sources[sink.pp], self._cp.sources[sink.cp], self._tp.sources[sink.tp]):
            replicas, takers = self._replicas[heads], self._takers(pp, cp, heads)
            turns = range(takers.turn(sink), max(len(takers), len(replicas)), len(takers))
            first, *others = (Place(dp, cp, replicas[turn % len(replicas)], pp) for turn in turns)
            write.append(first)
            report.extend(others)
        return (*write, *report)

    def writers(self, sink: Place) -> int:
        """Return how many of `sources` write; these come first. For what each writes see `plan.assignment`."""
        self.sink.check(sink)
        return len(self._pp.sources[sink.pp]) * len(self._cp.sources[sink.cp]) * len(self._tp.sources[sink.tp])

    def sinks(self, source: Place, dp: int = 0) -> tuple[Place, ...]:
        """Which ranks of the sink's group `dp` offer to a source rank: one at least."""
        _check("dp", dp, self.sink.dp)
        replicas, takers = self._about(source)
        turns = range(source.tp - replicas[0], max(len(takers), len(replicas)), len(replicas))
        return tuple(takers.place(turn % len(takers), dp) for turn in turns)

    def offers(self, source: Place) -> int:
        """How many offers a source rank gets for a room: the length of `sinks`, without making it."""
        replicas, takers = self._about(source)
        return len(range(source.tp - replicas[0], max(len(takers), len(replicas)), len(replicas)))

    def _about(self, source: Place) -> tuple[range, _Takers]:
        self.source.check(source)
        heads = next(i for i, replicas in enumerate(self._replicas) if source.tp in replicas)
        return self._replicas[heads], self._takers(source.pp, source.cp, heads)

    def _takers(self, pp: int, cp: int, heads: int) -> _Takers:
        return _Takers(self._pp.sinks[pp], self._cp.sinks[cp], self._tp.sinks[heads])


def match_ranks(source: Parallel, sink: Parallel) -> RankMap:
    """Which ranks of `source` feed which of `sink`. `PlanError` names both values where they cannot be one model's."""
    if source.kv_heads != sink.kv_heads:
        if source.kv_heads and sink.kv_heads:
            raise PlanError(
                f"the source has {source.kv_heads} KV heads, the sink {sink.kv_heads}: both sides must run the same "
                f"model and say the same Parallel(kv_heads=...)"
            )
        # An engine that leaves the setting out says 0, which is a model with one latent.
        side, heads = ("source", sink.kv_heads) if sink.kv_heads else ("sink", source.kv_heads)
        raise PlanError(
            f"the source has kv_heads={source.kv_heads} and the sink kv_heads={sink.kv_heads}, which means one latent "
            f"(MLA): if the model has {heads} KV heads, start the managers of the {side} with "
            f"Parallel(kv_heads={heads})"
        )
    # Pipeline stages feed those that they share layers with.
    if source.stages and sink.stages:
        if sum(source.stages) != sum(sink.stages):
            raise PlanError(
                f"the source's stages have {sum(source.stages)} layers, the sink's {sum(sink.stages)}: "
                f"count the same layers on both sides"
            )
        ours, theirs = _ranges(source.stages), _ranges(sink.stages)
        stages = _axis(source.pp, sink.pp, lambda one, other: _overlap(ours[one], theirs[other]))
    elif source.pp == 1 or sink.pp == 1:
        stages = _axis(source.pp, sink.pp, lambda _one, _other: True)
    elif source.pp == sink.pp and not source.stages and not sink.stages:
        stages = _axis(source.pp, sink.pp, lambda one, other: one == other)
    else:
        raise PlanError(
            f"{source.pp} pipeline stages with {source.stages or 'unknown'} layers feed {sink.pp} with "
            f"{sink.stages or 'unknown'}: give stages, the layers of each stage, on both sides"
        )
    return RankMap(source, sink, stages)


def dp_rank_of(room: int, dp_size: int) -> int:
    """The data-parallel group that serves a room when the server follows room numbers, as SGLang's does."""
    return room % dp_size


class _Axis(NamedTuple):
    """Who meets whom along one axis, both ways, each list in rising order."""

    sinks: Sequence[Sequence[int]]
    sources: Sequence[Sequence[int]]


@dataclass(frozen=True)
class _Takers:
    """The sinks that need one box, in an order in which their tensor rank changes fastest: neighbours there get
    different replicas."""

    pps: Sequence[int]
    cps: Sequence[int]
    tps: Sequence[int]

    def __len__(self) -> int:
        return len(self.pps) * len(self.cps) * len(self.tps)

    def turn(self, sink: Place) -> int:
        pp, cp, tp = self.pps.index(sink.pp), self.cps.index(sink.cp), self.tps.index(sink.tp)
        return (pp * len(self.cps) + cp) * len(self.tps) + tp

    def place(self, turn: int, dp: int) -> Place:
        rest, tp = divmod(turn, len(self.tps))
        pp, cp = divmod(rest, len(self.cps))
        return Place(dp, self.cps[cp], self.tps[tp], self.pps[pp])


def _axis(sources: int, sinks: int, meet: Callable[[int, int], bool]) -> _Axis:
    met = [[sink for sink in range(sinks) if meet(source, sink)] for source in range(sources)]
    back: list[list[int]] = [[] for _ in range(sinks)]
    for source, others in enumerate(met):
        for sink in others:
            back[sink].append(source)
    return _Axis(met, back)


def _ranges(lengths: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise(accumulate(lengths, initial=0)))


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _check(axis: str, rank: int, size: int) -> None:
    if not 0 <= rank < size:
        raise PlanError(f"{axis} rank {rank} is not one of the {size} that there are: give one in [0, {size})")
