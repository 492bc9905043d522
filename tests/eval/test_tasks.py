"""What tasks ask: the prompts of lm-evaluation-harness, made from the fields of local files."""

import json
from pathlib import Path
from typing import Any

import pytest
from eval_cases import write_tasks

from transnormer.data import ByteTokenizer
from transnormer.eval.prompts import Shots, encode_requests
from transnormer.eval.tasks import FILE_TASKS, Choices, Item, Items, Page, find_data
from transnormer.eval.tasks.language import articles, detokenized


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each task."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def read(name: str, data: Path) -> Items:
    """The items of a task."""
    return FILE_TASKS[name].read(find_data(FILE_TASKS[name], data))


# The first request of a task's first item, after lm-evaluation-harness 0.4.13.
FIRST = {
    "boolq": ("Fact 0 is about water.\nQuestion: is fact 0 about ice?\nAnswer:", " no"),
    "piqa": ("Question: How do I open jar 0?\nAnswer:", " turn the lid"),
    "siqa": ("Q: Ann met 0 friends. How did Ann feel?\nA:", " glad"),
    "hellaswag": ("Playing pool: A woman makes shot 0. The woman", " sits."),
    "winogrande": ("Tea 0 beat soup as the tea", " was hot."),
    "wsc273": ("The cup fell because the cup", "  was wet."),
    "arc_easy": ("Question: What is 0 and one?\nAnswer:", " 0"),
    "arc_challenge": ("Question: Why is rock 0 hard?\nAnswer:", " heat"),
    "openbookqa": ("Predator 0 eats", " lions"),
    "copa": ("The cup fell because", "  it broke."),
    "commonsense_qa": (
        "Question: Where is shop 0?\nA. bank\nB. mall\nC. sea\nD. sky\nAnswer:",
        " A",
    ),
    "lambada_openai": ("She had 0 signs. He asked her to read the", " signs"),
    "cmmlu": ("agronomy 第0题\nA. 胸\nB. 腹\nC. 大腿\nD. 小腿\n答案：", " A"),
}


@pytest.mark.parametrize("name", FIRST)
def test_prompts_are_the_harness_s(name: str, data: Path) -> None:
    item = read(name, data).test[0]
    assert not isinstance(item, Page)
    assert item.requests()[0] == FIRST[name]


def test_every_local_task_has_a_file_of_its_own() -> None:
    folder = Path(__file__).parents[2] / "src" / "transnormer" / "eval" / "lm_eval_tasks"
    assert {path.stem for path in folder.glob("*.yaml")} == set(FILE_TASKS)


def test_marks_of_wikihow_are_cleaned_away(data: Path) -> None:
    item = read("hellaswag", data).test[0]
    assert isinstance(item, Choices)
    assert item.choices[1:3] == ("takes another shot.", "eats a pie.")


def test_wikitext_is_cut_at_titles_and_undone(data: Path) -> None:
    first, second = read("wikitext", data).test
    assert isinstance(first, Page)
    assert isinstance(second, Page)
    assert "= Robert =" in first.text
    assert "== Career ==" in first.text
    assert "actor, born in 1,960. He had a role (once)." in first.text
    assert 'play\'s "first" night.' in first.text
    assert first.original + second.original == "".join(articles(first.original + second.original))
    assert second.text == detokenized(second.original)
    assert "The Bill is a series; it ran" in second.text


def test_examples_are_drawn_and_never_the_question_itself(data: Path) -> None:
    task, items = FILE_TASKS["piqa"], read("piqa", data)
    shots = Shots(task, items, 3, seed=1234)
    for item in items.test:
        before = shots.before(item)
        assert isinstance(item, Choices)
        assert item.context not in before
        assert before.count("\n\n") == 3
        assert before.endswith("\n\n")
    again = Shots(task, items, 3, seed=1234)
    assert again.before(items.test[0]) == Shots(task, items, 3, seed=1234).before(items.test[0])


def test_examples_of_examinations_are_the_first_of_the_subject(data: Path) -> None:
    task, items = FILE_TASKS["cmmlu"], read("cmmlu", data)
    text = Shots(task, items, 2, seed=0).before(items.test[-1])
    options = "A. 胸\nB. 腹\nC. 大腿\nD. 小腿\n答案："
    assert text == (
        "以下是关于解剖学的单项选择题，请直接给出正确答案的选项。\n\n"
        f"anatomy 第0题\n{options} A\n\nanatomy 第1题\n{options} B\n\n"
    )


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("piqa", 4, "expected less than the 4 questions"),
        ("cmmlu", 4, "expected at most 3, the examples of cmmlu for agronomy"),
        ("wikitext", 1, "expected 0 for wikitext"),
        ("piqa", -1, "expected at least 0"),
    ],
)
def test_examples_that_there_are_not_are_refused(
    data: Path, name: str, count: int, message: str
) -> None:
    items = read(name, data)
    with pytest.raises(ValueError, match=message):
        Shots(FILE_TASKS[name], items, count, seed=0).before(items.test[0])


def test_published_folders_of_csv_files_are_read(tmp_path: Path) -> None:
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"world_religions_{split}.csv").write_text(
            f'"Who, in {split}?",a,b,c,d,C\n'
        )
    items = FILE_TASKS["mmlu"].read(tmp_path)
    assert items.test == [
        Choices(
            "Who, in test?\nA. a\nB. b\nC. c\nD. d\nAnswer:",
            ("A", "B", "C", "D"),
            2,
            "world_religions",
        )
    ]
    assert items.shots is not None
    assert len(items.shots) == 1
    described = FILE_TASKS["mmlu"].describe("world_religions")
    assert described.endswith("(with answers) about world religions.\n\n")


def test_a_header_names_the_columns(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "law_val.csv").write_text(
        "id,question,A,B,C,D,answer\n0,何,甲,乙,丙,丁,D\n"
    )
    item = FILE_TASKS["ceval"].read(tmp_path).test[0]
    assert item == Choices("何\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：", ("A", "B", "C", "D"), 3, "law")


SCROLLS: dict[str, tuple[str, list[str]]] = {
    "qasper": ("What is it?\n\nA long paper.", ["a tool", "a big tool"]),
    "quality": ("Who?\n\n (A) Ann (B) Bob  B. (C) Cy (D) Di\n\nA story.", ["Bob B."]),
    "contract_nli": ("It ends.\n\nThe contract.", ["Entailment"]),
    "gov_report": ("A report.", ["short"]),
}


def scrolls(tmp_path: Path, name: str) -> Item:
    """The one question of a task, a line for each reference."""
    text, outputs = SCROLLS[name]
    lines = [{"id": "1", "pid": "1", "input": text, "output": output} for output in outputs]
    file = tmp_path / "validation.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (item,) = FILE_TASKS[f"scrolls_{name}"].read(tmp_path).test
    return item


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "qasper",
            {
                "context": "A long paper.\n\nQuestion: What is it?\nAnswer:",
                "references": ("a tool", "a big tool"),
            },
        ),
        (
            "quality",
            {
                "context": "A story.\n\nQuestion: Who?\nAnswer:",
                "choices": ("Ann", "Bob B.", "Cy", "Di"),
                "gold": 1,
            },
        ),
        (
            "contract_nli",
            {"context": "The contract.\n\nHypothesis: It ends.\nConclusion:", "gold": 1},
        ),
        (
            "gov_report",
            {
                "context": "A report.\n\nQuestion: What is a summary of the preceding text?\nAnswer:",
                "metric": "rouge",
            },
        ),
    ],
)
def test_scrolls_is_read_as_published(tmp_path: Path, name: str, expected: dict[str, Any]) -> None:
    item = scrolls(tmp_path, name)
    assert {key: getattr(item, key) for key in expected} == expected


def test_contexts_end_where_they_end_alone() -> None:
    pairs = encode_requests(ByteTokenizer(), [("ab ", "cd"), ("", "x"), ("ab ", " e")], 257)
    assert pairs == [
        ([257, *b"ab"], list(b" cd")),
        ([257], list(b"x")),
        ([257, *b"ab"], list(b"  e")),
    ]


def test_an_empty_continuation_is_refused() -> None:
    with pytest.raises(ValueError, match="has no token of its own"):
        encode_requests(ByteTokenizer(), [("a", "")], 257)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "Question: a\\n", "choices": ["b", "c"]}', "has no field 'gold'"),
        ('{"query": "Question: a\\n", "choices": ["b"], "gold": 0}', "expected at least two"),
        ('{"query": "Question: a\\n", "choices": ["b", "c"], "gold": 2}', "from 0 to 1"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 0}', "expected one from 'Question: '"),
        ("[]", "is no object"),
        ("", "is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "piqa.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match=rf"piqa\.jsonl.*{message}"):
        FILE_TASKS["piqa"].read(file)


def test_an_ending_of_marks_alone_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "hellaswag.jsonl"
    file.write_text('{"query": "a", "choices": ["b", "[step]"], "gold": 0}')
    with pytest.raises(ValueError, match=r"hellaswag.jsonl:1: choices\[1\] is nothing but marks"):
        FILE_TASKS["hellaswag"].read(file)


def test_a_missing_file_says_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no piqa\.jsonl.*--data piqa=PATH"):
        find_data(FILE_TASKS["piqa"], tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_data(FILE_TASKS["piqa"], tmp_path, {"piqa": tmp_path / "no"})
    with pytest.raises(FileNotFoundError, match="pass --data DIR"):
        find_data(FILE_TASKS["piqa"], None)
