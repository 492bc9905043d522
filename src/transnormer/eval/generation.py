"""Greedy answers to many prompts: the engine runs them side by side."""

from collections.abc import Sequence

from transnormer.data.tokenizers import Tokenizer
from transnormer.infer.engine import Engine
from transnormer.infer.engine_config import EngineConfig
from transnormer.infer.sampling import SamplingConfig
from transnormer.infer.text import StopText, begin_id
from transnormer.models.decoder import Decoder

_GREEDY = SamplingConfig(temperature=0.0)


def generate_texts(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    stop: Sequence[str] = (),
    max_new_tokens: int = 256,
    sampling: SamplingConfig = _GREEDY,
    seed: int = 0,
    rows: int = 8,
    begin: bool = True,
) -> list[str]:
    """Continue texts, each behind a begin-of-text token; the results end before a stop text.

    Prompts are read whole, whatever their length, and requests that have finished make room for the
    next.

    Args:
        model: a causal decoder; the engine runs it in eval mode.
        tokenizer: the model's; ids that it lacks are never drawn.
        prompts: texts, which may be empty.
        stop: texts that end an answer and are no part of it; the end-of-text token does too.
        max_new_tokens: of each answer.
        sampling: how tokens are drawn; greedy by default.
        seed: prompt i draws with seed + i.
        rows: prompts that run at once.
        begin: False leaves the begin-of-text token out; a prompt without a token has it anyway.
    """
    first_id = begin_id(model, tokenizer)
    # A slot's share of reading is a piece of a long prompt, so that memory is bounded.
    config = EngineConfig(slots=rows, queue=len(prompts), prefill_tokens=max(8192, rows))
    engine = Engine(model, config, draw_below=tokenizer.vocab_size)
    running = []
    for index, ids in enumerate(tokenizer.encode_batch(prompts)):
        text = StopText(tokenizer, stop, from_start=not ids)
        request = engine.submit(
            [first_id, *ids] if begin or not ids else ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed + index,
            until=text,
        )
        running.append((request, text))
    engine.run()
    for request, _ in running:
        # Raises what the request itself failed of.
        request.result()
    return ["".join(text.pieces) + text.finish() for _, text in running]
