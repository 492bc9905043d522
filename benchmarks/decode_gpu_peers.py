"""Peers of ``decode_gpu``: transformers' LLaMA of the same sizes, and the released code."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from decode_gpu_rows import WARMUP, random_ids
from gpu_timing import Clock
from subjects import error_text, is_lost
from train_gpu_released import build_of

from transnormer.models.decoder import DecoderConfig


def _sizes(config: DecoderConfig) -> dict[str, int]:
    block = config.blocks[-1]
    return {
        "model_dim": config.model_dim,
        "num_layers": len(config.blocks),
        "heads": getattr(block.token_mixer, "heads", 8),
        "glu_dim": getattr(block.channel_mixer, "hidden_dim", 4 * config.model_dim),
        "vocab_size": config.vocab_size,
    }


def each(
    batches: Sequence[int], clock: Clock, measure: Callable[[int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each batch; a failure costs its own row."""
    rows = []
    for batch in batches:
        try:
            rows.append({"batch": batch, **measure(batch)})
        except Exception as error:
            rows.append({"batch": batch, "error": error_text(error)})
            if is_lost(error):
                raise
        clock.free()
    return rows


def llama(
    config: DecoderConfig, batches: Sequence[int], clock: Clock, *, static: bool
) -> list[dict[str, Any]]:
    """``generate`` of transformers' LLaMA, greedy, after 1,024 tokens.

    With a static cache ``generate`` compiles the decoding step by itself, in one CUDA graph, as the
    documentation of transformers has it. Two lengths are generated; the time of a step is that of
    their difference, so that the prompt does not count.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = _sizes(config)
    settings: dict[str, Any] = {
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["model_dim"],
        "intermediate_size": sizes["glu_dim"],
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": sizes["heads"],
        "attn_implementation": "sdpa",
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    with torch.device(clock.device):
        made: Any = LlamaForCausalLM(LlamaConfig(**settings))
    model = made.to(torch.bfloat16).eval()
    context, steps = (1_024, 64) if not clock.dry else (16, 2)
    cache = {"cache_implementation": "static"} if static else {}

    def measure(batch: int) -> dict[str, Any]:
        ids = random_ids(config, context).expand(batch, -1).to(clock.device)

        def seconds(count: int) -> float:
            def call() -> None:
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    min_new_tokens=count,
                    max_new_tokens=count,
                    **cache,
                )

            return clock.first(call)[1]

        # The longer one first: generate keeps its static cache for all that fits into it.
        short, long = WARMUP, WARMUP + steps
        compile_s = seconds(long) + seconds(short)
        pairs = [(seconds(short), seconds(long)) for _ in range(2 if not clock.dry else 1)]
        step = statistics.median(b - a for a, b in pairs) / steps
        return {"tokens_per_second": batch / step, "first_calls_s": compile_s}

    return each(batches, clock, measure)


def released(
    folder: Path, config: DecoderConfig, batches: Sequence[int], clock: Clock
) -> list[dict[str, Any]]:
    """A greedy step of the authors' released code and its own cache after 1,024 tokens."""
    torch.manual_seed(0)
    with torch.device(clock.device):
        made: Any = build_of(folder)(_sizes(config), attention="plain" if clock.dry else "own")
    model = made.to(torch.bfloat16).eval()
    context, steps = (1_024, 24) if not clock.dry else (16, 2)

    def measure(batch: int) -> dict[str, Any]:
        ids = random_ids(config, context).expand(batch, -1).to(clock.device)
        times = []
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=True)
            for _ in range(WARMUP + steps):
                began = time.perf_counter()
                token = out.logits[:, -1:].argmax(-1)
                cache = out.past_key_values
                out = model(input_ids=token, past_key_values=cache, use_cache=True)
                clock.wait()
                times.append(time.perf_counter() - began)
        return {"tokens_per_second": batch / statistics.median(times[WARMUP:])}

    return each(batches, clock, measure)
