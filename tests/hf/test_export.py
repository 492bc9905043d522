"""Directories with a file of code: loaded by transformers where this package cannot be imported."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from data_cases import sentencepiece_model
from decoder_cases import make_ids, make_model, tnl_config
from hf_cases import hybrid_config, pair
from nn.mixer_cases import CASES, ids_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from transnormer.cli.app import run
from transnormer.data.tokenizers import find_tokenizer_file, load_tokenizer, train_bpe
from transnormer.hf.export import CODE, code, export
from transnormer.infer.text import begin_id
from transnormer.models import checkpoint
from transnormer.models.decoder import Decoder

CHILD = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transnormer", "pydantic"):
            raise ModuleNotFoundError(f"{name} is not there", name=name)

sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

torch.set_num_threads(1)
for directory in sys.argv[1:]:
    given = torch.load(f"{directory}.pt")
    auto = AutoModelForCausalLM if given["causal"] else AutoModelForMaskedLM
    model = auto.from_pretrained(directory, trust_remote_code=True)
    ids, found = given["ids"], {}
    with torch.no_grad():
        found["logits"] = model(ids).logits
        if given["causal"]:
            options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
            found["tokens"] = model.generate(ids, **options)
    if given["causal"]:
        model.train()
        loss = model(ids, labels=ids).loss
        loss.backward()
        found["loss"] = loss.detach()
    model.save_pretrained(f"{directory}.again")
    if given["text"] is not None:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
        found["text"] = tokenizer(given["text"]).input_ids
    torch.save(found, f"{directory}.out")
"""


def in_a_child(models: dict[str, Decoder], ids: torch.Tensor, folder: Path, **tokenizers: object):
    """What a process without this package computes from exported models, by name."""
    for name, model in models.items():
        tokenizer = tokenizers.get(name)
        export(model, folder / name, tokenizer=tokenizer)
        text = None if tokenizer is None else "the quick fox"
        given = {"ids": ids, "causal": model.config.causal, "text": text}
        torch.save(given, folder / f"{name}.pt")
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    directories: Sequence[str] = [str(folder / name) for name in models]
    command = [sys.executable, "-W", "ignore", "-c", CHILD, *directories]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(folder / f"{name}.out") for name in models}


@pytest.mark.slow
def test_transformers_alone_computes_the_same(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    models = {
        "tnl": make_model(tnl_config(tie_embeddings=False)),
        "hybrid": make_model(hybrid_config()),
        "masked": make_model(tnl_config(causal=False)),
    }
    tokenizers = {
        "tnl": load_tokenizer(tmp_path / "tokenizer.model"),
        "hybrid": train_bpe(["the quick brown fox"] * 3, vocab_size=270),
    }
    ids = make_ids(2, 9)
    found = in_a_child(models, ids, tmp_path, **tokenizers)
    for name, model in models.items():
        assert torch.equal(found[name]["logits"], model(ids).logits)
        # What the child saved is whole, here and there.
        assert torch.equal(
            checkpoint.load(tmp_path / f"{name}.again")(ids).logits, model(ids).logits
        )
        assert (tmp_path / f"{name}.again" / CODE).is_file()
    for name, tokenizer in tokenizers.items():
        begin = begin_id(models[name], tokenizer)
        assert found[name]["text"] == [begin, *tokenizer.encode("the quick fox")]
        wrapped = pair(models[name].config)[1]
        tokens = wrapped.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(found[name]["tokens"], tokens)
        torch.testing.assert_close(found[name]["loss"], wrapped(ids, labels=ids).loss.detach())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_mixer_is_exported(tmp_path: Path) -> None:
    models = {case.name: case.model() for case in CASES}
    ids = ids_of(2, 9)
    found = in_a_child(models, ids, tmp_path)
    for name, model in models.items():
        assert torch.equal(found[name]["logits"], model(ids).logits), name


def test_the_file_holds_what_the_model_needs_and_no_more() -> None:
    text = code(make_model())
    classes = {x.name for x in ast.parse(text).body if isinstance(x, ast.ClassDef)}
    assert {"Lightning", "Decoder", "TransnormerDecoderForCausalLM"} <= classes
    assert not classes & {"Softmax", "Hgrn2", "TransnormerForCausalLM", "BaiChuanTokenizer"}
    assert "Softmax" in code(make_model(hybrid_config()))
    imported = {
        name.split(".")[0]
        for x in ast.walk(ast.parse(text))
        if isinstance(x, ast.Import | ast.ImportFrom)
        for name in ([a.name for a in x.names] if isinstance(x, ast.Import) else [x.module or ""])
    }
    theirs = {"torch", "transformers", "numpy", "safetensors"}
    assert imported <= theirs | sys.stdlib_module_names


def test_the_command_exports_with_the_tokenizer(tmp_path: Path) -> None:
    checkpoint.save(make_model(), tmp_path / "model")
    train_bpe(["the quick brown fox"] * 3, vocab_size=270).save(tmp_path / "model")
    assert run(["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert {CODE, "config.json", "tokenizer.json"} <= {x.name for x in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
@pytest.mark.parametrize("own", [None, 2], ids=["tokenizer's", "model's"])
def test_a_text_begins_in_transformers_as_it_does_here(
    tmp_path: Path, kind: str, own: int | None
) -> None:
    if kind == "bpe":
        tokenizer = train_bpe(["the quick brown fox"] * 3, vocab_size=270)
    else:
        (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
        tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    model = Decoder(tnl_config(vocab_size=300).model_copy(update={"bos_token_id": own}))
    export(model, tmp_path / "model", tokenizer=tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert begin_id(model, tokenizer) == (tokenizer.bos_id if own is None else own)
    for text in ("the quick fox", ""):
        ids = tokenizer.encode(text)
        assert theirs(text).input_ids == [begin_id(model, tokenizer), *ids]
        assert theirs(text, add_special_tokens=False).input_ids == ids
    # The file of a tokenizer is what shards and checkpoints know it by.
    again = load_tokenizer(find_tokenizer_file(tmp_path / "model"))
    assert again.fingerprint == tokenizer.fingerprint
    assert begin_id(model, again) == begin_id(model, tokenizer)


def test_this_package_reads_an_exported_directory(tmp_path: Path) -> None:
    model = make_model()
    export(model, tmp_path / "model")
    export(model, tmp_path / "model")
    ids = make_ids(2, 9)
    assert torch.equal(checkpoint.load(tmp_path / "model")(ids).logits, model(ids).logits)
    # The registered classes take the place of the code: nothing of the directory runs.
    (tmp_path / "model" / CODE).write_text("raise SystemExit('remote code ran')\n")
    local = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(local).__module__ == "transnormer.hf.modeling"
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"].startswith("modeling_transnormer.")
