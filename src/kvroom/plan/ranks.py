"""The links between the ranks of two engines, computed from their parallel descriptions.

The law: both sides compute the same links from the same two descriptions. Every sink rank is linked with ranks that
together hold all that it needs, every source rank is linked at least once, and no smaller set of links does both.

A rank holds a box: the layers of its pipeline stage x the heads of its tensor rank x the tokens of its context rank.
Source ranks with equal boxes are replicas, which differ only in their tensor rank. One replica writes for each sink:

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
"""The largest number of ranks in one data-parallel group: context x tensor x pipeline."""
MAX_DP = 4096
MAX_LAYERS = 1 << 16
MAX_HEADS = 1 << 16
MAX_INTERLEAVE = 1 << 20

_SIZES = (("tp", 1, MAX_GROUP), ("pp", 1, MAX_GROUP), ("cp", 1, MAX_GROUP), ("dp", 1, MAX_DP))
_NUMBERS = (*_SIZES, ("kv_heads", 0, MAX_HEADS), ("interleave", 0, MAX_INTERLEAVE))


class Place(NamedTuple):
    """The coordinates of a rank, each from 0, in the order of the keys of SGLang's rank table."""

    dp: int
    """Data-parallel group."""
    cp: int
    """Context-parallel rank."""
    tp: int
    """Tensor-parallel rank."""
    pp: int
    """Pipeline stage."""

    def __str__(self) -> str:
        return f"dp {self.dp}, cp {self.cp}, tp {self.tp}, pp {self.pp}"


class Parallel(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The split of a model over the ranks of one engine. All ranks of the engine must give the same values.

    vLLM's decode context parallelism takes its ranks from the tensor parallel group: `dcp` neighbours in a group of T
    hold the same heads and different tokens. Here that is tp = T // dcp, cp = dcp, interleave =
    cp_kv_cache_interleave_size, and rank r has the place tp r // dcp, cp r % dcp. If prefill context parallelism is on
    too, cp = pcp * dcp, and the rank has the place cp pcp_rank * dcp + r % dcp.

    Raises:
        ConfigurationError: a number is out of range, or `stages` does not fit `pp`. Nothing was constructed.
    """

    tp: int = 1
    """Ranks over which the attention is split. Where the attention is data parallel (SGLang's
    `--enable-dp-attention`), the server's tensor parallel size divided by `dp` and `cp`."""
    pp: int = 1
    """Pipeline stages."""
    cp: int = 1
    """Context-parallel ranks, which hold different tokens of a request."""
    dp: int = 1
    """Data-parallel groups. A request is served by one of them."""
    stages: tuple[int, ...] = ()
    """Layers of each pipeline stage, in order. Every layer that holds cache counts, those of a draft model after the
    others. May be empty with one stage, or if both sides leave it empty and have the same number of stages."""
    kv_heads: int = 0
    """KV heads of the model; 0 for one latent (MLA) that each tensor rank holds. Where layers differ, or states have
    heads, give the largest count: a count that divides it needs the same links. See `heads` for the split."""
    interleave: int = 0
    """With `cp` > 1, tokens that a context rank gets in turn (DCP): rank r holds each token t with
    (t // interleave) % cp == r. 0: the engine names the tokens of each send."""

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
            raise ConfigurationError(
                f"stages has {len(self.stages)} pipeline stages and pp is {self.pp}: give the layers of each stage"
            )
        for layers in self.stages:
            if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:
                raise ConfigurationError(
                    f"stages has a stage of {layers!r} layers: give an int from 1 to {MAX_LAYERS} for each"
                )

    @property
    def group(self) -> int:
        """Return the number of ranks that share one request: those of one data-parallel group."""
        return self.cp * self.tp * self.pp

    def places(self, dp: int = 0) -> Iterator[Place]:
        """Return every place of one data-parallel group, in order."""
        return (Place(dp, *rest) for rest in product(range(self.cp), range(self.tp), range(self.pp)))

    def heads(self, tp_rank: int) -> tuple[int, int]:
        """Return the half-open range of the model's KV heads that a tensor rank holds; the latent of MLA is head 0.

        With fewer heads than ranks, each rank holds one head, which neighbours share. If the heads do not divide
        evenly, the first ranks hold one more. Raises `PlanError` for a rank that does not exist.
        """
        _check("tp", tp_rank, self.tp)
        if self.kv_heads < self.tp:
            head = tp_rank * self.kv_heads // self.tp
            return head, head + 1
        each, more = divmod(self.kv_heads, self.tp)
        return tp_rank * each + min(tp_rank, more), (tp_rank + 1) * each + min(tp_rank + 1, more)

    def layers(self, pp_rank: int) -> tuple[int, int]:
        """Return the half-open range of a stage's layers. Raises `PlanError` if `stages` does not contain the stage."""
        _check("pp", pp_rank, self.pp)
        if not self.stages:
            raise PlanError(f"the layers of the {self.pp} pipeline stages are unknown: give stages")
        first = sum(self.stages[:pp_rank])
        return first, first + self.stages[pp_rank]

    def check(self, place: Place) -> None:
        """Raise `PlanError` unless the engine has a rank at `place`."""
        for name, rank in zip(Place._fields, place, strict=True):
            _check(name, rank, getattr(self, name))


class RankMap:
    """The links between one data-parallel group of a source engine and one of a sink engine. Made by `match_ranks`.

    `source` and `sink` are the two descriptions. Every method takes time in proportion to the size of its result.
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
            # Token a of one rank's first turn and token b of the other's are equal in some later turns exactly if the
            # step divides a - b. So the question is if a multiple of the step lies in [least, most].
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
        """Return the source ranks to which a sink rank offers, in the source's group `dp`.

        Ranks that write for it come first, then ranks that only report. The sink's room is complete when all have
        reported. Raises `PlanError` for a place or group that does not exist.
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
        """Return the number of `sources` that write; these come first. `plan.assignment` divides the work."""
        self.sink.check(sink)
        return len(self._pp.sources[sink.pp]) * len(self._cp.sources[sink.cp]) * len(self._tp.sources[sink.tp])

    def sinks(self, source: Place, dp: int = 0) -> tuple[Place, ...]:
        """Return the ranks of the sink's group `dp` that offer to a source rank, at least one."""
        _check("dp", dp, self.sink.dp)
        replicas, takers = self._about(source)
        turns = range(source.tp - replicas[0], max(len(takers), len(replicas)), len(replicas))
        return tuple(takers.place(turn % len(takers), dp) for turn in turns)

    def offers(self, source: Place) -> int:
        """Return the number of offers that a source rank gets for a room, which is the length of `sinks`."""
        replicas, takers = self._about(source)
        return len(range(source.tp - replicas[0], max(len(takers), len(replicas)), len(replicas)))

    def _about(self, source: Place) -> tuple[range, _Takers]:
        self.source.check(source)
        heads = next(i for i, replicas in enumerate(self._replicas) if source.tp in replicas)
        return self._replicas[heads], self._takers(source.pp, source.cp, heads)

    def _takers(self, pp: int, cp: int, heads: int) -> _Takers:
        return _Takers(self._pp.sinks[pp], self._cp.sinks[cp], self._tp.sinks[heads])


def match_ranks(source: Parallel, sink: Parallel) -> RankMap:
    """Return the links between the ranks of two engines.

    Raises `PlanError`, which names both values, if the two descriptions cannot be of the same model.
    """
    if source.kv_heads != sink.kv_heads:
        if source.kv_heads and sink.kv_heads:
            raise PlanError(
                f"the source has {source.kv_heads} KV heads, the sink {sink.kv_heads}: both sides must run the same "
                f"model and give the same Parallel(kv_heads=...)"
            )
        # The default of an engine that leaves the setting out is 0, which means a model with one latent.
        side, heads = ("source", sink.kv_heads) if sink.kv_heads else ("sink", source.kv_heads)
        raise PlanError(
            f"the source has kv_heads={source.kv_heads} and the sink kv_heads={sink.kv_heads}, which means one latent "
            f"(MLA): if the model has {heads} KV heads, start the managers of the {side} with "
            f"Parallel(kv_heads={heads})"
        )
    # Pipeline stages are linked if they share layers.
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
    """Return the data-parallel group of a room, for servers that choose it by room number, as SGLang's does."""
    return room % dp_size


class _Axis(NamedTuple):
    """The ranks that meet along one axis, by source rank and by sink rank, each list in rising order."""

    sinks: Sequence[Sequence[int]]
    sources: Sequence[Sequence[int]]


@dataclass(frozen=True)
class _Takers:
    """The sinks that need one box, ordered so that the tensor rank changes fastest.

    Sinks that are neighbours in this order get different replicas.
    """

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
        raise PlanError(f"{axis} rank {rank} does not exist among {size} ranks: give one in [0, {size})")
