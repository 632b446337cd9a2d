"""`kvroom prefill` and `kvroom decode`: run one worker process.

The cheapest checks come first (settings, then ports, then the model), so that a mistake is reported without delay.
"""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack

from kvroom import load_machine, load_secret
from kvroom.errors import ConfigurationError
from kvroom.network import (
    HostPort,
    advertised_host,
    is_wildcard,
    load_admin_token,
    load_api_keys,
    require_allowed,
    require_secret,
)
from kvroom.status import Admission, configure_logs
from kvroom.transports import find

from .interrupts import run_until_interrupted
from .options import DecodeOptions, PrefillOptions
from .ports import bound, port_of
from .processes import die_with_parent
from .progress import progress


def run_worker(options: PrefillOptions | DecodeOptions) -> int:
    """Serve prefill or decode until SIGINT or SIGTERM."""
    die_with_parent(options.parent_pid, signal.SIGTERM)
    configure_logs(options.log_level, options.log_format)
    find(options.transport)
    require_distinct_ports(options)
    advertised_host(options.host, options.advertise_host, "--advertise-host")
    secret = load_secret(os.environ, options.secret_file)
    require_secret(options.host, secret)
    admission = Admission(options.admin_host, load_admin_token(os.environ))
    named = options.advertise_host if is_wildcard(options.admin_host) else None
    admin_host = advertised_host(options.admin_host, named, "--advertise-host")
    api_keys = load_api_keys(os.environ, options.api_key)
    load_machine(os.environ)  # raises for an invalid KVROOM_MACHINE_ID before the model is loaded
    if isinstance(options, DecodeOptions):
        require_allowed(options.host, options.bootstrap_allow, "--bootstrap-allow '10.0.0.0/8,*.pd.svc'")
    with ExitStack() as stack:
        clients = stack.enter_context(bound(options.host, options.port, "--port"))
        admin = stack.enter_context(bound(options.admin_host, options.admin_port, "--admin-port"))
        # The manager and the directory bind these themselves, after the model is loaded. Bind them here to report a
        # port in use now.
        with bound(options.host, options.link_port, "--link-port"):
            pass
        if isinstance(options, PrefillOptions):
            with bound(options.host, options.bootstrap_port, "--bootstrap-port"):
                pass
        with progress(f"starting: {options.role}, importing torch and transformers") as report:
            # These imports take seconds and hundreds of MB, so they come after all checks that need no torch.
            from kvroom.serve.worker import HttpPorts

            from .serving import load_model, serve

            loaded = load_model(options, report)
        admin_url = HostPort.of(admin_host, port_of(admin)).url()
        http = HttpPorts(clients, admin, admin_url, admission, api_keys)
        run_until_interrupted(serve(options, loaded, secret, http))
    return 0


def require_distinct_ports(options: PrefillOptions | DecodeOptions) -> None:
    """Raise `ConfigurationError` if two options give this worker the same port of one host.

    Binding does not find that out: two sockets that do not listen yet may share a port (SO_REUSEADDR).
    """
    given = {"--port": options.port, "--link-port": options.link_port}
    if isinstance(options, PrefillOptions):
        given["--bootstrap-port"] = options.bootstrap_port
    hosts = (options.host, options.admin_host)
    if hosts[0] == hosts[1] or any(is_wildcard(host) for host in hosts):
        given["--admin-port"] = options.admin_port
    data_port = dict(options.transport_option).get("port")
    if isinstance(data_port, int):
        given["--transport-option port"] = data_port
    taken: dict[int, str] = {}
    for option, port in given.items():
        if port and taken.setdefault(port, option) != option:
            raise ConfigurationError(f"{taken[port]} and {option} are both {port}: give each a port of its own")
