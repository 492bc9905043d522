"""The configuration of a run, exactly the tables of its TOML file."""

import math
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator

from transnormer.config import Config, apply_overrides, read_toml, validate
from transnormer.models import checkpoint, zoo
from transnormer.models.decoder import Block, BlockConfig, DecoderConfig
from transnormer.optim import OptimizerConfig
from transnormer.parallel.parallel_config import ParallelConfig
from transnormer.train.guard import GuardConfig
from transnormer.train.lora_config import LoraConfig
from transnormer.train.objective_config import (
    CausalConfig,
    ClassificationConfig,
    ObjectiveConfig,
)
from transnormer.train.profiling import ProfileConfig
from transnormer.train.recipe_checks import (
    check_float8,
    check_lines,
    check_lora,
    check_outer,
    check_weights,
)
from transnormer.train.train_config import TrainConfig

_SIZES = ("model_dim", "num_layers", "heads", "glu_dim")


class ModelConfig(Config):
    """The model, in one of four forms.

    Attributes:
        name: a published size, as `tnl-385m`.
        blocks: one table a block, with model_dim.
        model_dim, num_layers, heads, glu_dim: a TransNormerLLM of these sizes.
        init_from: a run, a step or a saved decoder: its configuration, weights and tokenizer.
        vocab_size: rows of the embedding; None is the tokenizer's vocabulary, larger ones pad it.
        causal: False sees both sides of every token; for the objectives that can train it.
        tie_embeddings, dropout, init_std: replace the model's own where given.
    """

    name: str | None = None
    blocks: tuple[BlockConfig, ...] | None = Field(default=None, min_length=1)
    model_dim: int | None = Field(default=None, ge=1)
    num_layers: int | None = Field(default=None, ge=1)
    heads: int | None = Field(default=None, ge=1)
    glu_dim: int | None = Field(default=None, ge=1)
    init_from: str | None = Field(default=None, min_length=1)
    vocab_size: int | None = Field(default=None, ge=1)
    causal: bool | None = None
    tie_embeddings: bool | None = None
    dropout: float | None = Field(default=None, ge=0, lt=1)
    init_std: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_form(self) -> "ModelConfig":
        forms = ("name", "blocks", "init_from", *_SIZES)
        given = {key for key in forms if getattr(self, key) is not None}
        if given not in ({"name"}, {"blocks", "model_dim"}, {"init_from"}, set(_SIZES)):
            raise ValueError(
                f"model has {', '.join(sorted(given)) or 'no keys'}; expected name alone, or "
                "blocks and model_dim, or model_dim, num_layers, heads and glu_dim, or init_from"
            )
        for key in ("vocab_size", "tie_embeddings", "init_std") if self.init_from else ():
            if getattr(self, key) is not None:
                raise ValueError(
                    f"{key} is {getattr(self, key)} beside init_from; expected it unset: it is the "
                    "checkpoint's; leave it out"
                )
        if self.name is not None:
            zoo.check_name(self.name)
        return self

    @model_validator(mode="after")
    def _check_shape(self) -> "ModelConfig":
        if self.name is None and self.init_from is None:
            decoder = self.build(self.vocab_size or 1, pad=None, bos=None, eos=None)
            for index in range(len(decoder.blocks)):
                try:
                    with torch.device("meta"):
                        Block(decoder, index)
                except ValueError as error:
                    raise ValueError(f"blocks[{index}] cannot be built: {error}") from error
        return self

    def rows(self, vocab_size: int, *, mask: bool = False) -> int:
        """Return the rows of the embedding for a tokenizer's vocabulary; ValueError for too few.

        With mask one of them, behind the tokenizer's ids, is the mask token's.
        """
        least = vocab_size + mask
        where, rows = "model.vocab_size", self.vocab_size or least
        if self.init_from is not None:
            where, rows = f"vocab_size of {self.init_from}", self._initial().vocab_size
        if rows < least:
            more = f" and the mask token, {least}" if mask else ""
            raise ValueError(
                f"{where} is {rows}; expected at least the tokenizer's {vocab_size}{more}; "
                + ("take another checkpoint" if self.init_from else "leave it out or raise it")
            )
        return rows

    def _initial(self) -> DecoderConfig:
        return checkpoint.read_config(checkpoint.find_model(self.init_from or ""))

    def build(
        self,
        vocab_size: int,
        *,
        pad: int | None,
        bos: int | None,
        eos: int | None,
        mask: bool = False,
    ) -> DecoderConfig:
        """Return the model's configuration for a tokenizer's vocabulary and special ids.

        With mask the id behind the vocabulary is the mask token.
        """
        rows = self.rows(vocab_size, mask=mask)
        if self.name is not None:
            config = zoo.get(self.name, vocab_size=rows)
        elif self.init_from is not None:
            config = self._initial()
        elif self.blocks is not None:
            config = DecoderConfig(
                vocab_size=rows, model_dim=self.model_dim or 0, blocks=self.blocks
            )
        else:
            config = zoo.tnl_custom(
                vocab_size=rows,
                model_dim=self.model_dim or 0,
                num_layers=self.num_layers or 0,
                heads=self.heads or 0,
                glu_dim=self.glu_dim or 0,
            )
        own = {
            key: getattr(self, key)
            for key in ("causal", "tie_embeddings", "dropout", "init_std")
            if getattr(self, key) is not None
        }
        ids = {"pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos}
        if mask:
            ids["mask_token_id"] = vocab_size
        return DecoderConfig.model_validate({**config.model_dump(), **own, **ids})


class DataConfig(Config):
    """The corpus.

    Classification and instructions are JSON lines at one path, without weights, epochs and packing.

    Attributes:
        path: a file, a glob or a folder of text, a folder that `transnormer tokenize` made, or
            `embedded` (the text that ships with Python); a list mixes several by `weights`.
        weights: how often each path of a list is drawn from; None is their sizes in tokens.
        epochs: instead of weights, how often each path is seen relative to the others (the
            corpus tables of the papers): a path of n tokens and e epochs has the weight n * e.
        tokenizer: `bytes`, `bpe:N` (a byte-level BPE of N tokens trained on the training part), or
            the path of a tokenizer. None is the tokenizer that belongs to a tokenised path, else
            `bytes`.
        seq: tokens of one sample; of a text to classify, the most that are read.
        packing: `stream` cuts the corpus into samples that carry on across documents; `documents`
            starts every document from an empty state.
        heldout: what is kept out of training: a share of each path of text (the end of a single
            document, else whole documents), 0, or the path of a held-out text, whose files are
            then not trained on. None is a tenth, and for `embedded` and a folder that `transnormer
            tokenize` made their own split.
    """

    path: str | tuple[str, ...] = "embedded"
    weights: tuple[float, ...] | None = None
    epochs: tuple[float, ...] | None = None
    tokenizer: str | None = None
    seq: int = Field(ge=1)
    packing: Literal["stream", "documents"] = "stream"
    heldout: float | str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """Return `path` as a tuple."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @field_validator("heldout")
    @classmethod
    def _check_heldout(cls, heldout: float | str | None) -> float | str | None:
        if heldout == "" or (isinstance(heldout, float) and not 0 <= heldout < 1):
            raise ValueError(f"heldout is {heldout!r}; expected a share in [0, 1) or a path")
        return heldout

    @field_validator("weights", "epochs")
    @classmethod
    def _check_shares(
        cls, shares: tuple[float, ...] | None, info: ValidationInfo
    ) -> tuple[float, ...] | None:
        for index, share in enumerate(shares or ()):
            if not 0 < share < math.inf:
                name = f"{info.field_name}[{index}]"
                raise ValueError(f"{name} is {share}; expected a finite number above 0")
        return shares

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if not self.paths or not all(self.paths):
            raise ValueError(f"path is {self.path!r}; expected a path or `embedded`")
        for name, shares in (("weights", self.weights), ("epochs", self.epochs)):
            if shares is not None and len(shares) != len(self.paths):
                raise ValueError(
                    f"{name} is {list(shares)}; expected one positive number for each of the "
                    f"{len(self.paths)} paths"
                )
        if self.weights is not None and self.epochs is not None:
            raise ValueError("weights and epochs are both given; expected one of the two")
        return self


class OutputConfig(Config):
    """Where the run directory is."""

    dir: str = Field(min_length=1)


class RunConfig(Config):
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    output: OutputConfig
    objective: ObjectiveConfig = CausalConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    guard: GuardConfig = GuardConfig()
    profile: ProfileConfig = ProfileConfig()
    parallel: ParallelConfig = ParallelConfig()
    lora: LoraConfig | None = None

    @model_validator(mode="after")
    def _check_batch(self) -> "RunConfig":
        train = self.train
        if train.tokens_per_step % self.data.seq:
            near = max(1, round(train.tokens_per_step / self.data.seq)) * self.data.seq
            raise ValueError(
                f"train.tokens_per_step is {train.tokens_per_step}; expected a multiple of "
                f"data.seq, which is {self.data.seq}; for example {near}"
            )
        if train.micro_batch is not None and self.samples_per_step % train.micro_batch:
            raise ValueError(
                f"train.micro_batch is {train.micro_batch}; expected a divisor of the "
                f"{self.samples_per_step} samples of a step (tokens_per_step / data.seq)"
            )
        return self

    @model_validator(mode="after")
    def _check_objective(self) -> "RunConfig":
        onward = self.objective.kind in ("causal", "instruction")
        if self.train.segment_tokens is not None and not onward:
            raise ValueError(
                f"train.segment_tokens is {self.train.segment_tokens}; expected it unset for "
                f"objective.kind = {self.objective.kind!r}: only a causal model reads a "
                "sequence from its beginning to its end; leave it out"
            )
        if self.train.cuda_graph:
            self._check_graph()
        if self.model.init_from is None:
            self.check_model()
        check_lines(self)
        check_lora(self)
        check_float8(self)
        check_outer(self)
        check_weights(self)
        if self.optimizer.base_dim is not None and self.model.init_from is not None:
            raise ValueError(
                f"optimizer.base_dim is {self.optimizer.base_dim} beside model.init_from; expected "
                "it unset: the initial values are the checkpoint's; leave it out"
            )
        return self

    def _check_graph(self) -> None:
        """Raise ValueError for what makes one step's tensors another's in size."""
        for key, value, only in (
            ("objective.kind", self.objective.kind, "causal"),
            ("data.packing", self.data.packing, "stream"),
        ):
            if value != only:
                raise ValueError(
                    f"train.cuda_graph is true with {key} = {value!r}; expected {only!r}: a graph "
                    "is captured for tensors of one size; leave train.cuda_graph out"
                )

    def check_model(self) -> None:
        """Raise ValueError where the objective cannot train a model of this causality."""
        wanted = self.objective.causal
        causal = self.model.build(1, pad=None, bos=None, eos=None).causal
        if isinstance(self.objective, ClassificationConfig):
            if causal and self.objective.pooling == "first":
                raise ValueError(
                    "objective.pooling is 'first' and model.causal true, so that the first token "
                    "has seen no other; expected 'mean' or 'last', or model.causal = false"
                )
            return
        if wanted is None or causal is wanted:
            return
        why = (
            "would see the tokens that it predicts"
            if wanted
            else "sees nothing behind a hidden token"
        )
        raise ValueError(
            f"model.causal is {str(causal).lower()}; expected {str(wanted).lower()} for "
            f"objective.kind = {self.objective.kind!r}: such a model {why}; set one of the two"
        )

    @property
    def splits_weights(self) -> bool:
        """Return whether parameters are the upper half of float32 weights (``optim.split_weights``)."""
        return (self.train.weights, self.optimizer.states) == ("bfloat16", "float32")

    @property
    def samples_per_step(self) -> int:
        """Return the samples of data.seq tokens in one update."""
        return self.train.tokens_per_step // self.data.seq

    @property
    def micro_batch(self) -> int:
        """Return the samples in one forward pass of a process that is alone."""
        return self.train.micro_batch or self.samples_per_step

    def batch_over(self, ranks: int) -> int:
        """Return the samples in one forward pass of `ranks` processes together.

        Raises ValueError where a step is no whole number of such passes.
        """
        batch = (self.train.micro_batch or 0) * ranks or self.samples_per_step
        if self.samples_per_step % batch or batch % ranks:
            raise ValueError(
                f"a step has {self.samples_per_step} samples (tokens_per_step / data.seq), "
                f"train.micro_batch is {self.train.micro_batch} and {ranks} ranks read batches of "
                "their own; expected a multiple of their product; change one of them"
            )
        return batch


def read_run(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run's TOML file with overrides `a.b=value`; every mistake is one ValueError line."""
    data = apply_overrides(read_toml(path), overrides or [])
    return validate(RunConfig, data, source=str(path))
