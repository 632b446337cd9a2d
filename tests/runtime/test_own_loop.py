"""The loops of kvroom are asyncio's own, even in a process that has chosen another kind for itself."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
from typing import NoReturn

import pytest
from manager_helpers import Pair

from kvroom.bootstrap.threads import own_loop
from kvroom.status.server import StatusServer


def refuse() -> NoReturn:
    raise AssertionError("the process's kind of loop was asked for")


def test_managers_and_servers_work_where_the_process_has_another_kind_of_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (asyncio, asyncio.events, asyncio.runners):
        monkeypatch.setattr(module.__name__ + ".new_event_loop", refuse, raising=False)
    with contextlib.ExitStack() as stack:
        pair = Pair("memory", stack)
        window = StatusServer(pair.prefill)
        address = window.start()
        stack.callback(window.close)
        pair.check_clean()
        with contextlib.closing(http.client.HTTPConnection(address, timeout=10)) as client:
            client.request("GET", "/health")
            assert client.getresponse().status == 200


def test_it_is_a_loop_of_asyncio() -> None:
    loop = own_loop()
    try:
        assert isinstance(loop, asyncio.SelectorEventLoop)
    finally:
        loop.close()
