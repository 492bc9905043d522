"""Tokenizers of released and of this package's directories in transformers."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from transnormer import files
from transnormer.data.tokenizers import find_tokenizer_file
from transnormer.models.checkpoint import find_model


class BaiChuanTokenizer(SentencePieceBackend):
    """The SentencePiece tokenizer beside the released TransNormerLLM models.

    Ids are SentencePiece's own, its normaliser and dummy prefix included. The class has the name of
    the released one (OpenNLPLab/TransNormerLLM, tokenization_baichuan.py), so that a directory's
    tokenizer_config.json finds it here and no code of the directory runs.
    ``transnormer.data.load_tokenizer`` reads the same file without its normaliser.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str,
        unk_token: Any = "<unk>",
        bos_token: Any = "<s>",
        eos_token: Any = "</s>",
        pad_token: Any = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        **kwargs: Any,
    ) -> None:
        """Read a tokenizer.model.

        Args:
            vocab_file: its path.
            unk_token, bos_token, eos_token, pad_token: names of the special tokens.
            add_bos_token: begin every text with bos, as the released class does; the released
                model's own configuration says otherwise, so the file beside it decides.
            add_eos_token: end every text with eos.
        """
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        kwargs.pop("clean_up_tokenization_spaces", None)
        super().__init__(
            vocab_file=vocab_file,
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            clean_up_tokenization_spaces=False,
            **kwargs,
        )

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Each text between bos and eos, where they are wanted."""
        texts = [token_ids_0] if token_ids_1 is None else [token_ids_0, token_ids_1]
        return [i for text in texts for i in (*self._before(), *text, *self._after())]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 at special tokens, 0 at others."""
        if already_has_special_tokens:
            special = set(self.all_special_ids)
            return [int(i in special) for i in token_ids_0]
        texts = [token_ids_0] if token_ids_1 is None else [token_ids_0, token_ids_1]
        before, after = [1] * len(self._before()), [1] * len(self._after())
        return [x for text in texts for x in (*before, *[0] * len(text), *after)]

    def _before(self) -> list[int]:
        return [self.bos_token_id] if self.add_bos_token else []

    def _after(self) -> list[int]:
        return [self.eos_token_id] if self.add_eos_token else []

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces; bytes are put together, special tokens stand as they are called."""
        parts: list[str] = []
        run: list[str] = []
        special = set(self.all_special_tokens) | set(self.added_tokens_encoder)
        for token in tokens:
            if token in special:
                parts += [self.sp_model.decode(run), token]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self.sp_model.decode(run)])

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """As transformers', which leaves out add_bos_token and add_eos_token: they are put back.

        The code that a released directory names for other readers is not written along, so its name
        is left out.
        """
        written = super().save_pretrained(save_directory, *args, **kwargs)
        file = Path(save_directory) / "tokenizer_config.json"
        table = files.read_json(file)
        table.pop("auto_map", None)
        table |= {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        files.write_json(table, file)
        return written


class DecoderTokenizer:
    """Chooses the class of transformers that reads the tokenizer beside a decoder's weights."""

    @classmethod
    def from_pretrained(cls, path: str | Path, *inputs: Any, **kwargs: Any) -> Any:
        """Load it.

        Args:
            path: a run directory, a step, a saved model, or the id of one on the hub.
            inputs, kwargs: of the class that is chosen.

        Raises:
            FileNotFoundError: no tokenizer there.
            NotImplementedError: one that transformers has no class for: single bytes, rank files.
        """
        directory = find_model(path)
        file = find_tokenizer_file(directory)
        if file is None:
            raise FileNotFoundError(f"{directory} holds no tokenizer; expected tokenizer.json")
        if file.suffix == ".model":
            return BaiChuanTokenizer.from_pretrained(directory, *inputs, **kwargs)
        if file.name == "tokenizer.json":
            return PreTrainedTokenizerFast.from_pretrained(directory, *inputs, **kwargs)
        raise NotImplementedError(
            f"{file} is no format of transformers; expected tokenizer.json or tokenizer.model; use "
            "transnormer.data.load_tokenizer"
        )
