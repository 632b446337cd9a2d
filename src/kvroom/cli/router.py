"""`kvroom router`: run `smg` in its PD mode, with the settings that kvroom's workers need.

`kvroom router` becomes smg by `execve`, so that signals, exit status and output are those of smg. smg takes its API
keys only as arguments, and every user of the machine can read the arguments of a process. So the new process runs this
module instead of smg's own, which reads the keys from the environment and adds them to the arguments in its memory:

    python -m kvroom.cli.router ARGUMENT...    # smg with these arguments, and with those keys
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvroom.errors import ConfigurationError
from kvroom.network import API_KEY_FILE_VARIABLE, API_KEY_VARIABLE, HostPort, load_api_keys, read_url

from .options import LOOPBACK, RouterOptions
from .ports import bound, free_port, port_of
from .processes import die_with_parent

OWN_ARGUMENTS = ("--host", "--port", "--policy", "--prefill", "--decode", "--log-level", "--api-key")
"""Arguments of smg that `kvroom router` sets from its own option of the same name."""
PROXY_VARIABLES = frozenset({"http_proxy", "https_proxy", "all_proxy"})
"""Names of variables in lower case; HTTP clients read the same names in upper case as well."""


class PrefillUrl(NamedTuple):
    """A prefill worker in the router's configuration."""

    url: str
    bootstrap_port: int


def run_router(options: RouterOptions) -> int:
    """Replace this process with smg. This function never returns; it raises if smg cannot be started."""
    # SIGKILL and not SIGTERM: smg has no state to save, and on SIGTERM it waits for load balancers to drain.
    die_with_parent(options.parent_pid, signal.SIGKILL)
    if importlib.util.find_spec("smg") is None:
        raise ConfigurationError("the router smg is not installed: run `pip install 'kvroom[serve]'`")
    check_passed_on(options.smg)
    prefills = []
    for url, text in options.prefill:
        named = read_url(url)
        if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
            raise ConfigurationError(
                f"--prefill {url} {text}: {text!r} is not a bootstrap port; give a number in [1, 65536)"
            )
        prefills.append(PrefillUrl(named, int(text)))
    for given in (options.host, *(prefill.url for prefill in prefills), *options.decode):
        if "%" in given:
            raise ConfigurationError(
                f"{given} is a link-local address, which the router smg does not support: use another address"
            )
    with bound(options.host, options.port, "--port") as found:
        port, addresses = port_of(found), [HostPort.of_socket(sock.getsockname()).host for sock in found]
    # smg listens at one address only. For every interface that is the last one, `::`, which accepts both families.
    host = addresses[0] if options.host else addresses[-1]
    where, metrics_port = HostPort(host, port), free_port(LOOPBACK)
    argv = smg_arguments(
        where,
        prefills,
        options.decode,
        policy=options.policy,
        metrics_port=metrics_port,
        log_level="warn" if options.log_level == "warning" else options.log_level,
    )
    argv += options.smg  # last, because smg takes the last value of an argument that is given twice
    environ = with_api_keys(without_proxies(os.environ), load_api_keys(os.environ, options.api_key))
    os.execve(sys.executable, [sys.executable, "-m", "kvroom.cli.router", *argv], environ)


def without_proxies(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables that make HTTP clients use a proxy.

    smg would send its requests to the workers through the proxy, which is meant for hosts outside and often cannot
    resolve the names of workers.
    """
    return {name: value for name, value in environ.items() if name.lower() not in PROXY_VARIABLES}


def with_api_keys(environ: Mapping[str, str], keys: Sequence[bytes]) -> dict[str, str]:
    """Return the environment for a child process that has to use exactly these API keys."""
    kept = {name: value for name, value in environ.items() if name not in (API_KEY_VARIABLE, API_KEY_FILE_VARIABLE)}
    return {**kept, API_KEY_VARIABLE: b" ".join(keys).decode()} if keys else kept


def check_passed_on(arguments: Sequence[str]) -> None:
    """Raise `ConfigurationError` for an argument after `--` that `kvroom router` sets from an option of its own.

    smg would take it instead of the option, so that the router would listen elsewhere, or serve other workers, than its
    command line says. smg also accepts the beginning of an argument's name, so that counts as the argument.
    """
    for argument in arguments:
        name = argument.partition("=")[0]
        for own in OWN_ARGUMENTS:
            if len(name) > len("--") and own.startswith(name):
                raise ConfigurationError(
                    f"-- {argument}: kvroom router sets smg's {own} itself; give its own option {own}, before the --"
                )


def smg_arguments(
    where: HostPort,
    prefills: Sequence[PrefillUrl],
    decodes: Sequence[str],
    *,
    policy: str,
    metrics_port: int,
    log_level: str,
) -> list[str]:
    """Return smg's arguments for these workers."""
    argv = ["--pd-disaggregation", "--host", where.host, "--port", str(where.port), "--policy", policy]
    argv += ["--prometheus-host", LOOPBACK, "--prometheus-port", str(metrics_port), "--log-level", log_level]
    for prefill in prefills:
        argv += ["--prefill", prefill.url, str(prefill.bootstrap_port)]
    for url in decodes:
        argv += ["--decode", url]
    # The workers tokenize. Without this option smg tries to download the model's tokenizer from a hub.
    argv += ["--disable-tokenizer-autoload", "--worker-startup-check-interval", "1"]
    argv += ["--shutdown-grace-period-secs", "1"]
    if len(prefills) == 1 or len(decodes) == 1:
        # With a single worker of a role, an open circuit breaker leaves smg no other worker: two failed requests would
        # make it refuse every request for a minute.
        argv.append("--disable-circuit-breaker")
    return argv


def key_arguments(keys: tuple[bytes, ...]) -> list[str]:
    """Return smg's arguments for these keys.

    smg also uses the first key for its own requests to the workers; it accepts the others as keys of tenants.
    """
    first = ["--api-key", keys[0].decode()] if keys else []
    others = [text for index, key in enumerate(keys[1:], 1) for text in ("--tenant-api-key", f"{index}:{key.decode()}")]
    return [*first, *others]


if __name__ == "__main__":
    sys.argv += key_arguments(load_api_keys(os.environ))
    runpy.run_module("smg.launch_router", run_name="__main__")
