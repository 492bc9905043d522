"""What the objectives over windows of token streams share: data, loader, counts and decoder."""

from typing import Any, ClassVar

from transnormer.data import Batch, Loader
from transnormer.models.decoder import Decoder
from transnormer.train.objectives.base import (
    Counts,
    Objective,
    Setting,
    check_model,
    decoder_config,
    load_initial,
)
from transnormer.train.training_data import open_training_data, sample_texts


class WindowObjective(Objective[Decoder, Batch]):
    """Windows of data.seq tokens from the sources of data.path; a decoder with its head."""

    masks: ClassVar[bool] = False

    def __init__(self, setting: Setting) -> None:
        config = self.config = setting.config
        check_model(setting)
        data = open_training_data(config, setting.folder, setting.tell)
        self.tokenizer, self.sources = data.tokenizer, data.sources
        self.loader = Loader(
            data.sources,
            seq=config.data.seq,
            batch=config.batch_over(setting.world_size),
            seed=config.train.seed,
            packing=config.data.packing,
        ).for_rank(setting.rank, setting.world_size)
        self.heldout = sample_texts(data.heldout, config.train.eval_bytes)

    def facts(self) -> dict[str, Any]:
        return {"training_tokens": [len(source) for source, _ in self.sources]}

    def build_model(self) -> Decoder:
        decoder = Decoder(decoder_config(self.config, self.tokenizer, mask=self.masks))
        load_initial(decoder, self.config, self.tokenizer)
        return decoder

    def batch(self, index: int) -> Batch:
        return self.loader.batch(index)

    def counts(self, batch: Batch) -> Counts:
        return Counts(int((batch.labels >= 0).sum()), batch.input_ids.numel(), 0)
