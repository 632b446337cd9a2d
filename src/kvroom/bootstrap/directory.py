"""The entries of the bootstrap directory, and their lives. Pure: time comes in as `now_s`, from any monotone clock.

Prefill ranks register and refresh themselves; a rank that stays silent for `rank_ttl_s` is gone. One directory belongs
to one prefill engine: a rank is kept out by the *rivals* among those that are kept, which are

    another run at its place, at another address    two engines, or one that was restarted and listens elsewhere
    ranks that contradict it on what the server is  two engines, or one that was restarted with another shape

A process that was restarted at its old address has no rival in the old one: two cannot listen at one address. In the
other cases nothing that is kept here tells a second engine from a restarted one, so the rival itself is asked if it is
alive (`http`, `alive`): one that is gone makes way at once, so that a crashed engine comes back within its old lease,
and one that lives stays. Where a rival does not answer, its lease decides, and the newcomer waits for that.

Besides there are hints: which data-parallel rank a room was sent to. A hint is advice that a router left before the
room was opened; it says nothing of the room's state, expires by itself, and nobody has to clear it.

Field names are those of SGLang's `PUT /route` and `GET /route` (sglang/srt/disaggregation/common/conn.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from kvroom.core.messages import RoomNumber
from kvroom.errors import BootstrapError, ConfigurationError, LimitExceeded
from kvroom.plan import Parallel, Place
from kvroom.wire.address import HostPort
from kvroom.wire.frames import Seq

RANK_TTL_S = 30.0
HINT_TTL_S = 120.0
MAX_RANKS = 4096
MAX_HINTS = 1 << 16
MAX_QUERIED_ROOMS = 4096
MAX_WAIT_S = 30.0

Size = Annotated[int, Meta(ge=1, le=MAX_RANKS)]
Rank = Annotated[int, Meta(ge=0, lt=MAX_RANKS)]
Port = Annotated[int, Meta(ge=1, lt=65536)]
Name = Annotated[str, Meta(min_length=1, max_length=253)]


class RankInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One prefill rank: where its manager listens, its place in the engine, and what its cache looks like.

    Ranks are half-open in their sizes. `attn_dp_*` counts data-parallel attention groups inside one server,
    `system_dp_*` whole replicas behind one directory; only one of the two is larger than 1. `kv_heads`, `stages` and
    `interleave` (ours, not SGLang's) say what a decode rank must know to find its sources among several: `parallel`.
    `incarnation` (ours, too) tells the run of a process from other runs at its address; 0: not stated.
    """

    rank_ip: Name
    rank_port: Port
    attn_tp_size: Size = 1
    attn_tp_rank: Rank = 0
    attn_cp_size: Size = 1
    attn_cp_rank: Rank = 0
    attn_dp_size: Size = 1
    attn_dp_rank: Rank = 0
    pp_size: Size = 1
    pp_rank: Rank = 0
    system_dp_size: Size = 1
    system_dp_rank: Rank = 0
    page_size: Annotated[int, Meta(ge=1, lt=2**31)]
    kv_cache_dtype: Name | None = None
    load_balance_method: Name = "follow_bootstrap_room"
    enable_dsa_cache_layer_split: bool = False
    prefill_http_port: Port | None = None
    kv_heads: int = 0
    stages: Annotated[tuple[int, ...], Meta(max_length=MAX_RANKS)] = ()
    interleave: int = 0
    incarnation: Seq = 0

    def __post_init__(self) -> None:
        for axis in ("attn_tp", "attn_cp", "attn_dp", "pp", "system_dp"):
            rank, size = getattr(self, f"{axis}_rank"), getattr(self, f"{axis}_size")
            if rank >= size:
                raise ValueError(f"{axis}_rank is {rank}, must be in [0, {size}): {axis}_size is {size}")
        try:
            _ = self.address, self.parallel
        except ConfigurationError as error:
            raise ValueError(str(error)) from None

    @property
    def address(self) -> str:
        """Where its manager listens: what `Links.dial` takes."""
        return str(HostPort.to_dial(self.rank_ip, self.rank_port))

    @property
    def run(self) -> tuple[str, int]:
        """The process that it is: its address, and its incarnation."""
        return self.address, self.incarnation

    @property
    def place(self) -> Place:
        dp_rank = self.attn_dp_rank if self.system_dp_size == 1 else self.system_dp_rank
        return Place(dp_rank, self.attn_cp_rank, self.attn_tp_rank, self.pp_rank)

    @property
    def parallel(self) -> Parallel:
        """How its engine splits the model; every rank of the engine says the same."""
        return self.server.parallel

    @property
    def server(self) -> ServerInfo:
        """What this rank says about its whole server; all ranks of one server must say the same."""
        return ServerInfo(
            attn_tp_size=self.attn_tp_size,
            attn_cp_size=self.attn_cp_size,
            dp_size=self.attn_dp_size if self.system_dp_size == 1 else self.system_dp_size,
            pp_size=self.pp_size,
            page_size=self.page_size,
            kv_cache_dtype=self.kv_cache_dtype,
            follow_bootstrap_room=self.load_balance_method == "follow_bootstrap_room",
            enable_dsa_cache_layer_split=self.enable_dsa_cache_layer_split,
            prefill_http_port=self.prefill_http_port,
            kv_heads=self.kv_heads,
            stages=self.stages,
            interleave=self.interleave,
        )


class ServerInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The prefill server as a whole: the answer to `GET /route` with every rank -1.

    SGLang's clients take no field that they do not know: ours are left out where they have their defaults.
    """

    attn_tp_size: int
    attn_cp_size: int
    dp_size: int
    pp_size: int
    page_size: int
    kv_cache_dtype: str | None
    follow_bootstrap_room: bool
    enable_dsa_cache_layer_split: bool
    prefill_http_port: int | None
    kv_heads: int = 0
    stages: tuple[int, ...] = ()
    interleave: int = 0

    @property
    def parallel(self) -> Parallel:
        """How the engine splits the model. `ConfigurationError` for what cannot be."""
        return Parallel(
            tp=self.attn_tp_size,
            pp=self.pp_size,
            cp=self.attn_cp_size,
            dp=self.dp_size,
            stages=self.stages,
            kv_heads=self.kv_heads,
            interleave=self.interleave,
        )

    @property
    def ranks(self) -> int:
        """How many ranks the server has when all are registered."""
        return self.dp_size * self.attn_cp_size * self.attn_tp_size * self.pp_size


class NotReady(BootstrapError):
    """The directory does not answer, or not every rank of the prefill server is registered. Later it may be well."""


class Contradiction(BootstrapError):
    """A rank says of its server what another live rank denies. It was not registered."""


class PlaceHeld(BootstrapError):
    """The place of a rank belongs to a rank of another engine, which is alive. It was not registered."""


class Undecided(NotReady):
    """A rival that keeps a rank out could not be asked if it is alive. Its lease will decide; ask again."""


class _Entry(NamedTuple):
    rank: RankInfo
    until_s: float
    refused: str = ""
    """Address of the rank that wanted this place last, until the holder was told."""


class _Hint(NamedTuple):
    dp_rank: int
    until_s: float


class Directory:
    """Registrations and hints. Every method drops what has expired first; nothing here blocks or calls out."""

    def __init__(
        self,
        *,
        rank_ttl_s: float = RANK_TTL_S,
        hint_ttl_s: float = HINT_TTL_S,
        max_ranks: int = MAX_RANKS,
        max_hints: int = MAX_HINTS,
    ) -> None:
        self._rank_ttl_s = rank_ttl_s
        self._hint_ttl_s = hint_ttl_s
        self._max_ranks = max_ranks
        self._max_hints = max_hints
        # Both in the order of expiry: each entry lives equally long, and a refreshed one moves to the end.
        self._ranks: dict[Place, _Entry] = {}
        self._hints: dict[int, _Hint] = {}

    def rivals(self, rank: RankInfo, now_s: float) -> list[RankInfo]:
        """The ranks that keep this one out, by place; see the module. None of them: it can be registered."""
        self._expire(now_s)
        # All that are kept agree on what the server is, so one at another place is enough to ask.
        other = next((entry.rank for place, entry in self._ranks.items() if place != rank.place), None)
        contradicted = other is not None and bool(_differing(rank.server, other.server))
        found = [
            entry.rank
            for place, entry in self._ranks.items()
            if (contradicted if place != rank.place else entry.rank.address != rank.address)
        ]
        return sorted(found, key=lambda rival: rival.place)

    def register(self, rank: RankInfo, now_s: float) -> str:
        """Keep or refresh a rank until `now_s` + `rank_ttl_s`.

        Returns the address of a rank that was refused this place since the last refresh, else "". Raises `PlaceHeld` or
        `Contradiction` while there are rivals, and `LimitExceeded` when the directory is full; the ranks that are kept
        stay as they are then.
        """
        rivals = self.rivals(rank, now_s)
        held = self._ranks.get(rank.place)
        if held is not None and held.rank in rivals:
            self._ranks[rank.place] = held._replace(refused=rank.address)
            raise PlaceHeld(
                f"the rank at {rank.place} is registered by another prefill engine, at {held.rank.address}, which is "
                f"alive: one directory belongs to one prefill engine; stop that engine, or give this one, at "
                f"{rank.address}, a directory of its own"
            )
        if rivals:
            differing = _differing(rank.server, rivals[0].server)
            raise Contradiction(
                f"rank at {rank.place} says {differing}: the rank at {rivals[0].place} ({rivals[0].address}) says "
                f"otherwise; start all ranks of a prefill engine alike, and give another engine a directory of its own"
            )
        if held is None and len(self._ranks) >= self._max_ranks:
            raise LimitExceeded(f"the directory holds {self._max_ranks} ranks, no more are allowed")
        self._ranks.pop(rank.place, None)
        self._ranks[rank.place] = _Entry(rank, now_s + self._rank_ttl_s)
        return held.refused if held is not None and held.rank == rank else ""

    def undecided(self, rank: RankInfo, rival: RankInfo, now_s: float) -> Undecided:
        """The answer to a rank that has a rival of which it is not known whether it is alive."""
        entry = self._ranks.get(rival.place)
        left_s = entry.until_s - now_s if entry is not None else 0.0
        return Undecided(
            f"the rank at {rival.place} is registered by {rival.address}, which does not answer: {rank.address} can "
            f"take its place when its lease ends, in {max(left_s, 0.0):.0f} s, unless it renews it"
        )

    def remove(self, rank: RankInfo) -> None:
        """Forget a rank that has ended; nothing if its place has another run by now."""
        entry = self._ranks.get(rank.place)
        if entry is not None and entry.rank.run == rank.run:
            del self._ranks[rank.place]

    def ranks(self, now_s: float) -> list[RankInfo]:
        """Every live rank, by place."""
        self._expire(now_s)
        return [self._ranks[place].rank for place in sorted(self._ranks)]

    def server(self, now_s: float) -> ServerInfo:
        """The server that the live ranks make up; `NotReady` while any of its ranks is missing."""
        self._expire(now_s)
        found = len(self._ranks)
        if not found:
            raise NotReady("no prefill rank is registered: is the prefill worker up?")
        server = self._ranks[min(self._ranks)].rank.server
        if found < server.ranks:
            raise NotReady(f"{found} of {server.ranks} prefill ranks are registered: wait for the others")
        return server

    def find(self, place: Place, now_s: float) -> RankInfo:
        """The rank at a place. `NotReady` as for `server`; `BootstrapError` for a place that the server lacks."""
        self.server(now_s)
        entry = self._ranks.get(place)
        if entry is None:
            raise BootstrapError(f"no prefill rank is registered at {place}")
        return entry.rank

    def register_dp_rank(self, room: int, dp_rank: int, now_s: float) -> None:
        """Leave a hint until `now_s` + `hint_ttl_s`. `LimitExceeded` when there are too many; nothing was kept."""
        self.register_dp_ranks({room: dp_rank}, now_s)

    def register_dp_ranks(self, dp_ranks: Mapping[int, int], now_s: float) -> None:
        """Leave hints, room -> rank. `LimitExceeded` when there are too many; none of them was kept."""
        self._expire(now_s)
        more = sum(room not in self._hints for room in dp_ranks)
        if len(self._hints) + more > self._max_hints:
            raise LimitExceeded(
                f"{more} more room hints are too many: the directory holds {len(self._hints)} of at most "
                f"{self._max_hints}; each expires {self._hint_ttl_s:.0f} s after it was left"
            )
        for room, dp_rank in dp_ranks.items():
            self._hints.pop(room, None)
            self._hints[room] = _Hint(dp_rank, now_s + self._hint_ttl_s)

    def query_dp_ranks(self, rooms: Iterable[int], now_s: float) -> dict[int, int]:
        """room -> dp rank for those of `rooms` that have a hint."""
        self._expire(now_s)
        return {room: self._hints[room].dp_rank for room in rooms if room in self._hints}

    def _expire(self, now_s: float) -> None:
        while self._ranks and self._ranks[place := next(iter(self._ranks))].until_s <= now_s:
            del self._ranks[place]
        while self._hints and self._hints[room := next(iter(self._hints))].until_s <= now_s:
            del self._hints[room]


class RouteList(msgspec.Struct, frozen=True):
    """The answer to `GET /route` without parameters (ours; SGLang's server answers 400 there)."""

    ranks: list[RankInfo]


def check_listed(bootstrap_addr: str, ranks: Sequence[RankInfo]) -> None:
    """Raise `BootstrapError` unless the ranks that a directory lists are those of one server, or some of them.

    They decide how many connections a decode rank opens, and to where. So no more of them are believed than the server
    has that they describe, each at a place of its own. `NotReady` where two have one address: an engine that was
    restarted may have dealt its addresses out anew, and its old entries expire.
    """
    if not ranks:
        return
    listed = f"bootstrap directory {bootstrap_addr} lists {len(ranks)} prefill ranks"
    server = ranks[0].server
    if len(ranks) > min(server.ranks, MAX_RANKS):
        raise BootstrapError(
            f"{listed} of a server that has {server.ranks} by its own description (dp {server.dp_size} x cp "
            f"{server.attn_cp_size} x tp {server.attn_tp_size} x pp {server.pp_size}), and a directory holds "
            f"{MAX_RANKS} at most: is it a kvroom bootstrap directory?"
        )
    if odd := next((rank for rank in ranks if _differing(rank.server, server)), None):
        raise BootstrapError(
            f"{listed} that contradict each other: the one at {odd.place} says {_differing(odd.server, server)}; start "
            "all ranks of a prefill engine alike, and give another engine a directory of its own"
        )
    if (places := len({rank.place for rank in ranks})) != len(ranks):
        raise BootstrapError(f"{listed} at {places} places: is it a kvroom bootstrap directory?")
    if (addresses := len({rank.address for rank in ranks})) != len(ranks):
        raise NotReady(f"{listed} at {addresses} addresses: each rank has one of its own; try again when all are up")


class DpRankHint(msgspec.Struct, frozen=True):
    """The body of `POST /register_dp_rank`."""

    bootstrap_room: RoomNumber
    dp_rank: Rank


class DpRankHints(msgspec.Struct, frozen=True):
    """The body of `POST /register_dp_ranks` (ours): many rooms at once, as JSON keys."""

    dp_ranks: Annotated[dict[RoomNumber, Rank], Meta(max_length=MAX_QUERIED_ROOMS)]


class DpRankQuery(msgspec.Struct, frozen=True):
    """The body of `POST /query_dp_ranks`; the answer maps rooms (as JSON keys) to ranks.

    `wait_s` (ours): if none of the rooms is known, answer as soon as one is, or with nothing after that time.
    """

    bootstrap_rooms: Annotated[list[RoomNumber], Meta(max_length=MAX_QUERIED_ROOMS)]
    wait_s: Annotated[float, Meta(ge=0, le=MAX_WAIT_S)] = 0


# msgspec (0.22) looks into a type at its first use, so it happens here: two threads that do so at once, as managers do
# that start together, can crash the process.
for _kind in (RouteList, DpRankHint, DpRankHints, DpRankQuery):
    msgspec.json.Decoder(_kind)


def _differing(ours: ServerInfo, theirs: ServerInfo) -> str:
    """`name ours (not theirs)` for every field in which two ranks disagree; each node may have its own HTTP port."""
    pairs = ((name, getattr(ours, name), getattr(theirs, name)) for name in ServerInfo.__struct_fields__)
    return ", ".join(
        f"{name} {one} (not {two})" for name, one, two in pairs if one != two and name != "prefill_http_port"
    )
