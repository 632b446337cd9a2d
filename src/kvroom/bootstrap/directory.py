"""The entries of the bootstrap directory and their expiry. Pure: time comes in as `now_s`, from any monotonic clock.

Prefill ranks register and refresh themselves. A rank that does not refresh for `rank_ttl_s` is removed. One directory
serves one prefill engine: a rank is refused while the directory holds *rivals* of it. The rivals of a rank are

    a run at the same place, at another address     a second engine, or a restarted one that listens elsewhere
    ranks that describe their server differently    a second engine, or one that was restarted with another shape

A process that was restarted at its old address is no rival of its earlier run, since two processes cannot listen at one
address. In the other cases the entries cannot distinguish a second engine from a restarted one. The caller therefore
checks whether the rival is alive (`http`, `alive`). A rival that is gone is removed immediately, so a crashed engine
can restart within its old lease; a rival that is alive stays. If a rival does not answer, the new rank has to wait
until the rival's lease ends.

The directory also stores hints: the data-parallel rank that a room was sent to. A router leaves a hint before the room
is opened. It does not depend on the state of the room, and expires on its own.

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
    """One prefill rank: the address of its manager, its place in the engine, and the shape of its cache.

    Each `*_rank` is in [0, `*_size`). `attn_dp_*` counts data-parallel attention groups inside one server, and
    `system_dp_*` counts whole replicas behind one directory; only one of the two sizes is larger than 1.

    SGLang has no `kv_heads`, `stages` and `interleave`: kvroom adds them, so that a decode rank can compute its sources
    (`parallel`). kvroom also adds `incarnation`, which distinguishes the runs of a process at one address; 0 means not
    stated.
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
        """Address of the rank's manager, as `Links.dial` takes it."""
        return str(HostPort.to_dial(self.rank_ip, self.rank_port))

    @property
    def run(self) -> tuple[str, int]:
        """Identity of the rank's process: its address and its incarnation."""
        return self.address, self.incarnation

    @property
    def place(self) -> Place:
        """Place of the rank in its engine. The data-parallel rank is that of the server or of the replicas."""
        dp_rank = self.attn_dp_rank if self.system_dp_size == 1 else self.system_dp_rank
        return Place(dp_rank, self.attn_cp_rank, self.attn_tp_rank, self.pp_rank)

    @property
    def parallel(self) -> Parallel:
        """The split of the model over the engine's ranks; the same for every rank of the engine."""
        return self.server.parallel

    @property
    def server(self) -> ServerInfo:
        """This rank's description of its whole server. All ranks of one server must give the same description."""
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
    """The prefill server as a whole: the answer to `GET /route` with -1 for every rank.

    SGLang's clients reject unknown fields, so the fields that kvroom adds are left out while they have their defaults.
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
        """The split of the model over the engine's ranks. Raises `ConfigurationError` if it is impossible."""
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
        """Number of ranks of the server when all are registered."""
        return self.dp_size * self.attn_cp_size * self.attn_tp_size * self.pp_size


class NotReady(BootstrapError):
    """Retryable: the directory does not answer, or some prefill ranks have not registered yet."""


class Contradiction(BootstrapError):
    """The rank describes its server differently from another live rank. The rank was not registered."""


class PlaceHeld(BootstrapError):
    """A live rank of another engine holds the place of this rank. The rank was not registered."""


class Undecided(NotReady):
    """Retryable: a rival of the rank does not answer, and keeps its entry until its lease ends."""


class _Entry(NamedTuple):
    rank: RankInfo
    until_s: float
    refused: str = ""
    """Address of the last rank that was refused this place, until the holder's next refresh has returned it."""


class _Hint(NamedTuple):
    dp_rank: int
    until_s: float


class Directory:
    """Registrations and hints. Each method first removes expired entries. No method blocks."""

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
        # Both are in the order of expiry: entries of a kind live equally long, and a refreshed one moves to the end.
        self._ranks: dict[Place, _Entry] = {}
        self._hints: dict[int, _Hint] = {}

    def rivals(self, rank: RankInfo, now_s: float) -> list[RankInfo]:
        """Return the rivals of a rank, by place (see the module). Without rivals, the rank can be registered."""
        self._expire(now_s)
        # All registered ranks describe the same server, so comparing with one rank at another place is enough.
        other = next((entry.rank for place, entry in self._ranks.items() if place != rank.place), None)
        contradicted = other is not None and bool(_differing(rank.server, other.server))
        found = [
            entry.rank
            for place, entry in self._ranks.items()
            if (contradicted if place != rank.place else entry.rank.address != rank.address)
        ]
        return sorted(found, key=lambda rival: rival.place)

    def register(self, rank: RankInfo, now_s: float) -> str:
        """Register or refresh a rank until `now_s` + `rank_ttl_s`.

        Returns the address of a rank that was refused this place since the last refresh, or "". Raises `PlaceHeld` or
        `Contradiction` while the rank has rivals, and `LimitExceeded` when the directory is full. The registered ranks
        are unchanged then.
        """
        rivals = self.rivals(rank, now_s)
        held = self._ranks.get(rank.place)
        if held is not None and held.rank in rivals:
            self._ranks[rank.place] = held._replace(refused=rank.address)
            raise PlaceHeld(
                f"the rank at {rank.place} is registered by another prefill engine at {held.rank.address}, which is "
                f"alive: one directory serves one prefill engine; stop that engine, or give the engine at "
                f"{rank.address} a directory of its own"
            )
        if rivals:
            differing = _differing(rank.server, rivals[0].server)
            raise Contradiction(
                f"the rank at {rank.place} contradicts the rank at {rivals[0].place} ({rivals[0].address}): "
                f"{differing}; start all ranks of a prefill engine with the same options, and give another engine a "
                f"directory of its own"
            )
        if held is None and len(self._ranks) >= self._max_ranks:
            raise LimitExceeded(
                f"the directory is full (limit {self._max_ranks} ranks): stop unused prefill ranks, or wait until they "
                f"expire"
            )
        self._ranks.pop(rank.place, None)
        self._ranks[rank.place] = _Entry(rank, now_s + self._rank_ttl_s)
        return held.refused if held is not None and held.rank == rank else ""

    def undecided(self, rank: RankInfo, rival: RankInfo, now_s: float) -> Undecided:
        """Return the error for a rank whose rival may or may not be alive. It states when the rival's lease ends."""
        entry = self._ranks.get(rival.place)
        left_s = entry.until_s - now_s if entry is not None else 0.0
        return Undecided(
            f"the rank at {rival.place} is registered by {rival.address}, which does not answer: {rank.address} can "
            f"take its place when its lease ends, in {max(left_s, 0.0):.0f} s, unless {rival.address} renews it"
        )

    def remove(self, rank: RankInfo) -> None:
        """Remove a rank that has ended. Does nothing if another run is registered at its place."""
        entry = self._ranks.get(rank.place)
        if entry is not None and entry.rank.run == rank.run:
            del self._ranks[rank.place]

    def ranks(self, now_s: float) -> list[RankInfo]:
        """Return every live rank, by place."""
        self._expire(now_s)
        return [self._ranks[place].rank for place in sorted(self._ranks)]

    def server(self, now_s: float) -> ServerInfo:
        """Return the server that the live ranks form. Raises `NotReady` while one of its ranks is missing."""
        self._expire(now_s)
        found = len(self._ranks)
        if not found:
            raise NotReady("no prefill rank is registered: is the prefill worker up?")
        server = self._ranks[min(self._ranks)].rank.server
        if found < server.ranks:
            raise NotReady(f"{found} of {server.ranks} prefill ranks are registered: wait for the others")
        return server

    def find(self, place: Place, now_s: float) -> RankInfo:
        """Return the rank at a place.

        Raises `NotReady` while a rank of the server is missing, and `BootstrapError` if the server has no such place.
        """
        self.server(now_s)
        entry = self._ranks.get(place)
        if entry is None:
            raise BootstrapError(f"no prefill rank is registered at {place}")
        return entry.rank

    def register_dp_rank(self, room: int, dp_rank: int, now_s: float) -> None:
        """Store a hint until `now_s` + `hint_ttl_s`. Raises `LimitExceeded`, and stores nothing, at the limit."""
        self.register_dp_ranks({room: dp_rank}, now_s)

    def register_dp_ranks(self, dp_ranks: Mapping[int, int], now_s: float) -> None:
        """Store hints, room -> rank. Raises `LimitExceeded`, and stores none of them, at the limit."""
        self._expire(now_s)
        more = sum(room not in self._hints for room in dp_ranks)
        if len(self._hints) + more > self._max_hints:
            raise LimitExceeded(
                f"too many room hints: the directory holds {len(self._hints)} (limit {self._max_hints}) and cannot "
                f"store {more} more; each expires after {self._hint_ttl_s:.0f} s: retry later"
            )
        for room, dp_rank in dp_ranks.items():
            self._hints.pop(room, None)
            self._hints[room] = _Hint(dp_rank, now_s + self._hint_ttl_s)

    def query_dp_ranks(self, rooms: Iterable[int], now_s: float) -> dict[int, int]:
        """Return room -> data-parallel rank for those of `rooms` that have a hint."""
        self._expire(now_s)
        return {room: self._hints[room].dp_rank for room in rooms if room in self._hints}

    def _expire(self, now_s: float) -> None:
        while self._ranks and self._ranks[place := next(iter(self._ranks))].until_s <= now_s:
            del self._ranks[place]
        while self._hints and self._hints[room := next(iter(self._hints))].until_s <= now_s:
            del self._hints[room]


class RouteList(msgspec.Struct, frozen=True):
    """The answer to `GET /route` without parameters (kvroom's addition: SGLang's server answers 400)."""

    ranks: list[RankInfo]


def check_listed(bootstrap_addr: str, ranks: Sequence[RankInfo]) -> None:
    """Raise `BootstrapError` unless the ranks that a directory lists are all or some of the ranks of one server.

    The list determines how many connections a decode rank opens, and to which addresses. It may therefore contain no
    more ranks than the server that they describe, each at a different place. If two ranks have the same address, this
    raises `NotReady`: a restarted engine may have assigned its addresses differently, and its old entries expire.
    """
    if not ranks:
        return
    listed = f"bootstrap directory {bootstrap_addr} lists {len(ranks)} prefill ranks"
    server = ranks[0].server
    if len(ranks) > min(server.ranks, MAX_RANKS):
        raise BootstrapError(
            f"{listed}, but they describe a server of {server.ranks} (dp {server.dp_size} x cp {server.attn_cp_size} x "
            f"tp {server.attn_tp_size} x pp {server.pp_size}), and the limit is {MAX_RANKS}: is it a kvroom bootstrap "
            f"directory?"
        )
    if odd := next((rank for rank in ranks if _differing(rank.server, server)), None):
        raise BootstrapError(
            f"{listed} that contradict each other: the rank at {odd.place} has {_differing(odd.server, server)}; start "
            "all ranks of a prefill engine with the same options, and give another engine a directory of its own"
        )
    if (places := len({rank.place for rank in ranks})) != len(ranks):
        raise BootstrapError(f"{listed} at only {places} places: is it a kvroom bootstrap directory?")
    if (addresses := len({rank.address for rank in ranks})) != len(ranks):
        raise NotReady(
            f"{listed} at only {addresses} addresses, but each rank must have its own: retry when all ranks are up"
        )


class DpRankHint(msgspec.Struct, frozen=True):
    """The body of `POST /register_dp_rank`."""

    bootstrap_room: RoomNumber
    dp_rank: Rank


class DpRankHints(msgspec.Struct, frozen=True):
    """The body of `POST /register_dp_ranks` (kvroom's addition): hints for many rooms, which are the JSON keys."""

    dp_ranks: Annotated[dict[RoomNumber, Rank], Meta(max_length=MAX_QUERIED_ROOMS)]


class DpRankQuery(msgspec.Struct, frozen=True):
    """The body of `POST /query_dp_ranks`. The answer maps rooms (as JSON keys) to ranks.

    With `wait_s` (kvroom's addition), if no room has a hint, the directory answers as soon as one has, or with an empty
    object after that time.
    """

    bootstrap_rooms: Annotated[list[RoomNumber], Meta(max_length=MAX_QUERIED_ROOMS)]
    wait_s: Annotated[float, Meta(ge=0, le=MAX_WAIT_S)] = 0


# msgspec (0.22) inspects a type at its first use, and two threads that do so at the same time can crash the process,
# for instance two managers that start together. So each type is used here for the first time, during the import.
for _kind in (RouteList, DpRankHint, DpRankHints, DpRankQuery):
    msgspec.json.Decoder(_kind)


def _differing(ours: ServerInfo, theirs: ServerInfo) -> str:
    """Return "name ours (not theirs)" for every field in which two descriptions differ, or "".

    `prefill_http_port` may differ between the nodes of one server.
    """
    pairs = ((name, getattr(ours, name), getattr(theirs, name)) for name in ServerInfo.__struct_fields__)
    return ", ".join(
        f"{name} {one} (not {two})" for name, one, two in pairs if one != two and name != "prefill_http_port"
    )
