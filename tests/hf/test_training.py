"""Training through transformers: checkpointing, Trainer, LoRA by peft."""

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_cases import VOCAB, make_ids, make_model, tnl_config
from hf_cases import hybrid_config, pair
from tolerances import GRADIENT_FLOAT64, relative_error
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import transnormer.hf  # noqa: F401 - registers the classes
from transnormer.data.tokenizers import train_bpe
from transnormer.models import checkpoint


def gradients(model: PreTrainedModel, ids: Tensor) -> tuple[dict[str, Tensor], int]:
    """Gradients of the loss by name, and the bytes that were kept for them."""
    kept = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.nbytes
        return x

    model.train()
    with saved_tensors_hooks(pack, lambda x: x):
        loss = model(ids, labels=ids).loss
    loss.backward()
    found = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return found, kept


@pytest.mark.parametrize("config", [tnl_config(), hybrid_config()], ids=["tnl", "hybrid"])
def test_checkpointing_gives_equal_gradients_for_less_memory(config: Any) -> None:
    _, model = pair(config)
    model.double()
    ids = make_ids(2, 24)
    exact, much = gradients(model, ids)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    found, little = gradients(model, ids)
    assert set(found) == set(exact)
    for name, x in exact.items():
        assert relative_error(found[name], x) <= GRADIENT_FLOAT64, name
    assert little < much / 2
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert gradients(model, ids)[1] == much


class Rows(torch.utils.data.Dataset):
    """Texts of one repeated pattern."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = (torch.arange(12) * 3 + index) % VOCAB
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def trainer(model: Any, directory: Path, **options: Any) -> Trainer:
    """Twelve steps of transformers' Trainer."""
    options = {"max_steps": 12, "save_strategy": "no", "logging_steps": 1} | options
    arguments = TrainingArguments(
        str(directory),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **options,
    )
    return Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())


def test_the_trainer_learns_and_saves_what_this_package_loads(tmp_path: Path) -> None:
    _, model = pair(tnl_config(init_std=0.05))
    run = trainer(model, tmp_path, save_strategy="steps", save_steps=6)
    before = run.evaluate()["eval_loss"]
    run.train()
    after = run.evaluate()["eval_loss"]
    assert after < before - 1.0
    last = checkpoint.load(tmp_path / "checkpoint-12")
    ids = make_ids(1, 9)
    assert torch.equal(last(ids).logits, model.eval()(ids).logits)


def test_the_trainer_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 6, "gradient_checkpointing": True}
    _, model = pair(tnl_config(init_std=0.05))
    whole = trainer(model, tmp_path, **options)
    whole.train()
    _, other = pair(tnl_config(init_std=0.05))
    resumed = trainer(other, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for (name, x), y in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(y, x, msg=name)


def test_lora_trains_is_saved_and_merges(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    checkpoint.save(make_model(tnl_config(init_std=0.05)), tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    names = {n.rsplit(".", 1)[-1] for n, m in base.named_modules() if hasattr(m, "in_features")}
    assert names == {"qkvu_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    assert 0 < trained < sum(x.numel() for x in base.parameters())
    run = trainer(model, tmp_path / "run", gradient_checkpointing=True)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before - 0.1
    model.save_pretrained(tmp_path / "adapter")

    ids = make_ids(2, 9)
    exact = model.eval()(ids).logits
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    torch.testing.assert_close(again(ids).logits, exact)
    greedy = again.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, exact, atol=1e-5, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    plain = checkpoint.load(tmp_path / "merged")
    torch.testing.assert_close(plain(ids).logits, exact, atol=1e-5, rtol=1e-4)
    found = merged.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(found, greedy)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_sft_trainer_of_trl_learns_answers(
    tmp_path: Path, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl = pytest.importorskip("trl", reason="trl is the extra sft")
    from datasets import Dataset
    from datasets.fingerprint import Hasher

    # Names of cache files: datasets pickles a class of pyarrow for them, which some versions refuse.
    monkeypatch.setattr(Hasher, "hash", lambda *value: uuid.uuid4().hex)
    tokenizer = train_bpe(["what is the colour of grass green sky blue"] * 3, vocab_size=290)
    config = tnl_config(vocab_size=tokenizer.vocab_size, init_std=0.05)
    checkpoint.save(make_model(config), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    rows = [
        {"prompt": "the colour of grass", "completion": " green"},
        {"prompt": "the colour of sky", "completion": " blue"},
    ]
    arguments = trl.SFTConfig(
        str(tmp_path / "run"),
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        logging_steps=5,
        packing=packed,
        padding_free=packed,
        max_length=64,
        disable_tqdm=True,
        save_strategy="no",
    )
    run = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        args=arguments,
        train_dataset=Dataset.from_list(rows * 8),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2
