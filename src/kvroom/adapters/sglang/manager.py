"""The parts of kvroom in an SGLang server: a manager in its scheduler, and on the prefill side a bootstrap directory.

SGLang creates the manager once, in the scheduler's process, when the model is loaded. It creates the directory in the
process of its HTTP server, at about the same time. It closes neither.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.disaggregation.base.conn import BaseKVBootstrapServer, BaseKVManager
from sglang.srt.runtime_context import get_device, get_disagg, get_serving

from kvroom import KVBootstrapServer, KVManager, LinkLimits, load_secret, wait_until_up
from kvroom.errors import ConfigurationError
from kvroom.network import load_admin_token
from kvroom.status import StatusServer

from . import hooks, layout, support
from .rows import Rows
from .settings import PREFIX, SGLangSettings, directory_address

if TYPE_CHECKING:
    from .receiver import KVRoomKVReceiver

log = logging.getLogger(f"sglang.{__name__}")
DIRECTORY_TIMEOUT_S = 120.0
_DEFERRED_RELEASE = "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE"


class KVRoomKVBootstrapServer(BaseKVBootstrapServer):
    """The bootstrap directory of a prefill server, on SGLang's `--host` and `--disaggregation-bootstrap-port`."""

    def __init__(self, host: str, port: int) -> None:
        """Start to listen. Raises `ConfigurationError` if the port is taken, or for a host that requires a secret."""
        self._server = KVBootstrapServer(host, port, secret=load_secret(os.environ))
        log.info("kvroom's bootstrap directory listens at %s", self._server.start())

    def close(self) -> None:
        """Stop listening. Only tests call this: SGLang never closes its directory."""
        self._server.close()


class _EveryPrefillServer:
    """A replacement for SGLang's table of known prefill servers, which contains every address.

    Without an entry for a prefill server, SGLang would query its directory over HTTP in the scheduler's thread. A room
    finds its prefill rank in kvroom's thread.
    """

    _info = SimpleNamespace(dp_size=1, follow_bootstrap_room=True, prefill_http_port=None)

    def get(self, bootstrap_addr: str, default: object = None) -> Any:  # noqa: ARG002 - a dict's signature
        return self._info


class KVRoomKVManager(BaseKVManager):
    """SGLang's manager of a scheduler: kvroom's `KVManager` over the scheduler's pool.

    Beside it, this class has the attributes and methods that SGLang's queues use.
    """

    supports_deferred_decode_kv_release = True
    enable_deferred_decode_kv_release = True
    supports_host_destination = False
    supports_role_switch = False
    enable_staging = False
    is_dummy_cp_rank = False

    def __init__(
        self, args: Any, disaggregation_mode: Any, server_args: Any, is_mla_backend: bool | None = False
    ) -> None:
        """Open the manager over the pool that `args`, SGLang's `KVArgs`, describes.

        Raises `ConfigurationError`, `BootstrapError` or `TransportError`. SGLang's server then ends with that message.
        """
        mode = str(disaggregation_mode.value)
        settings = SGLangSettings.read(os.environ)
        support.check(server_args, mode)
        if mode == "decode":
            settings.check_allowed(str(get_serving().host))
        _require_deferred_release(mode)
        for name in settings.unknown(os.environ):
            log.warning("unknown setting %s: check its spelling; names that begin with %s are kvroom's", name, PREFIX)
        self.kv_args = args
        self.rows = Rows(args)
        model = ModelConfig.from_server_args(server_args)
        self.vocab_size = int(model.vocab_size)
        kind = str(get_device().device)
        device = "cpu" if kind == "cpu" else f"{kind}:{args.gpu_id or 0}"  # `gpu_id` may be None
        pool = layout.describe(
            args,
            device=device,
            model=layout.fingerprint(model, args),
            latent=bool(is_mla_backend),
        )
        hooks.install_in_scheduler()
        secret, serving_host = load_secret(os.environ), str(get_serving().host)
        directory = None
        if mode == "prefill":
            directory = directory_address(serving_host, int(get_disagg().disaggregation_bootstrap_port))
            wait_until_up(directory, DIRECTORY_TIMEOUT_S)
        self.manager = KVManager(
            pool,
            host=settings.listen_host(serving_host),
            port=settings.link_port,
            advertise_host=settings.advertise_host,
            transport=settings.transport,
            transport_options=settings.transport_options,
            trusted_fabric=settings.trusted_fabric,
            bootstrap_allow=settings.bootstrap_allow if mode == "decode" else None,
            secret=secret,
            register_with=directory,
            timeouts=settings.timeouts,
            link_limits=LinkLimits(heartbeat_s=settings.heartbeat_s),
            checksum=settings.checksum,
        )
        self.prefill_info_table = _EveryPrefillServer()
        self._held: dict[int, list[KVRoomKVReceiver]] = {}
        self._background: ThreadPoolExecutor | None = None
        self._status_server = self._start_status_server(settings)
        size = f"{pool.pages} pages of {pool.page_tokens} tokens on {pool.regions[0].device}"
        log.info("kvroom hands over %s, %s side, listening at %s", size, mode, self.manager.address)

    def register_to_bootstrap(self) -> None:
        """Do nothing: the constructor has registered this rank, and the library keeps it registered."""

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:  # noqa: ARG002 - SGLang's signature
        """Return True, because every prefill server counts as known; see `_EveryPrefillServer`."""
        return True

    def submit_prefill_recompute(self, receiver: Any, payload: Any) -> None:  # noqa: ARG002 - SGLang's signature
        """Fail a request that a pause has retracted: another prefill of its prompt is not supported."""
        receiver.refuse(
            "the request was retracted by a pause, after which its prompt must be prefilled again, which kvroom does "
            "not support: send the request again"
        )

    def in_background(self, call: Callable[[], None]) -> Future[None]:
        """Run `call` in this manager's background thread, after all earlier calls have returned."""
        if self._background is None:
            self._background = ThreadPoolExecutor(1, thread_name_prefix="kvroom-device")
        return self._background.submit(call)

    # -- pages of requests that have failed, on the decode side ----------------------------------------------------

    def hold(self, receiver: KVRoomKVReceiver) -> None:
        """Hold the pages of a failed request until its room has released them.

        SGLang asks for them by room number. Two failed requests can have used the same number one after the other, so
        there is a list for each number.
        """
        self._held.setdefault(receiver.bootstrap_room or 0, []).append(receiver)

    def is_abort_release_safe(self, bootstrap_room: int, required_acks: int) -> bool:  # noqa: ARG002 - SGLang's signature
        """Return True when no writer can touch the pages of any failed request of this room number."""
        return all(receiver.released for receiver in self._held.get(bootstrap_room, ()))

    def clear_deferred_abort_state(self, bootstrap_room: int) -> None:
        """Remove the requests of this room number whose pages are released. SGLang calls this when it frees them."""
        left = [receiver for receiver in self._held.pop(bootstrap_room, []) if not receiver.released]
        if left:
            self._held[bootstrap_room] = left

    def counts(self) -> dict[str, int]:
        """Return the number of requests whose pages are held, for the status server. Callable from any thread."""
        return {"held": sum(len(receivers) for receivers in list(self._held.values()))}

    # -- start and end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End every room, notify the peers, and stop the threads. Only tests call this: SGLang never does."""
        if self._status_server is not None:
            self._status_server.close()
        if self._background is not None:
            self._background.shutdown()
        self.manager.close()

    def _start_status_server(self, settings: SGLangSettings) -> StatusServer | None:
        """Serve the state of this server's rooms over HTTP, for `kvroom rooms`, unless `rooms_port` is None."""
        if settings.rooms_port is None:
            return None
        server = StatusServer(
            self.manager,
            settings.rooms_host,
            settings.rooms_port,
            token=load_admin_token(os.environ),
            extra=lambda: {"requests": self.counts()},
        )
        server.start()
        log.info("rooms of this server: kvroom rooms %s", server.url)
        return server


def _require_deferred_release(mode: str) -> None:
    """Raise `ConfigurationError` if SGLang is configured to free pages of failed requests immediately."""
    from sglang.srt.environ import envs

    if mode == "decode" and not envs.SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE.get():
        raise ConfigurationError(
            f"{_DEFERRED_RELEASE} is off, so SGLang would free pages while the prefill side may still write into them, "
            f"and the next request would read them: unset this variable"
        )
