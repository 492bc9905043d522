"""Claim: on one GPU TransNormerLLM trains at the speed of the hardware, at every length.

Whole updates of 24 x 1,024 models, about 0.4 B parameters, vocabulary 64,000, in bfloat16, at
32,768 tokens a step in rows of 2,048 to 32,768, and 131,072 tokens in one row:

- tnl: as recipes/tnl_385m.toml trains it, with train.cuda_graph; with a variant's name, other choices, which
  the result lists, so that the rows show what each is worth: "float32" has such weights, "packed" and
  "unpacked" are the same but for the documents;
- llama: our LLaMA of the same size in the same update with the same choices, attention by cuDNN;
- hf_llama, hf_llama_compiled: transformers' LLaMA with SDPA, weights and states in bfloat16;
- released, released_lightning2, with ``--released DIR``: the authors' code (``train_gpu_released``);
- tnl_1b, tnl_7b and a row of 4,194,304 tokens trained in segments.

Every row runs in a process of its own, the most important first; the result is written after each.
With ``--gpus`` each of them takes the next row when it has done one, so that all are busy at once.
Before that, models of two layers compile what the rows need, several at once, so that a row's first
step finds it on the disk. Figures are medians over steps after the first four. Writes
benchmarks/results/train_gpu.json; the last line is JSON. ``plot_train_gpu.py`` draws it.

    python benchmarks/train_gpu.py --budget 530
    python benchmarks/train_gpu.py --rows tnl@2048 llama@2048 --profile
    python benchmarks/train_gpu.py --released DIR --rows released_lightning2@8192 tnl@8192
    python benchmarks/train_gpu.py --device cpu     a dry run at toy sizes: its numbers mean nothing
"""

import argparse
import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness
from op_gpu import rounded
from subjects import error_text
from train_gpu_released import ROWS as RELEASED_ROWS
from train_gpu_released import maker_of as released_maker_of
from train_gpu_subjects import Row, maker_of, measure

from transnormer.models import zoo
from transnormer.models.cost import ModelCost

RESIDUAL, COMPILE = "train.residual=bfloat16", "train.compile=true"
# The optimizer has the rest of the float32 ones.
WEIGHTS = "train.weights=bfloat16"
EIGHT_BITS = "train.float8=tensorwise"
GRAPH, BLOCKS = "train.cuda_graph=true", "train.activation_memory="
# What the recipe says, and the graph, which it leaves to the command line.
FAST = (COMPILE, RESIDUAL, WEIGHTS, GRAPH, BLOCKS + "0.9")
ROOMY = (COMPILE, RESIDUAL, WEIGHTS, GRAPH)
SEVEN = (
    WEIGHTS,
    "optimizer.states=bfloat16",
    "train.checkpointing=full",
    COMPILE,
)
SEGMENTS = (COMPILE, RESIDUAL, WEIGHTS, "train.segment_tokens=32768")


def rows_of_the_run() -> tuple[Row, ...]:
    """All rows, the most important first."""
    tnl = [Row("tnl", seq, settings=FAST) for seq in (2_048, 8_192, 32_768)]
    llama = [Row("llama", seq, settings=FAST) for seq in (2_048, 8_192, 32_768)]
    hugging_face = [Row("hf_llama", seq) for seq in (2_048, 8_192, 32_768)]
    compiled = [Row("hf_llama_compiled", seq) for seq in (2_048, 8_192, 32_768)]

    def variant(name: str, *settings: str) -> Row:
        return Row("tnl", 2_048, variant=name, settings=settings)

    return (
        tnl[0],
        variant("split", *FAST)._replace(split=True),
        variant("roomy", *ROOMY),
        llama[0],
        tnl[2],
        Row("tnl", 131_072, 131_072, settings=(*ROOMY, BLOCKS + "0.6")),
        tnl[1],
        llama[2],
        llama[1],
        hugging_face[0],
        hugging_face[2],
        hugging_face[1],
        variant("compiled", COMPILE),
        variant("residual", COMPILE, RESIDUAL),
        variant("float32", COMPILE, RESIDUAL, GRAPH, BLOCKS + "0.9"),
        variant("float32", COMPILE, RESIDUAL, GRAPH, BLOCKS + "0.9")._replace(subject="llama"),
        variant("graph", COMPILE, GRAPH),
        variant("memory_0.5", *ROOMY, BLOCKS + "0.5"),
        variant("memory_0.4", *ROOMY, BLOCKS + "0.4"),
        variant("memory_0.15", *ROOMY, BLOCKS + "0.15"),
        compiled[0],
        compiled[2],
        Row("tnl", 8_192, 8_192, size="7b", settings=SEVEN),
        Row("tnl", 2_048, size="1b", settings=FAST),
        Row("tnl", 32_768, size="1b", settings=FAST),
        Row("tnl", 131_072, 131_072, size="1b", settings=(*ROOMY, BLOCKS + "0.2")),
        Row("tnl", 1 << 22, 1 << 22, settings=SEGMENTS),
        compiled[1],
        variant("packed", COMPILE, RESIDUAL, WEIGHTS)._replace(packed=True),
        variant("unpacked", COMPILE, RESIDUAL, WEIGHTS),
        variant("selective", *ROOMY, "train.checkpointing=selective"),
        variant("full", *ROOMY, "train.checkpointing=full"),
        variant("eager"),
        Row("tnl", 8_192, size="1b", settings=FAST),
        variant("float8", *FAST, EIGHT_BITS),
        Row("tnl", 8_192, variant="float8", settings=(*FAST, EIGHT_BITS)),
        Row("tnl", 8_192, size="1b", variant="float8", settings=(*FAST, EIGHT_BITS)),
    )


# Tokens a second of a row, at least.
TARGETS = {
    "tnl@2048": 190_000,
    "tnl@8192": 190_000,
    "tnl@32768": 190_000,
    "tnl@131072": 180_000,
    "tnl_1b@2048": 72_000,
    "tnl_1b@8192": 72_000,
    "tnl_1b@32768": 72_000,
    "tnl_1b@131072": 64_000,
    "tnl_7b@8192": 8_000,
}
# The least share of the first row's tokens a second over the second's.
SHARES = {
    ("tnl@2048", "llama@2048"): 1.05,
    ("tnl@8192", "llama@8192"): 1.4,
    ("tnl@32768", "llama@32768"): 2.7,
    **{
        (f"tnl@{seq}", f"{peer}@{seq}"): least
        for peer in ("hf_llama", "hf_llama_compiled")
        for seq, least in ((2_048, 1.85), (8_192, 2.2), (32_768, 3.6))
    },
    ("tnl@2048", "released_lightning2@2048"): 1.55,
    ("tnl@8192", "released_lightning2@8192"): 1.6,
    ("tnl@32768", "released_lightning2@32768"): 1.65,
    ("tnl_memory_0.5@2048", "tnl@2048"): 0.9,
    ("tnl_memory_0.15@2048", "tnl@2048"): 0.8,
    ("tnl_packed@2048", "tnl_unpacked@2048"): 0.95,
    ("tnl@4194304", "tnl@32768"): 0.65,
}
# The most memory of a row, in 10^9 bytes.
MEMORY_GB = {"tnl@2048": 32.0, "tnl_memory_0.5@2048": 20.0, "tnl_memory_0.15@2048": 14.0}
# A first step, from caches of the disk or without, in seconds.
FIRST_STEP_S = 90.0
SHORT = ("benchmark", "verdicts")
_ROW_S, _COMPILE_S = 150.0, 150.0
# Processes that compile at once, for each GPU.
_WORKERS = 10


def verdicts(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The targets of the rows that were measured, each with its value and whether it is met."""
    made: dict[str, Any] = {}

    def judge(name: str, value: float, goal: float, *, most: bool = False) -> None:
        met = value <= goal if most else value >= goal
        made[name] = {"value": value, "at_most" if most else "at_least": goal, "met": met}

    speed = {name: row["tokens_per_second"] for name, row in rows.items() if "step_ms" in row}
    for name, least in TARGETS.items():
        if name in speed:
            judge(f"{name} tokens/s", speed[name], least)
    for (name, other), least in SHARES.items():
        if name in speed and other in speed:
            judge(f"{name} over {other}", speed[name] / speed[other], least)
    for name, most in MEMORY_GB.items():
        if "peak_gb" in rows.get(name, {}):
            judge(f"{name} GB", rows[name]["peak_gb"], most, most=True)
    if "first_step_s" in rows.get("tnl@2048", {}):
        judge("tnl@2048 first step s", rows["tnl@2048"]["first_step_s"], FIRST_STEP_S, most=True)
    return made


def child(row: str, options: argparse.Namespace, gpu: str | None, *extra: str) -> harness.Child:
    """A row in a process of its own, on a GPU or on what is there; it waits to be let go."""
    command = [sys.executable, __file__, "--row", row, "--device", options.device]
    command += ["--steps", str(options.steps), "--profile", str(options.profile), *extra]
    if options.released is not None:
        command += ["--released", str(options.released)]
    # It sees no other GPU than its own.
    return harness.Child(["env", f"CUDA_VISIBLE_DEVICES={gpu}", *command] if gpu else command)


def compile_all(rows: list[Row], options: argparse.Namespace) -> dict[str, float | None]:
    """Fill the compiler's caches, several processes at once; seconds of each first step."""
    wanted: dict[Any, Row] = {}
    for row in rows:
        if any(x.startswith(COMPILE) for x in row.settings) or row.subject.endswith("compiled"):
            settings = tuple(x for x in row.settings if x != GRAPH)
            wanted.setdefault((row._replace(settings=settings, variant="")), row)
    # A whole model that transformers compiles is another graph with other layers.
    names = [row.name for row in wanted.values() if not row.subject.startswith("hf")]
    extra = ("--layers", "2", "--steps", "0", "--profile", "0")
    gpus = options.gpus or [None]
    where = [(name, gpus[i % len(gpus)]) for i, name in enumerate(names)]
    with ThreadPoolExecutor(_WORKERS * len(gpus)) as pool:
        found = pool.map(lambda x: child(x[0], options, x[1], *extra).last_json(_COMPILE_S), where)
    made: dict[str, float | None] = {}
    for name, row in zip(names, found, strict=True):
        print(f"compiled {name}: {row.get('first_step_s', row.get('error'))}", flush=True)
        made[name] = row.get("first_step_s")
    return made


class Lanes:
    """Rows one behind the other on each GPU; the next one's process starts while one is timed."""

    def __init__(self, names: Sequence[str], options: argparse.Namespace, end: float) -> None:
        """Begin nothing behind ``end``, of the monotonic clock."""
        self._waiting, self._options, self._end = deque(names), options, end
        self._lock = threading.Lock()

    def _next(self, gpu: str | None) -> tuple[str, harness.Child] | None:
        with self._lock:
            if not self._waiting or time.monotonic() >= self._end:
                return None
            name = self._waiting.popleft()
        return name, child(name, self._options, gpu)

    def run(self, done: Callable[[str, dict[str, Any]], None]) -> None:
        """Run all rows; ``done`` is called with each, one at a time."""

        def lane(gpu: str | None) -> None:
            now = self._next(gpu)
            while now is not None:
                name, process = now
                left = self._end - time.monotonic()
                if left <= 0:
                    process.stop()
                    found: dict[str, Any] = {"left_out": "the seconds were spent"}
                    now = None
                else:
                    now = self._next(gpu)
                    found = process.last_json(min(_ROW_S, left + 20))
                with self._lock:
                    done(name, found if gpu is None else found | {"gpu": gpu})

        with ThreadPoolExecutor(len(self._options.gpus or [None])) as pool:
            for ended in [pool.submit(lane, gpu) for gpu in self._options.gpus or [None]]:
                ended.result()
        for name in self._waiting:
            done(name, {"left_out": "the seconds were spent"})


def facts_of(row: Row) -> dict[str, Any]:
    """What a row of the result says of what was timed."""
    return {"settings": list(row.settings), "seq": row.seq, "tokens": row.tokens}


def show(name: str, row: dict[str, Any]) -> None:
    """Print a row, and its kernels under it."""
    short = {key: value for key, value in row.items() if key != "kernels"}
    print(f"{name}: {json.dumps(rounded(short))}", flush=True)
    for kernel in row.get("kernels", ()):
        print(f"    {kernel['ms']:8.3f} ms {kernel['count']:5d} x {kernel['name']}")


def one_row(row: Row, options: argparse.Namespace) -> None:
    """What a child does, once it is let go: the row as a line of JSON."""
    if not sys.stdin.readline():
        # Whoever started it is gone.
        return
    try:
        found = measure(
            row,
            released_maker_of(options.released) if row.subject == "released" else maker_of(row),
            steps=options.steps,
            kernels=options.profile,
            dry=options.device == "cpu",
            layers=options.layers,
        )
    except Exception as error:
        found = {"error": error_text(error)}
    print(json.dumps(harness.finite(found)))


def main() -> None:
    rows = {row.name: row for row in (*rows_of_the_run(), *RELEASED_ROWS)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=rows, metavar="ROW")
    parser.add_argument("--released", type=Path, metavar="DIR", help="the released code's folder")
    parser.add_argument("--steps", type=int, default=10, help="timed, after four")
    parser.add_argument("--profile", type=int, nargs="?", const=25, default=0, metavar="KERNELS")
    parser.add_argument("--budget", type=float, default=1e9, help="start no row after so many s")
    parser.add_argument("--add", type=Path, help="an earlier result whose other rows are kept")
    parser.add_argument("--gpus", nargs="+", metavar="N", help="to share the rows out to")
    parser.add_argument("--no-prepare", action="store_true", help="compile in the rows alone")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--commit", help="for a copy of the tree that has no history")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "train_gpu.json")
    parser.add_argument("--row", choices=rows, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    theirs = {row.name for row in RELEASED_ROWS}
    if options.rows is None:
        options.rows = [name for name in rows if options.released or name not in theirs]
    if not options.released and theirs.intersection([options.row, *options.rows]):
        parser.error("rows of the released code need --released DIR")
    if options.row is not None:
        one_row(rows[options.row], options)
        return
    began = time.monotonic()
    parameters = {
        name: ModelCost.of(zoo.get(f"tnl-{name}")).parameters for name in ("385m", "1b", "7b")
    }
    result: dict[str, Any] = {
        "benchmark": "train_gpu",
        "environment": harness.gpu_environment(options.commit),
        "parameters": parameters,
        "rows": {},
        "verdicts": {},
    }
    if options.add is not None:
        result["rows"] = harness.rows_of_an_earlier(
            options.add, {name: facts_of(row) for name, row in rows.items()}
        )
    if options.device == "cpu":
        result["dry_run"] = "numbers mean nothing"
    elif not options.no_prepare:
        wanted = [rows[name] for name in options.rows]
        result["first_step_of_two_layers_s"] = compile_all(wanted, options)
    chosen = list(options.rows)

    def done(name: str, row: dict[str, Any]) -> None:
        if "left_out" in row and name in result["rows"]:
            # The earlier one stays.
            return
        facts = facts_of(rows[name])
        result["rows"][name] = row | facts
        # In one order, whichever ended first.
        result["rows"] = {x: result["rows"][x] for x in rows if x in result["rows"]}
        show(name, row | facts)
        result["verdicts"] = verdicts(result["rows"])
        harness.publish(result, options.output, ("benchmark",))

    Lanes(chosen, options, began + options.budget).run(done)
    result["failures"] = [name for name, row in result["rows"].items() if "error" in row]
    for name, verdict in result["verdicts"].items():
        print(f"{name}: {json.dumps(rounded(verdict))}")
    harness.publish(result, options.output, (*SHORT, "failures"))


if __name__ == "__main__":
    main()
