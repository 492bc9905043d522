"""What ``decode_gpu`` measures of this package: checks, decoding, prefill, the first token."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Clock
from subjects import error_text, is_lost
from torch import Tensor, nn

from transnormer.data.tokenizers.byte import ByteTokenizer
from transnormer.infer import fused
from transnormer.infer.engine import Engine
from transnormer.infer.engine_config import EngineConfig
from transnormer.infer.pool import FixedPool, make_pool
from transnormer.infer.quantize import quantize
from transnormer.infer.reading import read
from transnormer.infer.sampling import SamplingConfig
from transnormer.models import checkpoint, zoo
from transnormer.models.cost import ModelCost
from transnormer.models.decoder import Decoder, DecoderConfig

# Options of the engine by mode.
MODES: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "ring": {"fused": True, "ring": 16},
    "library": {"fused": True},
    "graph": {},
    "compiled": {"compile": True},
    "int8": {"fused": True},
    "int4": {"fused": True},
}
BITS = {"int8": 8, "int4": 4}
# Traffic of a state in a step, in its own sizes.
STATE_TRAFFIC = {"ring": 1.2}
VOCAB, PIECE, READ, WARMUP = 64_000, 8_192, 1_024, 8
CHECK_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.03}
# Of int8 and int4, whose plain products in bfloat16 round weights or sums once more.
BITS_LIMIT = 0.05
# Seconds that a command may take.
PATIENCE = 120
# Blocks of steps at each context, which take turns.
TURNS = 8
_ROWS = fused.ROWS


def config_of(name: str, toy: bool) -> DecoderConfig:
    """A published size, or the same kind of model in toy size."""
    if not toy:
        return zoo.get(name, vocab_size=VOCAB)
    return zoo.tnl_custom(vocab_size=512, model_dim=64, num_layers=2, heads=2, glu_dim=96)


def build(config: DecoderConfig, device: str) -> Decoder:
    """The model in bfloat16, made where it runs."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Decoder(config).to(torch.bfloat16)
    model = model.to_empty(device=device).eval()
    model.reset_parameters()
    return model


def random_ids(config: DecoderConfig, count: int) -> Tensor:
    """Ids from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (count,), generator=generator)


def check_one(
    dtype: torch.dtype, rows: int, ring: int | None, clock: Clock, bits: int | None = None
) -> float:
    """Largest relative error of fused logits over ten steps beside the plain ones."""
    config = zoo.tnl_custom(vocab_size=512, model_dim=1024, num_layers=4, heads=8, glu_dim=2816)
    if clock.dry:
        config = config_of("", toy=True)
    torch.manual_seed(0)
    model = Decoder(config.model_copy(update={"init_std": 0.04})).to(clock.device, dtype).eval()
    if bits is not None:
        quantize(model, 8 if bits == 8 else 4, group_size=32 if clock.dry else 128)
    # Without a GPU only the interpreter runs kernels: the plain step is compared with itself.
    pools = [make_pool(model, rows, fused=x and not clock.dry, ring=ring) for x in (False, True)]
    worst = 0.0
    for _ in range(10):
        ids = torch.randint(config.vocab_size, (rows, 1))
        plain, made = (pool.decode(ids, range(rows), rows).double() for pool in pools)
        worst = max(worst, float((made - plain).norm() / plain.norm()))
    return worst


def check(clock: Clock, modes: Sequence[str]) -> dict[str, Any]:
    """Errors of fused steps; sets ``fused.OVERLAP`` to what is right, and says whether one is.

    A case that cannot run has its error in the place of a number and counts as wrong. Quantised
    weights are looked at last and decide nothing for other rows: their plain products round in
    places of their own.
    """
    cases: list[tuple[torch.dtype, int, int | None]] = [
        (dtype, rows, ring)
        for dtype in CHECK_LIMITS
        for rows, ring in ((1, None), (3, None), (3, 16), (32, None), (100, None), (100, 16))
        if rows <= 3 or not clock.dry
    ]
    found: dict[str, Any] = {}
    for overlap in (True, False):
        fused.OVERLAP = overlap
        errors = {
            f"{str(dtype).removeprefix('torch.')} rows {rows} ring {ring}": _case(
                dtype, rows, ring, clock
            )
            for dtype, rows, ring in cases
        }
        found["overlapping" if overlap else "apart"] = errors
        limits = [CHECK_LIMITS[dtype] for dtype, _, _ in cases]
        pairs = zip(errors.values(), limits, strict=True)
        right = all(isinstance(error, float) and error <= limit for error, limit in pairs)
        if right:
            break
    bits = {
        mode: _case(torch.bfloat16, 1, None, clock, BITS[mode]) for mode in BITS if mode in modes
    }
    fine = {mode: isinstance(x, float) and x <= BITS_LIMIT for mode, x in bits.items()}
    return {"right": right, "overlap": fused.OVERLAP, **found, "bits": bits, "bits_right": fine}


def _case(
    dtype: torch.dtype, rows: int, ring: int | None, clock: Clock, bits: int | None = None
) -> float | str:
    """``check_one``, or the error that it ended with."""
    try:
        return check_one(dtype, rows, ring, clock, bits)
    except Exception as error:
        if is_lost(error):
            raise
        return error_text(error)


def _engine_of(model: Decoder, batch: int, steps: int, mode: dict[str, Any]) -> Engine:
    """An engine whose rows all go on from one state."""
    toy = model.config.vocab_size < VOCAB
    _, state = read(model, random_ids(model.config, 16 if toy else READ)[None].split(PIECE, 1))
    # Prompts one by one: together their states would be in memory three times.
    config = EngineConfig(slots=batch, prefill_tokens=batch, batch_invariant=True, **mode)
    engine = Engine(model, config)
    greedy = SamplingConfig(temperature=0.0)
    for row in range(batch):
        prompt = [1 + row % 100]
        engine.submit(prompt, max_new_tokens=steps, sampling=greedy, stop=[], state=state)
    return engine


def decode(
    model: Decoder,
    contexts: Sequence[int],
    batch: int,
    steps: int,
    clock: Clock,
    mode: dict[str, Any],
) -> list[dict[str, Any]]:
    """Tokens a second of an engine with ``batch`` greedy rows, at each context.

    The state is the same at every context but for its position, so one engine serves all of them:
    blocks of steps at one context and at the others take turns, and ``beside`` are the quotients of
    the times of the blocks of a turn, which are what a context costs whatever the clock does.
    """
    turns = min(TURNS, steps)
    block, dry = steps // turns, clock.dry
    engine = _engine_of(model, batch, WARMUP + 2 + len(contexts) * turns * block, mode)
    _, first = clock.first(engine.step)
    for _ in range(WARMUP):
        engine.step()
    pool = engine.pool
    assert isinstance(pool, FixedPool)

    def seconds(context: int, call: Callable[[], object], calls: int) -> float:
        pool.positions.fill_(context)
        clock.wait()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        clock.wait()
        return (time.perf_counter() - began) / calls

    took = [[seconds(context, engine.step, block) for context in contexts] for _ in range(turns)]
    assert engine.running == batch
    rows: list[dict[str, Any]] = []
    replays = [
        [seconds(c, lambda: pool.step.again(batch, 1), 10) for c in contexts]
        for _ in range(0 if dry else TURNS)
    ]
    for i, context in enumerate(contexts):
        mean = statistics.mean(turn[i] for turn in took)
        row: dict[str, Any] = {
            "context": context,
            "tokens_per_second": batch / mean,
            "ms_per_step": 1e3 * mean,
            "first_step_s": first,
            "pool_bytes": pool.nbytes,
        }
        if replays:
            row["device_ms_per_step"] = 1e3 * statistics.median(turn[i] for turn in replays)
        if i:
            row["beside"] = quotients([(turn[0], turn[i]) for turn in took])
            if replays:
                row["beside_on_device"] = quotients([(turn[0], turn[i]) for turn in replays])
        rows.append(row)
    return rows


def quotients(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The median of second / first - 1, and the least and the largest of them."""
    found = sorted(second / first - 1.0 for first, second in pairs)
    return {"median": statistics.median(found), "least": found[0], "most": found[-1]}


def weight_bytes(cost: ModelCost, model: Decoder, mode: str) -> float:
    """Bytes of weights that a step reads."""
    if mode not in BITS:
        return cost.weight_bytes
    parts = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    whole = sum(m.in_features * m.out_features for m in parts)
    return cost.weight_bytes - whole * (2.0 - BITS[mode] / 8)


def decode_rows(
    model: Decoder,
    mode: str,
    contexts: Sequence[int],
    batch: int,
    steps: int,
    gb_per_s: float,
    clock: Clock,
) -> list[dict[str, Any]]:
    """A row for each context, with the share of the bandwidth's limit."""
    cost = ModelCost.of(model.config)
    traffic = batch * STATE_TRAFFIC.get(mode, 2.0) * cost.constant_state_bytes
    limit = batch * gb_per_s * 1e9 / (weight_bytes(cost, model, mode) + traffic)
    settings = MODES[mode] if not clock.dry else {"ring": MODES[mode].get("ring")}
    # No rows: the products of all are left to the model's modules.
    fused.ROWS = 0 if mode == "library" else _ROWS
    made = []
    for row in decode(model, contexts, batch, steps, clock, settings):
        share = {"limit": limit, "share_of_limit": row["tokens_per_second"] / limit}
        made.append({"batch": batch, "mode": mode, **row, **share})
    return made


def prefill_rows(model: Decoder, clock: Clock) -> dict[str, float]:
    """Tokens a second of one prompt of PIECE tokens and of ragged prompts of as many."""
    tokens = PIECE if not clock.dry else 128
    ids = random_ids(model.config, tokens)
    pool = make_pool(model, 16)
    # Sixteen lengths from an eighth of the mean upwards, which add up to the tokens.
    weights = torch.linspace(0.125, 1.875, 16)
    ends = (weights.cumsum(0) / weights.sum() * tokens).round().long().tolist()
    pieces = [ids[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    def median(call: Callable[[], object]) -> float:
        return tokens / (clock.time(call).ms / 1e3)

    return {
        "tokens": tokens,
        "dense_tokens_per_second": median(lambda: pool.prefill([ids], [0])),
        "ragged_tokens_per_second": median(lambda: pool.prefill(pieces, list(range(16)))),
    }


def first_token(model: Decoder, device: str) -> dict[str, float]:
    """Seconds of ``transnormer generate`` from its start to its end after one token, as a process.

    ``cold`` has no compiled kernels; ``warm`` follows it.
    """
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(model, Path(folder) / "model")
        ByteTokenizer().save(Path(folder) / "model")
        command = ["env", f"TRITON_CACHE_DIR={folder}/kernels", sys.executable, "-m", "transnormer"]
        command += [
            "generate",
            f"{folder}/model",
            "--prompt",
            "The",
            "--max-new-tokens",
            "1",
            "--device",
            device,
        ]
        found = {}
        for name in ("cold", "warm"):
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
            found[name] = time.perf_counter() - began
            if done.returncode:
                raise RuntimeError(f"generate ended with {done.returncode}: {done.stderr[-300:]}")
    return found
