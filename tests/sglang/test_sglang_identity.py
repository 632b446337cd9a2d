"""The identity of an SGLang request, from its `Req` and the adapters of its scheduler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sglang.srt.lora.lora_registry import LoRARef
from sglang_helpers import new_prompt, new_request

from kvroom.adapters.sglang.identity import request_identity
from kvroom.core.identity import KVIdentity, mismatch


def queue_with(**names: str) -> Any:
    """Return a queue whose scheduler has these adapters, each with an id that this server has chosen."""
    adapters = {lora_id: LoRARef(lora_id=lora_id, lora_name=name) for lora_id, name in names.items()}
    runner = SimpleNamespace(lora_manager=SimpleNamespace(lora_refs=adapters))
    return SimpleNamespace(scheduler=SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner)))


def identity(prompt: list[int], queue: Any = None, **options: Any) -> KVIdentity:
    return request_identity(new_request(prompt, 1, **options), queue)


def test_it_states_tokens_adapter_and_salt_and_nothing_else() -> None:
    prompt = new_prompt(50)
    one = identity(prompt)
    assert one == KVIdentity.of(prompt, adapter="", cache_salt="")
    assert identity(prompt, return_logprob=True, extra_key="for its cache only") == one
    others = [
        prompt[:-1],
        [*prompt, 5],
        [prompt[0] + 1, *prompt[1:]],
        prompt[::-1],
        [prompt[1], prompt[0], *prompt[2:]],
    ]
    assert all("tokens is 50 ids" in str(mismatch(one, identity(other))) for other in others)
    assert "cache_salt is none on the prefill side" in str(mismatch(one, identity(prompt, cache_salt="a tenant")))


def test_adapters_are_compared_by_name_because_each_server_has_ids_of_its_own() -> None:
    prompt = new_prompt(50)
    here, there = queue_with(a1b2="french", c3d4="german"), queue_with(e5f6="french")
    french = identity(prompt, here, lora_id="a1b2")
    assert french == identity(prompt, there, lora_id="e5f6")
    assert "adapter is" in str(mismatch(french, identity(prompt, here, lora_id="c3d4")))
    assert "and none on the decode side" in str(mismatch(french, identity(prompt, here)))


def test_an_adapter_that_the_scheduler_cannot_name_is_not_stated() -> None:
    prompt = new_prompt(50)
    for queue in (queue_with(), SimpleNamespace(scheduler=object())):
        unnamed = identity(prompt, queue, lora_id="a1b2")
        assert unnamed.get("adapter") is None
        assert mismatch(unnamed, identity(prompt)) is None
