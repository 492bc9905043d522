"""The scorer's figures, against passes over whole texts, one request at a time."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from decoder_cases import make_model, tnl_config
from eval_cases import LOCAL, byte_model, write_tasks
from tolerances import LOGLIKELIHOOD

from transnormer.data import ByteTokenizer
from transnormer.eval.generation import generate_texts
from transnormer.eval.scorer import evaluate_task
from transnormer.eval.tasks import FILE_TASKS
from transnormer.infer.generate import generate
from transnormer.models.decoder import Decoder

Subject = tuple[Decoder, ByteTokenizer]


@pytest.fixture(scope="module")
def subject() -> Subject:
    """A model over bytes with its tokenizer."""
    return byte_model()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each task."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def logprob(subject: Subject, context: str, continuation: str) -> tuple[float, bool]:
    """Of the bytes of a continuation after a begin-of-text token and the bytes of its context."""
    model, tokenizer = subject
    ids = [257, *(context + continuation).encode()]
    count = len(continuation.encode())
    logits = model(torch.tensor([ids[:-1]])).logits[0, -count:].double()
    labels = torch.tensor(ids[-count:])
    score = logits.log_softmax(-1).gather(1, labels[:, None]).sum().item()
    return score, bool((logits.argmax(-1) == labels).all())


def test_choices_are_right_where_the_likeliest_is(subject: Subject, data: Path) -> None:
    result = evaluate_task(*subject, "piqa", data=data)
    items = FILE_TASKS["piqa"].read(data / "piqa.jsonl.xz").test
    acc, characters = [], []
    for item in items:
        scores = np.array([logprob(subject, *request)[0] for request in item.requests()])
        lengths = np.array([len(choice) for choice in item.choices])
        acc.append(scores.argmax() == item.gold)
        characters.append((scores / lengths).argmax() == item.gold)
    assert result.items == 4
    assert result.figures["acc"].value == np.mean(acc)
    assert result.figures["acc_norm"].value == np.mean(characters)
    assert result.figures["acc_bytes"].value == np.mean(characters)


def test_norms_count_characters_and_bytes(subject: Subject, tmp_path: Path) -> None:
    records = [
        {"query": f"{i}", "choices": [chr(0xE0 + i) * 6, chr(97 + i) * 9], "gold": 0}
        for i in range(12)
    ]
    file = tmp_path / "openbookqa.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    result = evaluate_task(*subject, "openbookqa", data=tmp_path)
    picks: dict[str, list[bool]] = {"acc_norm": [], "acc_bytes": []}
    for record in records:
        scores = [logprob(subject, record["query"], f" {text}")[0] for text in record["choices"]]
        for name, lengths in (
            ("acc_norm", [len(text) for text in record["choices"]]),
            ("acc_bytes", [len(text.encode()) for text in record["choices"]]),
        ):
            picks[name].append(scores[0] / lengths[0] > scores[1] / lengths[1])
    assert result.figures["acc_norm"].value == np.mean(picks["acc_norm"])
    assert result.figures["acc_bytes"].value == np.mean(picks["acc_bytes"])
    assert picks["acc_norm"] != picks["acc_bytes"]


def test_last_words_have_a_perplexity(subject: Subject, data: Path) -> None:
    result = evaluate_task(*subject, "lambada_openai", data=data)
    records = LOCAL["lambada_openai"][1]
    scores = [
        logprob(subject, record["context"], " " + record["continuation"])[0] for record in records
    ]
    assert math.isclose(
        math.log(result.figures["perplexity"].value), -np.mean(scores), abs_tol=LOGLIKELIHOOD
    )


def test_pages_are_scored_whole_by_word_and_byte(subject: Subject, data: Path) -> None:
    result = evaluate_task(*subject, "wikitext", data=data)
    pages = FILE_TASKS["wikitext"].read(data / "wikitext2_test.raw.txt").test
    total = sum(logprob(subject, "", page.text)[0] for page in pages)
    num_bytes = sum(len(page.original.encode()) for page in pages)
    # The pages begin and end with a space, beside which the harness counts an empty word.
    words = sum(len(page.original.split()) + 2 for page in pages)
    figures = {name: figure.value for name, figure in result.figures.items()}
    assert math.isclose(figures["bits_per_byte"], -total / num_bytes / math.log(2), rel_tol=1e-5)
    assert math.isclose(math.log(figures["byte_perplexity"]), -total / num_bytes, rel_tol=1e-5)
    assert math.isclose(math.log(figures["word_perplexity"]), -total / words, rel_tol=1e-5)


def test_examples_stand_before_every_question(subject: Subject, data: Path) -> None:
    bare = evaluate_task(*subject, "lambada_openai", data=data)
    shown = evaluate_task(*subject, "lambada_openai", data=data, num_fewshot=2)
    assert shown.num_fewshot == 2
    assert shown.figures["perplexity"] != bare.figures["perplexity"]
    again = evaluate_task(*subject, "lambada_openai", data=data, num_fewshot=2)
    assert again == shown
    other = evaluate_task(*subject, "lambada_openai", data=data, num_fewshot=2, seed=5)
    assert other.figures["perplexity"] != shown.figures["perplexity"]


def test_figures_do_not_depend_on_the_batch(subject: Subject, data: Path) -> None:
    for name in ("lambada_openai", "hellaswag", "cmmlu"):
        few, many = (
            evaluate_task(*subject, name, data=data, num_fewshot=2, rows=rows) for rows in (1, 7)
        )
        assert few.figures.keys() == many.figures.keys()
        for figure in few.figures:
            assert math.isclose(few.figures[figure].value, many.figures[figure].value, rel_tol=1e-4)


def test_subjects_are_reported_apart(subject: Subject, data: Path) -> None:
    result = evaluate_task(*subject, "cmmlu", data=data, num_fewshot=3)
    assert list(result.parts) == ["agronomy", "anatomy"]
    mean = np.mean([figures["acc"].value for figures in result.parts.values()])
    assert result.figures["acc"].value == mean


def test_limit_takes_the_first_items(subject: Subject, data: Path) -> None:
    assert evaluate_task(*subject, "boolq", data=data, limit=3).items == 3
    with pytest.raises(ValueError, match="limit is 0"):
        evaluate_task(*subject, "boolq", data=data, limit=0)


def test_an_unknown_task_is_refused(subject: Subject, data: Path) -> None:
    with pytest.raises(ValueError, match="the task is 'bool'; expected one of arc_challenge"):
        evaluate_task(*subject, "bool", data=data)


@pytest.fixture
def long_documents(tmp_path: Path) -> Path:
    """Questions of Qasper, one that is answered by yes or no, one that is not."""
    records = [
        {"id": "0", "input": "Is it?\n\nA paper.", "output": "Yes"},
        {"id": "1", "input": "What?\n\nA paper.", "output": "a tool"},
    ]
    folder = tmp_path / "scrolls" / "qasper"
    folder.mkdir(parents=True)
    with (folder / "validation.jsonl").open("w") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)
    return tmp_path


def test_answers_are_chosen_or_generated(subject: Subject, long_documents: Path) -> None:
    result = evaluate_task(*subject, "scrolls_qasper", data=long_documents)
    context = "A paper.\n\nQuestion: Is it?\nAnswer:"
    yes, no = (logprob(subject, context, text)[0] for text in (" yes", " no"))
    # The generated text of a random model holds none of the words.
    assert result.figures["f1"].value == (50.0 if yes > no else 0.0)


def test_generated_texts_are_those_of_generate(subject: Subject) -> None:
    model, tokenizer = subject
    prompts = ["one", "", "another, longer", "x"]
    texts = generate_texts(model, tokenizer, prompts, max_new_tokens=9, rows=2)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([[257, *prompt.encode()]])
        generation = generate(model, ids, max_new_tokens=9, temperature=0.0)
        generation.draw_below(tokenizer.vocab_size)
        for _ in generation:
            pass
        assert text == tokenizer.decode(generation.token_ids[0])


def test_the_begin_of_text_may_be_left_out(subject: Subject) -> None:
    model, tokenizer = subject
    texts = generate_texts(model, tokenizer, ["one", ""], max_new_tokens=9, begin=False)
    for ids, text in zip(([*b"one"], [257]), texts, strict=True):
        generation = generate(model, torch.tensor([ids]), max_new_tokens=9, temperature=0.0)
        generation.draw_below(tokenizer.vocab_size)
        for _ in generation:
            pass
        assert text == tokenizer.decode(generation.token_ids[0])
    assert texts[0] != generate_texts(model, tokenizer, ["one"], max_new_tokens=9)[0]


def test_generation_ends_before_a_stop_text(subject: Subject) -> None:
    whole = generate_texts(*subject, ["one"], max_new_tokens=12)[0]
    cut = generate_texts(*subject, ["one"], max_new_tokens=12, stop=(whole[4:6], "\n"))[0]
    assert cut == whole[: whole.index(whole[4:6])].split("\n")[0]


def test_ids_that_the_tokenizer_lacks_are_never_drawn() -> None:
    tokenizer = ByteTokenizer()
    # Embeddings of multiples of 64 have unused rows.
    model = make_model(tnl_config(vocab_size=4 * tokenizer.vocab_size, bos_token_id=257))
    texts = generate_texts(model, tokenizer, ["one", "two"], max_new_tokens=8)
    assert all(text for text in texts)
