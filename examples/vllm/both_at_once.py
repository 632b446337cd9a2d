"""Ask a vLLM pair for one completion and send both legs at the same time.

The decode side waits in the room while the prefill side computes.

    python examples/vllm/both_at_once.py http://127.0.0.1:8100 http://127.0.0.1:8200 "The capital of France is"

The script expects the prefill side's directory on the host of PREFILL, port 8998; --bootstrap HOST:PORT names another.
"""

from __future__ import annotations

import argparse
import json
import secrets
import threading
import urllib.request
from typing import Any
from urllib.parse import urlsplit

DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Sends requests directly, without the proxies that the environment may name."""


def complete(url: str, **body: Any) -> dict[str, Any]:
    """Send POST /v1/completions and return the answer."""
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with DIRECTLY.open(request) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefill")
    parser.add_argument("decode")
    parser.add_argument("prompt")
    parser.add_argument("--model", default="model")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--bootstrap", metavar="HOST:PORT")
    options = parser.parse_args()
    where = urlsplit(f"//{options.bootstrap}" if options.bootstrap else options.prefill)
    room = {
        "bootstrap_host": where.hostname,
        "bootstrap_port": where.port if options.bootstrap else 8998,
        "bootstrap_room": secrets.randbelow(2**63),
    }
    body = {"model": options.model, "prompt": options.prompt, "temperature": 0, "kv_transfer_params": room}
    prefill = threading.Thread(target=complete, args=(options.prefill,), kwargs={**body, "max_tokens": 1})
    prefill.start()
    answer = complete(options.decode, **body, max_tokens=options.max_tokens)
    prefill.join()
    print(answer["choices"][0]["text"])


if __name__ == "__main__":
    main()
