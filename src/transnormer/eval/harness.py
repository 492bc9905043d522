"""This package's models in lm-evaluation-harness: `python -m transnormer.eval.harness`.

The command is lm_eval's own, with one more model and one more folder of tasks:

    python -m transnormer.eval.harness --model transnormer --model_args pretrained=CKPT \\
      --include_path "$(python -m transnormer.eval.harness tasks)" --tasks tnl_piqa \\
      --metadata '{"data": "DIR"}'

Importing this module registers the model, so that ``lm_eval.simple_evaluate(model="transnormer")``
finds it; the harness itself has no entry points (0.4.13).
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from transnormer.data.tokenizers import Tokenizer, load_tokenizer
from transnormer.eval.generation import generate_texts
from transnormer.eval.likelihood import score_continuations
from transnormer.eval.perplexity import checked, score_tokens
from transnormer.eval.scorer import SHOT_SEED
from transnormer.eval.tasks import FILE_TASKS
from transnormer.infer.sampling import SamplingConfig
from transnormer.infer.text import begin_id
from transnormer.models import checkpoint as checkpoints
from transnormer.models.decoder import Decoder

# Task files of local data; lm_eval's --include_path.
TASK_FOLDER = Path(__file__).parent / "lm_eval_tasks"
_ROWS = 8
_MAX_TOKENS = 256
# Names of one option, as the harness's models take them, the first that is there counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("transnormer")
class TransnormerLM(TemplateLM):
    """A decoder of this package under the harness's interface.

    A context is read once for all its continuations, documents are scored with a carried state and
    no window, generation runs on the engine. Every context begins with the model's begin-of-text
    token unless ``add_bos`` is off; an empty one, and whole documents, always do.
    """

    def __init__(
        self,
        pretrained: str | Decoder,
        tokenizer: str | Tokenizer | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = _ROWS,
        add_bos: bool = True,
        max_gen_toks: int = _MAX_TOKENS,
    ) -> None:
        """Load a model, or take one.

        Args:
            pretrained: a run, a step, a saved model, a released checkpoint; or a decoder.
            tokenizer: None is the one beside the weights; "bytes", a path, or a tokenizer.
            device: None is the first GPU, else the CPU.
            dtype: None is as stored; "float32", "bfloat16", ...
            batch_size: states that a call works on; results depend on it by rounding alone.
            add_bos: begin contexts with the begin-of-text token.
            max_gen_toks: tokens of a generated answer where a task does not say.

        Raises:
            ValueError: batch_size is no number, or below 1; a dtype that torch has not.
            FileNotFoundError: no model, or no tokenizer beside it.
        """
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}; expected a number of at least 1")
        if isinstance(pretrained, Decoder):
            self.model, beside = pretrained, None
        else:
            self.model = _load(pretrained, device, dtype)
            beside = checkpoints.find_tokenizer(pretrained)
        source = beside if tokenizer is None else tokenizer
        if source is None:
            raise FileNotFoundError(
                f"no tokenizer lies beside {pretrained}; expected one; pass tokenizer=PATH"
            )
        self.words = load_tokenizer(source) if isinstance(source, str | Path) else source
        self.batch_size, self.add_bos, self.max_gen_toks = int(batch_size), add_bos, max_gen_toks
        self._first_id = begin_id(self.model, self.words)
        self._device = next(self.model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, else the one that begins it."""
        eos = self.model.config.eos_token_id
        eos = self.words.eos_id if eos is None else eos
        return self._first_id if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before the first token of a text."""
        return self._first_id

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's fingerprint: the harness keeps requests under it."""
        return self.words.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text, behind the begin-of-text token unless that is switched off."""
        ids = self.words.encode(string)
        begin = self.add_bos if add_special_tokens is None else add_special_tokens
        return [self._first_id, *ids] if begin else ids

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        scored = score_continuations(self.model, pairs, rows=self.batch_size)
        for (texts, _, _), score in zip(requests, scored, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, tuple(score))
        return [tuple(score) for score in scored]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, each token after everything before it.

        The begin-of-text token precedes and is not scored; an empty text scores 0.
        """
        texts = [request.args[0] for request in requests]
        filled = [text for text in texts if text]
        documents = self.words.encode_batch(filled)
        scores = iter(
            checked(
                score_tokens(self.model, documents, first_id=self._first_id, rows=self.batch_size)
            )
            if documents
            else ()
        )
        results = [-next(scores).nats if text else 0.0 for text in texts]
        for text, result in zip(texts, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), result)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate answers: greedy, or as ``temperature``, ``top_k`` and ``top_p`` say.

        Raises:
            NotImplementedError: another option of generation.
        """
        answers = [""] * len(requests)
        alike: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(_options(request.args[1], self.max_gen_toks), []).append(index)
        for (stop, length, sampling), group in alike.items():
            texts = generate_texts(
                self.model,
                self.words,
                [requests[index].args[0] for index in group],
                stop=stop,
                max_new_tokens=length,
                sampling=sampling,
                rows=self.batch_size,
                begin=self.add_bos,
            )
            for index, text in zip(group, texts, strict=True):
                answers[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return answers


def _load(pretrained: str, device: str | None, dtype: str | None) -> Decoder:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    number = None if dtype is None else getattr(torch, dtype, None)
    if dtype is not None and not isinstance(number, torch.dtype):
        raise ValueError(f"dtype is {dtype!r}; expected float64, float32, bfloat16 or float16")
    return checkpoints.load(pretrained, device=torch.device(device), dtype=number)


def _options(given: dict[str, Any], default: int) -> tuple[tuple[str, ...], int, SamplingConfig]:
    """Stop texts, number of tokens and sampling of a request's generation options."""
    options = dict(given)
    until = options.pop("until", None) or []
    stop = (until,) if isinstance(until, str) else tuple(text for text in until if text)
    lengths = [int(options.pop(name)) for name in _LENGTHS if name in options]
    draws = options.pop("do_sample", None)
    temperature = float(options.pop("temperature", 0.0 if not draws else 1.0))
    if draws is False:
        temperature = 0.0
    sampling = SamplingConfig(
        temperature=temperature,
        top_k=options.pop("top_k", None),
        top_p=options.pop("top_p", None),
    )
    if options:
        raise NotImplementedError(
            f"generation has the options {sorted(options)}; expected until, a length, do_sample, "
            "temperature, top_k and top_p alone"
        )
    return stop, lengths[0] if lengths else default, sampling


def run_harness(
    model: Decoder,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    places: Mapping[str, Path] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    rows: int = _ROWS,
    seed: int = SHOT_SEED,
    bootstrap_iters: int = 100_000,
) -> dict[str, dict[str, Any]]:
    """Run tasks of the harness, its own and the local ones (``tnl_...``), on a model.

    Args:
        model, tokenizer: what is evaluated.
        tasks: names as the harness knows them.
        data, places: where the files of local tasks lie, as ``find_data``'s.
        limit: items of each task; None is all.
        num_fewshot: examples before each question; None is the task's own number.
        rows: states that a call works on.
        seed: of the draw of examples.
        bootstrap_iters: draws for the standard error of a perplexity.

    Returns:
        the harness's results by task: "metric,filter" and "metric_stderr,filter".
    """
    metadata = {name: str(path) for name, path in (places or {}).items()}
    if data is not None:
        metadata["data"] = str(data)
    local = {f"tnl_{name}" for name in FILE_TASKS}
    manager = TaskManager(
        include_path=str(TASK_FOLDER),
        # Its own tasks are some thousand files, which take seconds to index.
        include_defaults=not local.issuperset(tasks),
        metadata=metadata,
    )
    found = simple_evaluate(
        model=TransnormerLM(model, tokenizer, batch_size=rows),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        fewshot_random_seed=seed,
        bootstrap_iters=bootstrap_iters,
        log_samples=False,
    )
    return found["results"]


def main(arguments: Sequence[str]) -> None:
    """lm_eval's command; ``tasks`` alone prints the folder of this package's task files."""
    if list(arguments) == ["tasks"]:
        sys.stdout.write(f"{TASK_FOLDER}\n")
        return
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main(sys.argv[1:])
