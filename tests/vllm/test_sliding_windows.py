"""A real pair with a model of full and sliding-window layers: vLLM keeps them in groups with a block table each."""

from __future__ import annotations

from pathlib import Path

import pytest
from clients import both_at_once, complete, in_turn, run
from fixtures import new_room
from fleet import Pair, Server, cores, kvroom_config, running

pytestmark = pytest.mark.timeout(600)
WINDOW = 256


@pytest.fixture(scope="module")
def sliding_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3 of 4 layers, three of them with a window, and the packaged model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(7)
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, initializer_range=0.2, sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sliding-model")
    Gemma3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_windows_are_handed_over(sliding_model: Path, tmp_path: Path) -> None:
    """Prompts shorter and longer than the window; float32, so that no step's size matters."""
    first, second = cores()
    given = [
        "--dtype",
        "float32",
        "--max-num-batched-tokens",
        "300",
    ]  # the last dtype counts; long prompts take several steps
    pair = Pair(
        Server("prefill", sliding_model, kvroom_config("prefill"), tmp_path / "prefill.log", first, arguments=given),
        Server("decode", sliding_model, kvroom_config("decode"), tmp_path / "decode.log", second, arguments=given),
    )
    with running(pair):
        loaded = 0
        for length in (20, 300, 1000):
            for way in ("in turn", "at once"):
                prompt = [1000 + (7919 * i + length + 13 * (way == "in turn")) % 40000 for i in range(length)]
                expected = run(complete(pair.prefill.url, prompt, salt="alone"))
                if way == "in turn":
                    answer = run(in_turn(pair.prefill.url, pair.decode.url, prompt))
                else:
                    _, answer = run(both_at_once(pair.prefill.url, pair.decode.url, prompt, new_room(pair.prefill)))
                assert (answer.cause, answer.tokens) == ("", expected.tokens)
                over = max(0, length - 1 - (WINDOW - 1)) % 128
                loaded += length - 1 - over
        assert pair.decode.metric("vllm:kvroom_tokens_loaded_total") == loaded
        for one in pair.servers:
            one.wait_for_usage()
