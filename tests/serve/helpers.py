"""Start real processes with a tiny random model, send HTTP requests to them, and end them."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

import psutil

from engine.tiny import byte_tokenizer, tiny
from kvroom.cli.processes import Ready, parse_ready

START_S = 120
END_S = 30
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role: ' + m.role) }}{% endif %}"
    "<{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if mood is defined %}({{ mood }}){% endif %}{% endif %}"
)


def save_tiny_model(directory: Path, *, kind: str = "llama", positions: int = 256) -> Path:
    """Save a random model of `engine.tiny` in transformers' format; token i is byte i. It has a chat template."""
    tiny(kind, max_position_embeddings=positions).reference.save_pretrained(directory)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


class Process:
    """One running `kvroom` command, whose ready line has been read."""

    def __init__(self, popen: subprocess.Popen[str], ready: Ready) -> None:
        self.popen = popen
        self.ready = ready

    @property
    def url(self) -> str:
        return self.ready.facts["url"]

    @property
    def admin(self) -> str:
        """Return its admin URL: rooms, metrics, and other routes of the operator."""
        return self.ready.facts["admin_url"]

    def family(self) -> list[psutil.Process]:
        """Return the process and all of its descendants."""
        parent = psutil.Process(self.popen.pid)
        return [parent, *parent.children(recursive=True)]

    def end(self, number: signal.Signals = signal.SIGINT) -> tuple[int, str]:
        """Send a signal, wait, and return the exit status and the text of stderr."""
        self.popen.send_signal(number)
        _, errors = self.popen.communicate(timeout=END_S)
        return self.popen.returncode, errors


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kvroom", *arguments]


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment without variables of kvroom, with one thread for torch and with `changes`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("KVROOM_")}
    return {**kept, "OMP_NUM_THREADS": "1", **changes}


@contextmanager
def running(*arguments: str, **changes: str) -> Iterator[Process]:
    """Run a `kvroom` command that serves until the block ends."""
    with running_with_log(subprocess.PIPE, *arguments, **changes) as process:
        yield process


@contextmanager
def running_with_log(stderr: int | IO[str], *arguments: str, **changes: str) -> Iterator[Process]:
    """Run a `kvroom` command that serves until the block ends, with this stderr."""
    with subprocess.Popen(
        command(*arguments), env=environment(**changes), text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=stderr,
    ) as popen:  # fmt: skip
        try:
            assert popen.stdout is not None
            ready = parse_ready(popen.stdout.readline())
            if ready is None:
                raise AssertionError(f"{arguments} did not get ready: {popen.communicate(timeout=END_S)[1]}")
            process = Process(popen, ready)
            yield process
        finally:
            if popen.poll() is None:
                popen.send_signal(signal.SIGINT)
                popen.communicate(timeout=END_S)


def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a `kvroom` command that ends by itself."""
    return subprocess.run(
        command(*arguments), env=environment(**changes), text=True, capture_output=True, timeout=START_S, check=False
    )


class Response(NamedTuple):
    """One HTTP response with its whole body."""

    status: int
    headers: dict[str, str]
    text: str

    def json(self) -> Any:
        return json.loads(self.text)

    def events(self) -> list[Any]:
        """Return the events of a stream, which has to end with `[DONE]`."""
        lines = [line.removeprefix("data: ") for line in self.text.splitlines() if line.startswith("data: ")]
        assert lines[-1:] == ["[DONE]"], self.text
        return [json.loads(line) for line in lines[:-1]]


def post(url: str, path: str, body: Any) -> Response:
    """Send a POST with a JSON body, or with the given bytes."""
    with begin_post(url, path, body) as connection:
        return finish(connection)


@contextmanager
def begin_post(
    url: str, path: str, body: Any, headers: Mapping[str, str] | None = None, *, method: str = "POST"
) -> Iterator[http.client.HTTPConnection]:
    """Send a request and yield its connection before the response; the end of the block closes the connection."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        connection.request(method, path, raw, {"Content-Type": "application/json", **(headers or {})})
        yield connection
    finally:
        connection.close()


def finish(connection: http.client.HTTPConnection) -> Response:
    """Read the response to a request that `begin_post` has sent."""
    response = connection.getresponse()
    return Response(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read().decode())


def get(url: str, path: str, headers: Mapping[str, str] | None = None) -> Response:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        connection.request("GET", path, headers=dict(headers or {}))
        return finish(connection)
    finally:
        connection.close()


def admin_of(url: str) -> str:
    """Return the admin URL of the worker with the client URL `url`."""
    admin: str = get(url, "/server_info").json()["admin_url"]
    return admin


def look(url: str, path: str) -> Response:
    """Send a GET to the admin address of the worker with the client URL `url`."""
    response = get(admin_of(url), path)
    assert ("retry-after" in response.headers) == (response.status == 503)
    return response


def flush(url: str) -> Response:
    """Flush every cached page of a worker that no request uses."""
    return post(admin_of(url), "/flush_cache", {})


def assert_idle(urls: Sequence[str]) -> None:
    """Assert that every worker is idle within seconds: no request and no room is open."""
    for url in urls:
        response = look(url, "/rooms?idle_within_s=20")
        assert response.status == 200, f"{url}: {response.text}"
