"""The reference: the answers of a plain vLLM engine without a connector.

A pair computes a prompt in other steps than the plain engine does, and the size of a step changes the last bits of its
result. The tests compute in float32, in which those bits change a token only if two candidates are almost equally
likely. `expected` checks that no prompt of the tests leads to such a tie, so answers can be compared token for token.

    python reference.py MODEL NEW_TOKENS < prompts.json > answers.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fleet import DTYPE, cores, environment, pinned

CLEAR = 0.002
"""The smallest difference that is allowed between the log probabilities of the two best candidates for a token."""
START_S = 240
PER_PROMPT_S = 60


def expected(model: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Return the greedy tokens for each prompt, computed in a separate process that ends with the call."""
    core = cores()[0]
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
    answers = json.loads(done.stdout)
    for prompt, answer in zip(prompts, answers, strict=True):
        ending = prompt[-8:]
        assert answer["margin"] >= CLEAR, f"take another prompt for {len(prompt)} tokens ending in {ending}: {answer}"
    return [answer["tokens"] for answer in answers]


def work_out(model: str, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[dict[str, Any]]:
    """Return the tokens for each prompt and their smallest margin, computed by an engine in this process."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype=DTYPE, max_model_len=2048, enforce_eager=True, max_num_seqs=1, num_gpu_blocks_override=20)
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=2)
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling, use_tqdm=False)
    return [
        {"tokens": list(answer.token_ids), "margin": min(map(_margin, answer.logprobs))}
        for answer in (output.outputs[0] for output in outputs)
    ]


def _margin(candidates: dict[int, Any]) -> float:
    first, second, *_ = sorted((one.logprob for one in candidates.values()), reverse=True)
    return float(first - second)


def main() -> None:
    answers_fd = os.dup(1)
    os.dup2(2, 1)  # vLLM logs to stdout
    answers = work_out(sys.argv[1], json.load(sys.stdin), int(sys.argv[2]))
    with os.fdopen(answers_fd, "w") as out:
        json.dump(answers, out)


if __name__ == "__main__":
    main()
