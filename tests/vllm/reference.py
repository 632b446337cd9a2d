"""The exact reference: what a plain vLLM engine, without any connector, answers when it computes in the pair's steps.

A pair computes a prompt in the prefill side's chunks, and its last token once more alone, on the decode side. In bf16
the size of a step decides the last bits of its result, so the plain engine is made to compute the same: everything but
the last token in chunks of at most `CHUNK`, then the last token alone, then token by token; one prompt at a time.

    python reference.py MODEL NEW_TOKENS < prompts.json > answers.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet import cores, environment, pinned

CHUNK = 2048
NEAR = 0.6
"""Tokens whose log probability is so close to the best are a near tie. Logits in bf16 are up to 0.125 apart here."""
RANKED = 5
START_S = 240
PER_PROMPT_S = 60


@dataclass(frozen=True)
class Expected:
    """The greedy tokens and, for each, all tokens that were nearly as good (itself among them)."""

    tokens: list[int]
    near: list[list[int]]

    def agreed(self, tokens: Sequence[int]) -> int:
        """How many tokens are right, for an answer of another batch or other steps; -1 if one is wrong.

        From such an answer the reference may part at a near tie, and after that the two cannot be compared.
        """
        for at, (best, got, near) in enumerate(zip(self.tokens, tokens, self.near, strict=True)):
            if got != best:
                return at if got in near else -1
        return len(tokens)


def expected(model: Path, prompts: Sequence[Sequence[int]], new_tokens: int, core: int | None = None) -> list[Expected]:
    """The reference for these prompts, worked out in a process of its own that ends with the call."""
    core = cores()[0] if core is None else core
    given = json.dumps([list(prompt) for prompt in prompts])
    command = [*pinned(core), sys.executable, __file__, str(model), str(new_tokens)]
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, check=False,
        timeout=START_S + PER_PROMPT_S * len(prompts),
        # Compiling the kernel that counts log probabilities would take longer than all prompts.
        env={**environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1",
             "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": str(core), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"the reference engine failed:\n{done.stderr[-4000:]}"
    return [Expected(**one) for one in json.loads(done.stdout)]


def work_out(model: str, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[dict[str, Any]]:
    """The fields of `Expected` for each prompt, by an engine in this process."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model, dtype="bfloat16", max_model_len=2048, enforce_eager=True, max_num_seqs=8, max_num_batched_tokens=CHUNK,
        enable_prefix_caching=False, num_gpu_blocks_override=20,
    )  # fmt: skip
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=RANKED)
    answers = []
    for prompt in prompts:
        # No step may be larger than this: of a prompt that fits one step, the last token is left for the next.
        scheduler.max_num_scheduled_tokens = min(CHUNK, len(prompt) - 1)
        (output,) = llm.generate({"prompt_token_ids": list(prompt)}, sampling, use_tqdm=False)
        completion = output.outputs[0]
        near = [
            [token for token, one in step.items() if one.logprob >= max(o.logprob for o in step.values()) - NEAR]
            for step in completion.logprobs
        ]
        answers.append({"tokens": list(completion.token_ids), "near": near})
    return answers


def main() -> None:
    answers_fd = os.dup(1)
    os.dup2(2, 1)  # vLLM logs to stdout
    answers = work_out(sys.argv[1], json.load(sys.stdin), int(sys.argv[2]))
    with os.fdopen(answers_fd, "w") as out:
        json.dump(answers, out)


if __name__ == "__main__":
    main()
