"""Runs vLLM in a process of its own: a job, a JSON file, and the name of a file for the answer."""

import json
import sys
from pathlib import Path
from typing import Any


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Generate greedily in one engine: ``rounds`` of requests one after the other.

    A request is its prompt's ids and how many tokens to generate; the requests of a round are given
    at once.

    Returns:
        for each round and request: tokens, their log-probabilities, and how many tokens of the prompt
        were not read since the state behind them was cached.
    """
    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "seed": 0}
    llm = LLM(model=job["model"], skip_tokenizer_init=True, **{**options, **job["options"]})
    tokens, logprobs, cached = [], [], []
    for requests in job["rounds"]:
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        wanted = [
            SamplingParams(
                temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=1
            )
            for _, count in requests
        ]
        outputs = llm.generate(prompts, wanted, use_tqdm=False)
        drawn = [output.outputs[0] for output in outputs]
        tokens.append([list(one.token_ids) for one in drawn])
        logprobs.append(
            [
                [row[token].logprob for token, row in zip(one.token_ids, one.logprobs, strict=True)]
                for one in drawn
            ]
        )
        cached.append([output.num_cached_tokens for output in outputs])
    return {"tokens": tokens, "logprobs": logprobs, "cached": cached}


if __name__ == "__main__":
    answer = run(json.loads(Path(sys.argv[1]).read_text("utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
