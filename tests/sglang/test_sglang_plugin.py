"""The plug-in: its registration, also beside other plug-ins, and its error if SGLang lacks a name."""

from __future__ import annotations

import contextlib
import enum
import importlib
import inspect
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sglang_helpers import in_child, server_args

from kvroom.adapters.sglang import chosen, plugin
from kvroom.errors import ConfigurationError

UTILS = "sglang.srt.disaggregation.utils"
FRESH = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
loaded = sorted(name for name in sys.modules if name.split(".")[0] == "kvroom")
from sglang.srt.arg_groups import choices
from sglang.srt.disaggregation.utils import KVClassType, TransferBackend, get_kv_class
member = TransferBackend("kvroom")
after = sorted(name for name in sys.modules if name.split(".")[0] == "kvroom")
sender = get_kv_class(member, KVClassType.SENDER).__name__
print(json.dumps([loaded, after, choices.DISAGG_TRANSFER_BACKEND_CHOICES.count("kvroom"), member.value, sender]))
"""
LOADED = ["kvroom", "kvroom.adapters", "kvroom.adapters.sglang", "kvroom.adapters.sglang.plugin", "kvroom.tested"]


def modules() -> Any:
    """Return SGLang's modules that the plug-in changes, by name."""
    names = {
        "choices": "sglang.srt.arg_groups.choices", "utils": UTILS, "registry": "sglang.srt.plugins.hook_registry",
        "prefill": "sglang.srt.disaggregation.prefill", "decode": "sglang.srt.disaggregation.decode",
    }  # fmt: skip
    return {name: importlib.import_module(module) for name, module in names.items()}


def registered(*, before: Callable[[Any], None] | None = None, after: Callable[[Any], None] | None = None) -> Any:
    """Register the plug-in in this process, between two others, as `load_plugins` does. Return SGLang's modules."""
    found = modules()
    if before is not None:
        before(found)
    plugin.register()
    if after is not None:
        after(found)
    found["registry"].HookRegistry.apply_hooks()
    return found


# -- what is registered ------------------------------------------------------------------------------------------------


def test_sglang_finds_the_plug_in_and_imports_no_more_than_it_must() -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KVROOM_")}
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH], env=environ | {"SGLANG_PLUGINS": "kvroom"},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout.splitlines()[-1]) == [LOADED, LOADED, 1, "kvroom", "KVRoomKVSender"]


def test_registering_imports_no_more_than_it_must() -> None:
    def call() -> list[str]:
        for name in [name for name in sys.modules if name.split(".")[0] == "kvroom"]:
            del sys.modules[name]
        fresh = importlib.import_module("kvroom.adapters.sglang.plugin")
        fresh.register()
        modules()["registry"].HookRegistry.apply_hooks()
        assert modules()["utils"].TransferBackend("kvroom").value == "kvroom"
        return sorted(name for name in sys.modules if name.split(".")[0] == "kvroom")

    assert in_child(call) == LOADED


def test_the_choice_is_added_once_as_one_word() -> None:
    def call() -> Any:
        listed = modules()["choices"].DISAGG_TRANSFER_BACKEND_CHOICES
        before = list(listed)
        registered()
        return before, list(listed)

    before, after = in_child(call)
    assert after == [*before, "kvroom"]


def test_the_member_is_one_and_the_others_stay() -> None:
    def call() -> Any:
        backends = modules()["utils"].TransferBackend
        others = [backend.value for backend in backends]
        registered()
        member = backends("kvroom")
        with contextlib.suppress(ValueError):
            backends("kvroom2")
            raise AssertionError("an unknown backend was made")
        assert member is backends("kvroom")
        assert isinstance(member, backends)
        assert member not in list(backends)
        assert {member: 1}[backends("kvroom")] == 1
        return others, [backends(value).value for value in others], member.name, str(member)

    others, after, name, text = in_child(call)
    assert after == others
    assert (name, text) == ("KVROOM", "TransferBackend.KVROOM")


def test_a_class_for_every_kind_and_other_backends_are_left_alone() -> None:
    def call() -> Any:
        found = registered()
        utils = found["utils"]
        ours = utils.TransferBackend("kvroom")
        for module in ("prefill", "decode"):  # these have imported the function by name before
            assert found[module].get_kv_class is utils.get_kv_class
        original = utils.get_kv_class.__wrapped__
        for backend in (utils.TransferBackend.FAKE, utils.TransferBackend.NIXL):
            for kind in (utils.KVClassType.KVARGS, utils.KVClassType.SENDER):
                with contextlib.suppress(ImportError):  # SGLang's own class for NIXL
                    assert utils.get_kv_class(backend, kind) is original(backend, kind)
        return {kind.value: utils.get_kv_class(ours, kind).__qualname__ for kind in utils.KVClassType}

    assert in_child(call) == {
        "kvargs": "KVArgs",
        "manager": "KVRoomKVManager",
        "sender": "KVRoomKVSender",
        "receiver": "KVRoomKVReceiver",
        "bootstrap_server": "KVRoomKVBootstrapServer",
    }


# -- beside other plug-ins ---------------------------------------------------------------------------------------------


def by_hooks(found: Any) -> None:
    """Add a backend `other` in the way in which kvroom adds its own."""
    utils, registry = found["utils"], found["registry"]

    def member(original: Any, value: object) -> Any:
        if value != "other":
            return original(value)
        made = object.__new__(utils.TransferBackend)
        made._name_, made._value_ = "OTHER", "other"
        return made

    def kv_class(original: Any, backend: Any, kind: Any) -> Any:
        return dict if backend.value == "other" else original(backend, kind)

    found["choices"].DISAGG_TRANSFER_BACKEND_CHOICES.extend(["other"])
    registry.HookRegistry.register(f"{UTILS}.TransferBackend._missing_", member, registry.HookType.AROUND)
    registry.HookRegistry.register(f"{UTILS}.get_kv_class", kv_class, registry.HookType.AROUND)


def by_replacing(found: Any) -> None:
    """Add a backend `other` as Xinference does: with another class in place of SGLang's."""
    utils, registry = found["utils"], found["registry"]
    members = {backend.name: backend.value for backend in utils.TransferBackend} | {"OTHER": "other"}
    registry.HookRegistry.register(
        f"{UTILS}.TransferBackend", enum.Enum("TransferBackend", members), registry.HookType.REPLACE
    )

    def kv_class(original: Any, backend: Any, kind: Any) -> Any:
        return dict if backend.value == "other" else original(backend, kind)

    registry.HookRegistry.register(f"{UTILS}.get_kv_class", kv_class, registry.HookType.AROUND)


@pytest.mark.parametrize("other", [by_hooks, by_replacing])
@pytest.mark.parametrize("order", ["before", "after"])
def test_another_plug_in_with_a_backend_works_too(other: Any, order: str) -> None:
    def call() -> Any:
        utils = registered(**{order: other})["utils"]
        kind = utils.KVClassType.SENDER
        ours, theirs = utils.TransferBackend("kvroom"), utils.TransferBackend("other")
        with contextlib.suppress(ValueError):
            utils.TransferBackend("neither")
            raise AssertionError("an unknown backend was made")
        return [utils.get_kv_class(one, kind).__name__ for one in (ours, theirs, utils.TransferBackend.FAKE)]

    assert in_child(call) == ["KVRoomKVSender", "dict", "FakeKVSender"]


# -- missing names -----------------------------------------------------------------------------------------------------


class Hidden:
    """A double of a module or class of SGLang in which one name is missing, or takes no parameters."""

    def __init__(self, found: object, path: tuple[str, ...], parameters: bool) -> None:
        self._found, self._path, self._parameters = found, path, parameters

    def __getattr__(self, name: str) -> Any:
        inner = getattr(self._found, name)
        if name != self._path[0]:
            return inner
        if self._path[1:]:
            return Hidden(inner, self._path[1:], self._parameters)
        if not self._parameters:
            raise AttributeError(name)
        return lambda: None

    def __call__(self) -> None:
        """Do nothing: the plug-in only inspects the double and never calls it."""

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._found)  # type: ignore[arg-type] # a class of SGLang's


@contextlib.contextmanager
def without(module: str, path: str = "", *, parameters: bool = False) -> Iterator[None]:
    """Hide a module, a name in it, or the parameters of the callable of that name, from the plug-in."""
    real = importlib.import_module

    def look(name: str) -> Any:
        if name != module:
            return real(name)
        if not path:
            raise ImportError(name)
        return Hidden(real(name), tuple(path.split(".")), parameters)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib, "import_module", look)
        yield


NEEDED = [*plugin._REQUIRED, *chosen.REQUIRED]
said_of_all = pytest.mark.parametrize(("module", "path", "parameters"), NEEDED, ids=[f"{m}.{p}" for m, p, _ in NEEDED])


def test_nothing_is_missing_from_the_tested_version() -> None:
    assert plugin.version() in plugin.TESTED
    assert list(plugin.missing(plugin._REQUIRED)) == []
    chosen.check_names()


@said_of_all
def test_missing_names_are_listed(module: str, path: str, parameters: tuple[str, ...]) -> None:
    need = ((module, path, parameters),)
    with without(module):
        (said,) = plugin.missing(need)
        assert said.split(" ")[0] == module
    with without(module, path):
        assert list(plugin.missing(need)) == [f"{module}.{path}"]
    with without(module, path, parameters=True):
        wanted = [f"{module}.{path}({', '.join(parameters)})"] if parameters else []
        assert list(plugin.missing(need)) == wanted


def test_a_plug_in_that_lacks_a_name_logs_one_line_and_registers_nothing(caplog: pytest.LogCaptureFixture) -> None:
    found = modules()
    listed, hooks = found["choices"].DISAGG_TRANSFER_BACKEND_CHOICES, found["registry"].HookRegistry._hooks
    before = list(listed), {target: list(known) for target, known in hooks.items()}
    caplog.set_level(logging.INFO)
    with without(UTILS, "get_kv_class"), without("sglang.srt.server_args", "add_disagg_transfer_backend_choices"):
        plugin.register()
    assert (list(listed), {target: list(known) for target, known in hooks.items()}) == before
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "\n" not in record.getMessage()
    assert re.fullmatch(
        rf"the transfer backend kvroom is not available: SGLang {re.escape(plugin.version())} lacks .*"
        rf"kvroom was tested with SGLang {re.escape(plugin.TESTED[0])}: install a tested version of SGLang, .*",
        record.getMessage(),
    )


def test_a_chosen_backend_that_lacks_a_name_ends_the_server() -> None:
    with (
        without("sglang.srt.disaggregation.base.conn", "BaseKVSender.send", parameters=True),
        pytest.raises(
            ConfigurationError, match=r"lacks .*send\(kv_indices, state_indices, num_kv_tokens\); kvroom was"
        ),
    ):
        chosen.check(server_args("prefill"))


# -- options are checked as soon as they are parsed --------------------------------------------------------------------


def resolved(**options: Any) -> str:
    """Register, resolve a server's options as its launcher does, and return the exception."""
    args = type(server_args("prefill"))(
        model_path=server_args("prefill").model_path, device="cpu", attention_backend="torch_native",
        **{"disaggregation_transfer_backend": "kvroom", **options},
    )  # fmt: skip

    def call() -> str:
        registered()
        try:
            args.resolve_once()
        except (ValueError, ConfigurationError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    return str(in_child(call))


def test_options_are_refused_at_sglangs_own_step() -> None:
    for mode in ("prefill", "decode"):
        said = resolved(disaggregation_mode=mode, tp_size=2)
        assert said.startswith("ConfigurationError: the transfer backend kvroom does not support --tp-size 2 (")
    assert resolved(disaggregation_mode="prefill") == resolved(disaggregation_mode="decode") == ""


def test_servers_of_other_backends_are_not_checked() -> None:
    assert resolved(disaggregation_mode="null", tp_size=2) == ""
    assert resolved(disaggregation_mode="decode", tp_size=2, disaggregation_transfer_backend="fake") == ""


def test_sglangs_own_checks_of_the_step_stay() -> None:
    said = resolved(disaggregation_mode="decode", disaggregation_decode_host_receive_threshold=2)
    assert said.startswith("ValueError: --disaggregation-decode-host-receive-threshold must be between 0 and 1")


def test_settings_are_checked_at_that_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVROOM_STALL_S", "soon")
    assert "KVROOM_STALL_S is 'soon'" in resolved(disaggregation_mode="decode")
    monkeypatch.delenv("KVROOM_STALL_S")
    monkeypatch.setenv("KVROOM_ADVERTISE_HOST", "[::]")
    assert "KVROOM_ADVERTISE_HOST '[::]' means every" in resolved(disaggregation_mode="decode", host="0.0.0.0")
    monkeypatch.setenv("KVROOM_ADVERTISE_HOST", "10.0.0.2")
    assert "for example KVROOM_BOOTSTRAP_ALLOW=" in resolved(disaggregation_mode="decode", host="0.0.0.0")
    assert resolved(disaggregation_mode="prefill", host="0.0.0.0") == ""
    monkeypatch.setenv("KVROOM_BOOTSTRAP_ALLOW", "*.pd.svc")
    assert resolved(disaggregation_mode="decode", host="0.0.0.0") == ""
    monkeypatch.delenv("KVROOM_ADVERTISE_HOST")
    monkeypatch.setenv("KVROOM_SECRET", "short")
    assert "too short to be safe" in resolved(disaggregation_mode="decode")
    monkeypatch.delenv("KVROOM_SECRET")
    monkeypatch.setenv("KVROOM_MACHINE_ID", "")
    assert "KVROOM_MACHINE_ID has 0 characters" in resolved(disaggregation_mode="decode")


def test_a_sglang_without_that_step_is_served() -> None:
    def call() -> Any:
        hidden: dict[str, Any] = {"sglang.srt.arg_groups.resolution_hooks": None}  # Python's own way to hide a module
        sys.modules.update(hidden)
        utils = registered()["utils"]
        return utils.get_kv_class(utils.TransferBackend("kvroom"), utils.KVClassType.MANAGER).__name__

    assert in_child(call) == "KVRoomKVManager"
