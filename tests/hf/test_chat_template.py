"""Conversations as ids: those of apply_chat_template, from the same directory."""

from pathlib import Path
from typing import Any

import pytest
from chat_cases import KINDS, MARKED, SPEECH
from transformers import PreTrainedTokenizerFast

from transnormer.data.chat_template import PLAIN, TEMPLATES, ChatTemplate
from transnormer.data.tokenizers import load_tokenizer
from transnormer.hf import BaiChuanTokenizer


@pytest.mark.parametrize("source", [TEMPLATES["released"], MARKED, PLAIN])
@pytest.mark.parametrize("kind", ["bpe", "pieces", "pieces-prefix"])
def test_ids_are_those_of_transformers(tmp_path: Path, kind: str, source: str) -> None:
    ours = KINDS[kind]()
    ours.chat_template = source
    ours.save(tmp_path)
    theirs: Any = PreTrainedTokenizerFast if kind == "bpe" else BaiChuanTokenizer
    theirs = theirs.from_pretrained(tmp_path)
    template = ChatTemplate(source, load_tokenizer(tmp_path))
    for end in (2, 4, 5):
        for prompt in (True, False):
            expected = theirs.apply_chat_template(
                SPEECH[:end], add_generation_prompt=prompt, return_dict=False
            )
            assert template.encode(SPEECH[:end], add_generation_prompt=prompt) == expected


def test_answers_are_those_that_transformers_marks(tmp_path: Path) -> None:
    ours = KINDS["bpe"]()
    ours.chat_template = TEMPLATES["released"]
    ours.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    found: Any = theirs.apply_chat_template(
        SPEECH, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, answers = ChatTemplate(TEMPLATES["released"], ours).encode_answers(SPEECH)
    assert (found["input_ids"], found["assistant_masks"]) == (ids, list(map(int, answers)))
