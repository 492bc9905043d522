"""`transnormer finetune`: a training run on the answers of conversations, from a trained model."""

from pathlib import Path
from typing import Annotated

import typer

from transnormer.cli import common
from transnormer.cli.train import SIGNAL_CODES, Overrides, Resume, carry_out, facts_of, finish


def finetune(
    recipe: Annotated[Path, typer.Argument(metavar="RUN.toml", help="What to train, on what.")],
    overrides: Overrides = None,
    resume: Resume = False,
    as_json: common.Json = False,
) -> None:
    """Fine-tune a trained model on instructions or conversations, as a TOML file says.

    It is `train` with objective.kind = "instruction", whose recipes it also takes without the
    [objective] table. model.init_from names the trained model; data.path holds JSON lines of
    messages, of instruction (, input) and output, or of prompt and completion. With [lora] small
    additions are trained instead of the weights: --set lora.rank=8. The held-out answers are
    scored before and after; `transnormer chat` talks to the result.
    """
    from transnormer.config import apply_overrides, read_toml, validate
    from transnormer.train.recipe import RunConfig

    data = apply_overrides(read_toml(recipe), overrides or [])
    objective = data.setdefault("objective", {})
    if isinstance(objective, dict):
        objective.setdefault("kind", "instruction")
    config = validate(RunConfig, data, source=str(recipe))
    if config.objective.kind != "instruction":
        raise ValueError(
            f"objective.kind is {config.objective.kind!r}; expected 'instruction' for finetune; "
            "take transnormer train"
        )
    result = carry_out(config, resume=resume)
    if result.stopped_by not in SIGNAL_CODES:
        common.write_line(f"talk to it: transnormer chat {config.output.dir}")
    finish(result, facts_of(result) if as_json else None)
