"""This package's model and tasks in lm-evaluation-harness, against its own model and prompts.

Needs the extra ``eval``; run with ``pip install -e '.[dev,eval]'`` and ``-m slow``.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from data_cases import TEXT
from decoder_cases import make_model, tnl_config
from eval_cases import LOCAL, byte_model, write_tasks
from tolerances import LOGLIKELIHOOD

from transnormer.data import train_bpe
from transnormer.eval.scorer import evaluate_task
from transnormer.eval.tasks import FILE_TASKS, Item, Page, find_data
from transnormer.models import checkpoint as checkpoints
from transnormer.models.decoder import Decoder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning"),
]
REASON = "lm-evaluation-harness is not installed (the extra eval)"
FILES = [*LOCAL, "wikitext"]
# Draws for errors of perplexities, which are not compared.
BOOTSTRAP = 10


@pytest.fixture(scope="module", autouse=True)
def _offline() -> Iterator[None]:
    """Nothing may be fetched; ``datasets`` asks the hub otherwise."""
    pytest.importorskip("lm_eval", reason=REASON)
    datasets = pytest.importorskip("datasets", reason=REASON)
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    yield
    datasets.config.HF_HUB_OFFLINE = before


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each task."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def instances(requests: Sequence[tuple[Any, ...]], kind: str) -> list[Any]:
    """Requests as the harness makes them."""
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=request, idx=index)
        for index, request in enumerate(requests)
    ]


PAIRS = [
    (context, continuation)
    for context in (
        "the model reads the text",
        "ka lo mi",
        "",
        "the model reads ",
        TEXT[:700],
        TEXT[:700] + " ka",
    )
    for continuation in (" and the text is", " what", " x", " 线性注意力")
]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a tokenizer that transformers can read, on the disk."""
    directory = tmp_path_factory.mktemp("model") / "saved"
    tokenizer = train_bpe([TEXT], vocab_size=400)
    config = tnl_config(
        vocab_size=400, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id
    )
    checkpoints.save(make_model(config), directory)
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="module")
def ours(pretrained: Path) -> Any:
    """The model in the harness by its name."""
    from lm_eval.api.registry import get_model

    import transnormer.eval.harness  # noqa: F401

    found = get_model("transnormer").create_from_arg_string(
        f"pretrained={pretrained},dtype=float32", {"batch_size": 3, "device": "cpu"}
    )
    assert isinstance(found.model, Decoder)
    return found


@pytest.fixture(scope="module")
def theirs(pretrained: Path) -> Any:
    """The same weights and the same tokenizer in the harness's own model."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import transnormer.hf  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    begin = model.config.bos_token_id
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=3,
        max_length=8192,
        prefix_token_id=begin,
        add_bos_token=False,
        device="cpu",
    )


def test_loglikelihoods_are_hflm_s(ours: Any, theirs: Any) -> None:
    ours.add_bos = False
    try:
        mine = ours.loglikelihood(instances(PAIRS, "loglikelihood"), disable_tqdm=True)
    finally:
        ours.add_bos = True
    other = theirs.loglikelihood(instances(PAIRS, "loglikelihood"), disable_tqdm=True)
    differences = [abs(a[0] - b[0]) for a, b in zip(mine, other, strict=True)]
    print(f"largest difference of {len(PAIRS)} log-likelihoods: {max(differences):.3g}")
    assert max(differences) <= LOGLIKELIHOOD
    assert [greedy for _, greedy in mine] == [bool(greedy) for _, greedy in other]


def test_rolling_loglikelihoods_are_hflm_s(ours: Any, theirs: Any) -> None:
    texts = [(TEXT[:900],), ("ka",), (TEXT[100:400],), ("",)]
    mine = ours.loglikelihood_rolling(instances(texts, "loglikelihood_rolling"))
    other = theirs.loglikelihood_rolling(
        instances(texts[:-1], "loglikelihood_rolling"), disable_tqdm=True
    )
    assert mine[-1] == 0.0
    for a, b in zip(mine, other):
        print(f"rolling: {a:.6f} {b:.6f}")
        # Sums of some hundred terms: as many times what one term may differ by.
        assert abs(a - b) <= LOGLIKELIHOOD * max(1.0, abs(b) / 100.0)


def test_a_long_document_has_no_window(ours: Any, theirs: Any) -> None:
    text = (TEXT[:3000],)
    whole = ours.loglikelihood_rolling(instances([text], "loglikelihood_rolling"))[0]
    theirs._max_length = 64
    try:
        cut = theirs.loglikelihood_rolling(
            instances([text], "loglikelihood_rolling"), disable_tqdm=True
        )[0]
    finally:
        theirs._max_length = 8192
    same = theirs.loglikelihood_rolling(
        instances([text], "loglikelihood_rolling"), disable_tqdm=True
    )[0]
    assert abs(whole - same) < 1e-2 < abs(whole - cut)


def test_generated_texts_are_hflm_s(ours: Any, theirs: Any) -> None:
    contexts = ["the model reads", "ka lo", TEXT[:300]]
    requests = [(text, {"until": ["\n"], "max_gen_toks": 12}) for text in contexts]
    ours.add_bos = True
    # HFLM's generation adds no begin-of-text token here, so the text brings its own.
    begin = theirs.tokenizer.decode([theirs.prefix_token_id])
    others = [(begin + text, dict(options)) for text, options in requests]
    mine = ours.generate_until(instances(requests, "generate_until"))
    other = theirs.generate_until(instances(others, "generate_until"), disable_tqdm=True)
    assert mine == other
    ours.add_bos = False
    try:
        mine = ours.generate_until(instances(requests, "generate_until"))
    finally:
        ours.add_bos = True
    assert mine == theirs.generate_until(instances(requests, "generate_until"), disable_tqdm=True)
    assert mine != other


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_results_do_not_depend_on_the_batch(ours: Any, batch_size: int) -> None:
    before = ours.loglikelihood(instances(PAIRS, "loglikelihood"), disable_tqdm=True)
    size, ours.batch_size = ours.batch_size, batch_size
    try:
        after = ours.loglikelihood(instances(PAIRS, "loglikelihood"), disable_tqdm=True)
    finally:
        ours.batch_size = size
    for (a, greedy), (b, as_before) in zip(after, before, strict=True):
        assert abs(a - b) <= LOGLIKELIHOOD
        assert greedy == as_before


def test_options_of_generation_that_are_not_known_are_refused(ours: Any) -> None:
    request = instances([("a", {"until": [], "num_beams": 4})], "generate_until")
    with pytest.raises(NotImplementedError, match="num_beams"):
        ours.generate_until(request)


def test_a_batch_size_that_is_no_number_is_refused() -> None:
    from transnormer.eval.harness import TransnormerLM

    with pytest.raises(ValueError, match="batch_size is 'auto'"):
        TransnormerLM(*byte_model(), batch_size="auto")


@pytest.mark.parametrize("num_fewshot", [0, 2])
@pytest.mark.parametrize("name", FILES)
def test_the_scorer_has_the_harness_s_figures(data: Path, name: str, num_fewshot: int) -> None:
    from transnormer.eval.harness import run_harness

    if name == "wikitext" and num_fewshot:
        num_fewshot = 0
    model, tokenizer = byte_model()
    theirs = run_harness(
        model,
        tokenizer,
        [f"tnl_{name}"],
        data=data,
        num_fewshot=num_fewshot,
        rows=3,
        bootstrap_iters=BOOTSTRAP,
    )[f"tnl_{name}"]
    mine = evaluate_task(model, tokenizer, name, data=data, num_fewshot=num_fewshot, rows=3)
    assert mine.figures
    for figure, (value, stderr) in mine.figures.items():
        assert value == pytest.approx(theirs[f"{figure},none"], rel=1e-6)
        if figure.startswith("acc"):
            assert stderr == pytest.approx(theirs[f"{figure}_stderr,none"], rel=1e-6)


def shared_files(shared_dir: Path) -> list[str]:
    """The tasks whose files lie in the shared folder."""
    return [
        name
        for name, task in FILE_TASKS.items()
        if any(list((shared_dir / "eval").glob(f"{file}*")) for file in task.files)
    ]


def test_the_scorer_has_the_harness_s_figures_on_the_real_files(shared_dir: Path) -> None:
    from transnormer.eval.harness import run_harness

    model, tokenizer = byte_model()
    names = shared_files(shared_dir)
    assert len(names) >= 14
    for num_fewshot in (0, 2):
        chosen = [name for name in names if not (num_fewshot and name == "wikitext")]
        options: dict[str, Any] = {
            "data": shared_dir / "eval",
            "limit": 5,
            "num_fewshot": num_fewshot,
        }
        theirs = run_harness(
            model,
            tokenizer,
            [f"tnl_{name}" for name in chosen],
            bootstrap_iters=BOOTSTRAP,
            **options,
        )
        for name in chosen:
            mine = evaluate_task(model, tokenizer, name, **options)
            for figure, (value, _) in mine.figures.items():
                other = theirs[f"tnl_{name}"][f"{figure},none"]
                print(f"{num_fewshot}-shot {name} {figure}: {value:.6g} {other:.6g}")
                assert value == pytest.approx(other, rel=1e-6)


def folder_of(name: str) -> Path:
    """The harness's own task files of a name."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent / name


# task -> (its packaged file, a record with the fields of the original data set). The record is
# the same question as the first of the local file.
ORIGINAL: dict[str, tuple[str, dict[str, Any]]] = {
    "boolq": (
        "super_glue/boolq/default.yaml",
        {"passage": "Fact 0 is about water.", "question": "is fact 0 about ice", "label": 0},
    ),
    "piqa": (
        "piqa/piqa.yaml",
        {
            "goal": "How do I open jar 0?",
            "sol1": "turn the lid",
            "sol2": "break the glass of the jar",
            "label": 0,
        },
    ),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        {
            "activity_label": "Playing pool",
            "ctx_a": "A woman makes shot 0.",
            "ctx_b": "the woman",
            "endings": ["sits.", "takes [step] another shot.", "eats  a pie.", "leaves."],
            "label": "0",
        },
    ),
    "winogrande": (
        "winogrande/default.yaml",
        {
            "sentence": "Tea 0 beat soup as the _ was hot.",
            "option1": "tea",
            "option2": "soup",
            "answer": "1",
        },
    ),
    "wsc273": (
        "wsc273/default.yaml",
        {
            "text": "The cup fell because it was wet.",
            "pronoun": "it",
            "pronoun_loc": 21,
            "quote": "it was wet.",
            "options": ["the cup", "the table"],
            "label": 0,
        },
    ),
    "arc_easy": (
        "arc/arc_easy.yaml",
        {
            "question": "What is 0 and one?",
            "choices": {"text": ["0", "1", "a hundred", "none"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        },
    ),
    "openbookqa": (
        "openbookqa/openbookqa.yaml",
        {
            "question_stem": "Predator 0 eats",
            "choices": {
                "text": ["lions", "bunnies", "grass", "stones"],
                "label": ["A", "B", "C", "D"],
            },
            "answerKey": "B",
        },
    ),
    "copa": (
        "super_glue/copa/default.yaml",
        {
            "premise": "The cup fell.",
            "question": "cause",
            "choice1": "It broke.",
            "choice2": "Nobody held it.",
            "label": 1,
        },
    ),
    "lambada_openai": (
        "lambada/lambada_openai.yaml",
        {"text": "She had 0 signs. He asked her to read the signs"},
    ),
    "cmmlu": (
        "cmmlu/cmmlu_agronomy.yaml",
        {
            "Question": " agronomy 第0题 ",
            "A": "胸",
            "B": "腹",
            "C": "大腿",
            "D": "小腿",
            "Answer": "A",
        },
    ),
}


@pytest.mark.parametrize("num_fewshot", [0, 1])
@pytest.mark.parametrize("name", ORIGINAL)
def test_prompts_are_those_of_the_packaged_tasks(data: Path, name: str, num_fewshot: int) -> None:
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    file, record = ORIGINAL[name]
    config = load_yaml(folder_of(file))
    split = config.get("test_split") or config["validation_split"]
    rows = datasets.Dataset.from_list([record] * 2)
    config |= {
        "custom_dataset": lambda **_: dict.fromkeys((split, "train", "dev", "validation"), rows),
        "num_fewshot": num_fewshot,
        # The same question once more: a packaged task draws its examples from other files.
        "fewshot_config": {"sampler": "first_n"},
        "fewshot_split": "dev",
    }
    config = {key: value for key, value in config.items() if key not in ("tag", "dataset_path")}
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(0)
    task.build_all_requests(limit=1)
    theirs = [instance.args for instance in task.instances]
    item: Item = FILE_TASKS[name].read(find_data(FILE_TASKS[name], data)).test[0]
    assert not isinstance(item, Page)
    before = FILE_TASKS[name].describe(getattr(item, "subject", ""))
    if num_fewshot:
        before += item.example() + "\n\n"  # pyrefly: ignore[missing-attribute]
    assert item.requests(before) == theirs


def test_the_text_of_wikitext_is_the_packaged_task_s(data: Path) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(folder_of("wikitext/wikitext.yaml"))
    for page in FILE_TASKS["wikitext"].read(data / "wikitext2_test.raw.txt").test:
        assert isinstance(page, Page)
        assert page.text == config["doc_to_target"]({"page": page.original})
        theirs = config["process_results"]({"page": page.original}, (-1.0,))
        from transnormer.eval.harness_tasks import page_results

        assert page_results(page._asdict(), (-1.0,)) == theirs


@pytest.mark.parametrize(
    "name", ["qasper", "narrative_qa", "quality", "contract_nli", "gov_report"]
)
def test_prompts_of_scrolls_are_those_of_the_packaged_tasks(tmp_path: Path, name: str) -> None:
    import json

    from lm_eval.tasks.scrolls import task as scrolls

    inputs = {
        "qasper": ("What is it?\n\nA long paper.", "a tool"),
        "narrative_qa": ("Who?\n\nA book.\n\nIts end.", "Ann"),
        "quality": ("Who?\n\n (A) Ann (B) Bob  B. (C) Cy (D) Di\n\nA story.", "Bob B."),
        "contract_nli": ("It ends.\n\nThe contract.", "Entailment"),
        "gov_report": ("A report.", "short"),
    }
    text, output = inputs[name]
    record = {"id": "1", "pid": "1", "input": text, "output": output}
    file = tmp_path / "validation.jsonl"
    file.write_text(json.dumps(record) + "\n")
    (item,) = FILE_TASKS[f"scrolls_{name}"].read(file).test
    classes = {
        "qasper": scrolls.Qasper,
        "narrative_qa": scrolls.NarrativeQA,
        "quality": scrolls.QuALITY,
        "contract_nli": scrolls.ContractNLI,
        "gov_report": scrolls.GovReport,
    }
    # Its constructor fetches a metric.
    packaged = object.__new__(classes[name])
    (document,) = packaged._process_doc({**record, "outputs": [output]})
    assert item.context == packaged.doc_to_text(document)  # pyrefly: ignore[missing-attribute]
    if "choices" in document:
        assert list(item.choices) == list(document["choices"])  # pyrefly: ignore
        assert item.gold == document["gold"]  # pyrefly: ignore


def test_rouge_is_rouge_score_s() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason=REASON)

    from transnormer.eval.metrics import rouge_scores

    prediction, reference = "The river sold the old clock, twice.", "An old river clock was sold"
    theirs = scorer.RougeScorer(["rouge1", "rouge2", "rougeL"]).score(reference, prediction)
    mine = rouge_scores(prediction, [reference])
    assert mine == pytest.approx([100 * score.fmeasure for score in theirs.values()])


def test_answers_on_long_documents_run_in_the_harness(tmp_path: Path) -> None:
    import json

    from transnormer.eval.harness import run_harness

    records = [
        {"id": "0", "pid": "0", "input": "Is it?\n\nA paper.", "output": "Yes"},
        {"id": "1", "pid": "1", "input": "What?\n\nA paper.", "output": "a tool"},
    ]
    file = tmp_path / "qasper.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    model, tokenizer = byte_model()
    name = "scrolls_qasper"
    theirs = run_harness(model, tokenizer, [f"tnl_{name}"], places={name: file})[f"tnl_{name}"]
    mine = evaluate_task(model, tokenizer, name, places={name: file})
    assert mine.figures["f1"].value == pytest.approx(theirs["f1,none"])


def test_the_command_prints_the_folder_of_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    from transnormer.eval import harness

    harness.main(["tasks"])
    folder = Path(capsys.readouterr().out.strip())
    assert {path.stem for path in folder.glob("*.yaml")} == set(FILE_TASKS)


def test_the_harness_s_command_finds_the_model(
    pretrained: Path, data: Path, tmp_path: Path
) -> None:
    import json

    from transnormer.eval.harness import TASK_FOLDER

    arguments = [
        *("--model", "transnormer", "--model_args", f"pretrained={pretrained}"),
        *("--include_path", str(TASK_FOLDER), "--tasks", "tnl_copa,tnl_cmmlu"),
        *("--metadata", json.dumps({"data": str(data)}), "--batch_size", "2"),
        *("--output_path", str(tmp_path), "--num_fewshot", "1", "--device", "cpu"),
    ]
    command = [sys.executable, "-m", "transnormer.eval.harness", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    assert set(results) == {"tnl_copa", "tnl_cmmlu"}
