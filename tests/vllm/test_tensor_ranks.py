"""Engines that split a model differently: a real pair with two tensor-parallel ranks on one side and one on the other.

The packaged model has three KV heads, which two ranks cannot share, so the model here is a small random one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from clients import both_at_once, complete, in_turn, run
from fixtures import new_room
from fleet import Pair, Server, cores, kvroom_config, running

pytestmark = pytest.mark.timeout(600)
SIZES = {"one": 1, "two": 2}


@pytest.fixture(scope="module")
def small_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers with 4 heads, 2 of them for K and V, and the packaged model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("small-model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def server(name: str, model: Path, logs: Path, role: str, tp: int) -> Server:
    core = cores()[role == "decode"]
    given = ["--tensor-parallel-size", str(tp), "--dtype", "float32"]  # the last one counts
    env = {"VLLM_CPU_OMP_THREADS_BIND": "|".join([str(core)] * tp)}
    return Server(name, model, kvroom_config(role), logs / f"{name}.log", core=core, arguments=given, env=env)


@pytest.mark.parametrize(("prefill", "decode"), [("two", "one"), ("one", "two")])
def test_tensor_parallel_ranks_hand_over_their_heads(
    small_model: Path, tmp_path: Path, prefill: str, decode: str
) -> None:
    pair = Pair(
        server(f"prefill-{prefill}", small_model, tmp_path, "prefill", SIZES[prefill]),
        server(f"decode-{decode}", small_model, tmp_path, "decode", SIZES[decode]),
    )
    with running(pair):
        for length in (20, 200, 700):
            prompt = [1000 + (7919 * i + length) % 40000 for i in range(length)]
            expected = run(complete(pair.prefill.url, prompt))
            answer = run(in_turn(pair.prefill.url, pair.decode.url, prompt))
            assert (answer.cause, answer.tokens) == ("", expected.tokens)
            prompt = [token + 1 for token in prompt]
            expected = run(complete(pair.prefill.url, prompt))
            _, answer = run(both_at_once(pair.prefill.url, pair.decode.url, prompt, new_room(pair.prefill)))
            assert (answer.cause, answer.tokens) == ("", expected.tokens)
        loaded = pair.decode.metric("vllm:kvroom_tokens_loaded_total")
        assert loaded == 2 * (20 + 200 + 700)
        assert pair.decode.metric("vllm:prompt_tokens_by_source_total", source="local_compute") == 0
        for one in pair.servers:
            one.wait_for_usage()
