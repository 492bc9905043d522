"""Small files of every task, in the fields of the local copies, and what the harness has of them."""

import json
import lzma
from pathlib import Path
from typing import Any

from decoder_cases import make_model, tnl_config

from transnormer.data import ByteTokenizer
from transnormer.models.decoder import Decoder

# task -> (name of the file, its records)
LOCAL: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "boolq": (
        "boolq.jsonl",
        [
            {
                "query": f"Passage: Fact {i} is about water.\nQuestion: is fact {i} about ice?",
                "choices": ["no", "yes"],
                "gold": i % 2,
            }
            for i in range(4)
        ],
    ),
    "piqa": (
        "piqa.jsonl",
        [
            {
                "query": f"Question: How do I open jar {i}?\n",
                "choices": ["turn the lid", "break the glass of the jar"],
                "gold": i % 2,
            }
            for i in range(4)
        ],
    ),
    "siqa": (
        "siqa.jsonl",
        [
            {
                "query": f"Context: Ann met {i} friends.\nQuestion: How did Ann feel?\n"
                "Choices:\nA. glad\nB. too tired to talk\nAnswer:",
                "choices": ["A", "B"],
                "gold": i % 2,
            }
            for i in range(4)
        ],
    ),
    "hellaswag": (
        "hellaswag_val.jsonl",
        [
            {
                "query": f"Playing pool: A woman makes shot {i}. the woman",
                "choices": ["sits.", "takes [step] another shot.", "eats  a pie.", "leaves."],
                "gold": i,
            }
            for i in range(4)
        ],
    ),
    "winogrande": (
        "winogrande_xl_val.jsonl",
        [
            {
                "context_options": [
                    f"Tea {i} beat soup as the tea",
                    f"Tea {i} beat soup as the soup",
                ],
                "continuation": "was hot.",
                "gold": i % 2,
            }
            for i in range(4)
        ],
    ),
    "wsc273": (
        "winograd_wsc273.jsonl",
        [
            {
                "context_options": [
                    "The cup fell because the cup",
                    "The cup fell because the table",
                ],
                "continuation": text,
                "gold": gold,
            }
            for text, gold in (("was wet.", 0), ("was steep.", 1), (".", 0))
        ],
    ),
    "arc_easy": (
        "arc_easy.jsonl",
        [
            {
                "query": f"Question: What is {i} and one?",
                "choices": [str(i), str(i + 1), "a hundred", "none"],
                "gold": 1,
            }
            for i in range(4)
        ],
    ),
    "arc_challenge": (
        "arc_challenge.jsonl",
        [
            {
                "query": f"Question: Why is rock {i} hard?",
                "choices": ["heat", "pressure over time", "rain", "wind"],
                "gold": i,
            }
            for i in range(4)
        ],
    ),
    "openbookqa": (
        "openbookqa.jsonl",
        [
            {
                "query": f"Predator {i} eats",
                "choices": ["lions", "bunnies", "grass", "stones"],
                "gold": 1,
            }
            for i in range(4)
        ],
    ),
    "copa": (
        "copa.jsonl",
        [
            {
                "query": f"The {thing} fell, {word}",
                "choices": ["it broke.", "nobody held it."],
                "gold": gold,
            }
            for thing, word, gold in (
                ("cup", "because", 1),
                ("jar", "therefore", 0),
                ("ball", "because", 1),
            )
        ],
    ),
    "commonsense_qa": (
        "commonsense_qa.jsonl",
        [
            {
                "query": f"Question: Where is shop {i}?\nChoices:\nA. bank\nB. mall\nC. sea\nD. sky\nAnswer:",
                "choices": ["A", "B", "C", "D"],
                "gold": i,
            }
            for i in range(4)
        ],
    ),
    "lambada_openai": (
        "lambada_openai.jsonl",
        [
            {"context": f"She had {i} signs. He asked her to read the", "continuation": "signs"}
            for i in range(4)
        ],
    ),
    "cmmlu": (
        "cmmlu.jsonl",
        [
            {
                "subject": subject,
                "split": split,
                "question": f" {subject} 第{i}题 ",
                "choices": ["胸", "腹", "大腿", "小腿"],
                "gold": i,
            }
            for subject in ("agronomy", "anatomy")
            for split, count in (("dev", 3), ("test", 2))
            for i in range(count)
        ],
    ),
}
WIKITEXT = (
    " \n = Robert = \n \n Robert is an English actor , born in 1 @,@ 960 . He had a role ( once ) . \n"
    ' \n = = Career = = \n \n In 2000 he was in a play \'s " first " night . \n'
    " = The Bill = \n \n The Bill is a series ; it ran for years . \n"
)


def write_tasks(directory: Path) -> Path:
    """Write a file for each task, some of them compressed."""
    directory.mkdir(exist_ok=True)
    for index, (name, records) in enumerate(LOCAL.values()):
        text = "".join(json.dumps(record) + "\n" for record in records)
        if index % 2:
            with lzma.open(directory / f"{name}.xz", "wt", encoding="utf-8") as stream:
                stream.write(text)
        else:
            (directory / name).write_text(text, encoding="utf-8")
    (directory / "wikitext2_test.raw.txt").write_text(WIKITEXT, encoding="utf-8")
    return directory


def byte_model() -> tuple[Decoder, ByteTokenizer]:
    """A small model over bytes, its weights drawn at random."""
    tokenizer = ByteTokenizer()
    config = tnl_config(vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id)
    return make_model(config), tokenizer
