"""The examples run: the hand-off as it stands, and of what needs other engines the part that can be tried without."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kvroom.adapters.sglang.settings import SGLangSettings

from .pages import ROOT, name_of

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.rglob("*.sh"))
PROGRAMS = sorted(EXAMPLES.rglob("*.py"))


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the root of the repository and return what it wrote."""
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_the_hand_off_runs() -> None:
    done = run(sys.executable, "examples/handoff.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("81920 bytes in ")
    assert done.stdout.endswith("first token: 42\n")


@pytest.mark.parametrize("program", PROGRAMS, ids=name_of)
def test_a_program_says_how_it_is_run(program: Path) -> None:
    text = ast.get_docstring(ast.parse(program.read_text())) or ""
    assert f"python {name_of(program)}" in text


class Server(ThreadingHTTPServer):
    """A server in vLLM's place, that keeps what it was asked."""

    asked: list[Any]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Completions)
        self.asked = []
        threading.Thread(target=self.serve_forever).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Completions(BaseHTTPRequestHandler):
    """Answers each request with one text."""

    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, json.loads(body)))
        answer = json.dumps({"choices": [{"text": " Paris."}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: object) -> None:
        """Write nothing."""


def test_both_legs_of_a_request_to_vllm_name_one_room() -> None:
    prefill, decode = Server(), Server()
    try:
        done = run(sys.executable, "examples/vllm/both_at_once.py", prefill.url, decode.url, "The capital of France is")
    finally:
        prefill.close()
        decode.close()
    assert (done.returncode, done.stderr, done.stdout) == (0, "", " Paris.\n")
    (path, first), (_, second) = prefill.asked[0], decode.asked[0]
    assert path == "/v1/completions"
    assert first["kv_transfer_params"] == second["kv_transfer_params"]
    assert first["kv_transfer_params"].keys() == {"bootstrap_host", "bootstrap_port", "bootstrap_room"}
    assert (first["max_tokens"], second["max_tokens"]) == (1, 32)


@pytest.fixture
def shown(tmp_path: Path) -> dict[str, str]:
    """The environment in which `vllm` and `python` only print their arguments, and the variables of kvroom."""
    printing = '#!/bin/sh\nfor one in "$@"; do printf "%s\\0" "$one"; done\nenv -0 | grep -az ^KVROOM_ || true\n'
    for name in ("vllm", "python"):
        (tmp_path / name).write_text(printing)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "secret").write_text("0123456789abcdef")
    path = f"{tmp_path}:{os.environ['PATH']}"
    return {"PATH": path, "HOST": "10.0.0.2", "SECRET_FILE": str(tmp_path / "secret"), "BOOTSTRAP_ALLOW": "10.0.0.1"}


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("options", ["", '{"protocol": "rdma"}'])
def test_the_script_for_gpus_gives_vllm_settings_that_it_takes(side: str, options: str, shown: dict[str, str]) -> None:
    done = run("examples/vllm/engine-gpu.sh", side, "/models/llama", **shown, TRANSPORT_OPTIONS=options)
    arguments = done.stdout.split("\0")
    assert (done.returncode, arguments[:2]) == (0, ["serve", "/models/llama"])
    config = json.loads(arguments[arguments.index("--kv-transfer-config") + 1])
    assert config["kv_role"] == {"prefill": "kv_producer", "decode": "kv_consumer"}[side]
    given = config["kv_connector_extra_config"]
    assert given.keys() <= settings_of_vllm()
    assert (given["transport"], given["trusted_fabric"]) == ("nixl", True)
    assert given["transport_options"] == json.loads(options or "{}")


def settings_of_vllm() -> set[str]:
    """Return the names of the connector's settings, from its source: importing it takes vLLM."""
    source = (ROOT / "src" / "kvroom" / "adapters" / "vllm" / "settings.py").read_text()
    kind = next(
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "VLLMSettings"
    )
    return {one.target.id for one in kind.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)}


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("options", ["", '{"protocol": "rdma"}'])
def test_the_script_for_gpus_gives_sglang_settings_that_it_takes(
    side: str, options: str, shown: dict[str, str]
) -> None:
    done = run("examples/sglang/engine-gpu.sh", side, "/models/llama", **shown, TRANSPORT_OPTIONS=options)
    printed = done.stdout.split("\0")
    assert (done.returncode, printed[:2]) == (0, ["-m", "sglang.launch_server"])
    assert printed[printed.index("--disaggregation-mode") + 1] == side
    settings = SGLangSettings.read(dict(line.split("=", 1) for line in printed if line.startswith("KVROOM_")))
    assert (settings.transport, settings.trusted_fabric) == ("nixl", True)
    assert settings.transport_options == json.loads(options or "{}")


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_a_script_can_be_read_by_bash_and_be_run(script: Path) -> None:
    assert os.access(script, os.X_OK)
    read = run("bash", "-n", script)
    assert (read.returncode, read.stderr) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_a_script_without_arguments_says_how_it_is_used_and_starts_nothing(script: Path) -> None:
    done = run(script)
    assert done.returncode != 0
    assert "usage" in done.stderr.lower()
