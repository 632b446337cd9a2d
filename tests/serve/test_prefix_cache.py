"""The prefix cache from the view of a client, an operator and a router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.tiny import tiny

from .conftest import SIZES, Served
from .helpers import flush, get, post, running
from .test_metrics import of, scrape

SYSTEM = list(b"You answer in one word, and you never explain it. ")  # 12 pages of 4 tokens, and 2 tokens


def ask(served: Served, question: str, **fields: Any) -> dict[str, Any]:
    ids = [*SYSTEM, *question.encode()]
    sampling = {"temperature": 0, "max_new_tokens": 5}
    body: dict[str, Any] = post(served.url, "/generate", {"input_ids": ids, "sampling_params": sampling}).json()
    assert body["output_ids"] == tiny().generate(ids, 5)
    return body


def test_a_second_question_after_the_same_system_prompt_costs_only_itself(served: Served) -> None:
    ask(served, "Is it day?")
    before = {url: scrape(url) for url in (served.prefill, served.decode)}
    body = ask(served, "Was it?")
    (cost,) = body["kvroom"]
    assert body["meta_info"]["cached_tokens"] == cost["cached_tokens"] == 48
    assert cost["prefix_tokens"] == 48
    assert cost["nbytes"] == (2 + len("Was it?")) * 384
    for url, old in before.items():
        now = scrape(url)
        name = "kvroom_prompt_tokens_cached_total"
        assert of(now, name) - of(old, name) == 48
        assert of(now, "kvroom_pool_pages", holder="cached") >= 12
    name = "kvroom_prompt_tokens_computed_total"
    assert of(scrape(served.prefill), name) - of(before[served.prefill], name) == 9


def test_usage_tells_a_client_what_was_not_computed(served: Served) -> None:
    body = {"model": "tiny", "prompt": bytes(SYSTEM).decode() + "Who?", "max_tokens": 2, "temperature": 0}
    post(served.url, "/v1/completions", body)
    whole = post(served.url, "/v1/completions", body).json()
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 52}  # 14 pages without the last token
    streaming = {**body, "stream": True, "stream_options": {"include_usage": True}}
    assert post(served.url, "/v1/completions", streaming).events()[-1]["usage"] == whole["usage"]
    both = post(served.url, "/v1/completions", {**body, "n": 2}).json()
    assert both["usage"]["prompt_tokens_details"] == {"cached_tokens": 52}  # the prompt counts once, whatever n is


def test_only_requests_of_one_salt_share_a_prefix(served: Served) -> None:
    def cached(path: str, **fields: Any) -> int:
        body = {"model": "tiny", "max_tokens": 2, "temperature": 0, **fields}
        usage = post(served.url, path, body).json()["usage"]
        count: int = usage["prompt_tokens_details"]["cached_tokens"]
        return count

    for path, asked in (
        ("/v1/completions", {"prompt": bytes(SYSTEM).decode() + "Salt?"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": bytes(SYSTEM).decode()}]}),
    ):
        assert cached(path, **asked, cache_salt="one") == 0
        assert cached(path, **asked, cache_salt="one") >= 48
        assert cached(path, **asked, cache_salt="two") == 0
        assert cached(path, **asked, cache_salt="x" * 512) == 0
        cached(path, **asked)
        assert cached(path, **asked, cache_salt=None) >= 48


def test_a_worker_forgets_its_cache_when_told(served: Served) -> None:
    ask(served, "Why?")
    for url in (served.prefill, served.decode):
        cached = of(scrape(url), "kvroom_pool_pages", holder="cached")
        assert cached >= 12
        assert flush(url).json() == {"dropped_pages": cached}
        assert of(scrape(url), "kvroom_pool_pages", holder="cached") == 0
    assert ask(served, "Why?")["meta_info"]["cached_tokens"] == 0


def test_a_worker_says_whether_it_has_one(served: Served, model_dir: Path) -> None:
    for url in (served.prefill, served.decode):
        assert get(url, "/server_info").json()["prefix_cache"] == "on"
    with running("decode", "--model", str(model_dir), "--no-prefix-cache", *SIZES) as worker:
        assert get(worker.url, "/server_info").json()["prefix_cache"] == "off: disabled by an option"
