"""What the ranks of the tests of parallel/ compute; importable, since other processes run it."""

import copy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tolerances import LAYOUT_FLOAT64, assert_close
from torch import Tensor
from torch.distributed.tensor import DTensor
from train_cases import Notes, constant_evaluation

from transnormer.eval.perplexity import score_tokens
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.models.recompute import Checkpointing, set_checkpointing
from transnormer.nn.core import LinearAttentionCore
from transnormer.optim import OptimizerConfig, build_optimizer, clip_factor, is_matrix
from transnormer.parallel.layout import Layout
from transnormer.parallel.mesh import Axes
from transnormer.parallel.sequence import apply_sequence_parallel
from transnormer.parallel.sequence_cores import SequenceLinearCore
from transnormer.parallel.sequence_part import SequenceAxis, cut
from transnormer.parallel.state_exchange import Chain
from transnormer.train import OneProcess, RunConfig, run_training


class Case(NamedTuple):
    """One call of a core over a whole row, and how it is cut.

    Attributes:
        lengths: tokens of each rank.
        decay: "none", "constant", "gate" (a number a head and token) or "key_gate".
        bounds: of packed sequences; None is a batch of two rows.
        exchange, overlap, prune, causal: as the core's.
        pads: hide every third token.
        state: start from a state.
        dtype: of q, k and v.
        forgets: gates that are -inf here and there, constants from 0 to very fast.
    """

    lengths: tuple[int, ...]
    decay: str = "constant"
    bounds: tuple[int, ...] | None = None
    exchange: str = "gather"
    overlap: bool = False
    prune: bool = True
    causal: bool = True
    pads: bool = False
    state: bool = False
    dtype: torch.dtype = torch.float64
    forgets: bool = True


KEY_DIM, VALUE_DIM = 4, 6
CONSTANTS = (0.0, -0.02, -3.0, -60.0)


def inputs_of(case: Case) -> dict[str, Tensor | None]:
    """The tensors of a case, whole, in float64 where gradients are compared."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    seq, kv_heads = sum(case.lengths), len(CONSTANTS)
    batch = 2 if case.bounds is None else 1
    rows = batch if case.bounds is None else len(case.bounds) - 1
    gate = None
    if case.decay == "constant":
        gate = torch.tensor(CONSTANTS, dtype=torch.float64)
    elif case.decay != "none":
        shape = (batch, seq, kv_heads) + ((KEY_DIM,) if case.decay == "key_gate" else ())
        gate = -normal(*shape).abs() * 0.3
        if case.forgets:
            gate[:, ::7] = -torch.inf
    return {
        "q": normal(batch, seq, 2 * kv_heads, KEY_DIM).to(case.dtype),
        "k": normal(batch, seq, kv_heads, KEY_DIM).to(case.dtype),
        "v": normal(batch, seq, kv_heads, VALUE_DIM).to(case.dtype),
        "log_decay": gate,
        "state": normal(rows, kv_heads, KEY_DIM, VALUE_DIM) if case.state else None,
        "grad": normal(batch, seq, 2 * kv_heads, VALUE_DIM).to(case.dtype),
        "grad_state": normal(rows, kv_heads, KEY_DIM, VALUE_DIM),
        "mask": (torch.arange(seq) % 3 > 0).expand(batch, -1) if case.pads else None,
        "bounds": None if case.bounds is None else torch.tensor(case.bounds, dtype=torch.int32),
    }


def whole(case: Case) -> dict[str, Tensor]:
    """Outputs and gradients of one process, by ``LinearAttentionCore``."""
    given = inputs_of(case)
    leaves = {name: given[name] for name in ("q", "k", "v", "log_decay", "state")}
    leaves = {n: x.detach().requires_grad_() for n, x in leaves.items() if x is not None}
    core = LinearAttentionCore(causal=case.causal)
    o, state = core(
        *(leaves[name] for name in ("q", "k", "v")),
        leaves.get("log_decay"),
        state=leaves.get("state"),
        cu_seqlens=given["bounds"],
        mask=given["mask"],
    )
    loss = (o * given["grad"]).sum()
    if case.causal:
        loss = loss + (state * given["grad_state"]).sum()
    loss.backward()
    return {"o": o.detach()} | {f"d{n}": x.grad for n, x in leaves.items() if x.grad is not None}


def in_parts(group: dist.ProcessGroup, case: Case) -> dict[str, Tensor]:
    """The same of one rank's part, by ``SequenceLinearCore``; sums over ranks are left to the test."""
    given = inputs_of(case)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    bounds, seq = given["bounds"], sum(case.lengths)
    axis = SequenceAxis(
        Chain(group, rank, size, case.exchange), overlap=case.overlap, prune=case.prune
    )
    part, local = cut(seq, rank, case.lengths, cu_seqlens=bounds, mask=given["mask"])
    axis.part = part
    own = slice(part.start, part.end)
    rows = list(range(given["q"].shape[0]))
    ends = [seq] * len(rows)
    if bounds is not None:
        pairs = list(zip(case.bounds, case.bounds[1:]))
        rows = [i for i, (a, b) in enumerate(pairs) if max(a, part.start) < min(b, part.end)]
        ends = [pairs[i][1] for i in rows]
    leaves: dict[str, Tensor] = {}
    for name in ("q", "k", "v", "log_decay"):
        x = given[name]
        if x is not None:
            leaves[name] = (x if x.dim() == 1 else x[:, own]).detach().clone().requires_grad_()
    if given["state"] is not None:
        leaves["state"] = given["state"].clone().requires_grad_()
    if case.decay == "constant" and case.prune:
        leaves["log_decay"].requires_grad_(False)
    core = SequenceLinearCore(LinearAttentionCore(causal=case.causal), axis)
    o, state = core(
        *(leaves[name] for name in ("q", "k", "v")),
        leaves.get("log_decay"),
        state=leaves["state"][rows] if "state" in leaves else None,
        cu_seqlens=local,
        mask=None if given["mask"] is None else given["mask"][:, own],
    )
    loss = (o * given["grad"][:, own]).sum()
    if case.causal:
        done = [i for i, end in enumerate(ends) if end <= part.end]
        loss = loss + (state[done] * given["grad_state"][[rows[i] for i in done]]).sum()
    loss.backward()
    result = {"o": o.detach()}
    return result | {f"d{n}": x.grad for n, x in leaves.items() if x.grad is not None}


def joined(case: Case, results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The results of all ranks as those of one: joined along seq, or summed."""
    together = {}
    for name in results[0]:
        parts = [result[name] for result in results]
        summed = name == "dstate" or (name == "dlog_decay" and parts[0].dim() == 1)
        together[name] = torch.stack(parts).sum(0) if summed else torch.cat(parts, 1)
    return together


def model_in_parts(
    group: dist.ProcessGroup,
    model: Decoder,
    batch: dict[str, Tensor | None],
    lengths: tuple[int, ...] | None,
    options: dict[str, Any],
    checkpointing: Checkpointing = "none",
) -> dict[str, Tensor]:
    """Loss of a model whose sequences are cut among the ranks, and its gradients summed over them."""
    model = copy.deepcopy(model)
    set_checkpointing(model, checkpointing)
    model = apply_sequence_parallel(model, group, **options)
    loss = model.loss(**batch, reduction="sum", lengths=lengths)
    loss.backward()
    result = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(grad, group=group)
        result[name] = grad
    return result


def model_whole(model: Decoder, batch: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The same of one process."""
    model = copy.deepcopy(model)
    loss = model.loss(**batch, reduction="sum")
    loss.backward()
    grads = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }
    return {"loss": loss.detach()} | grads


def earlier_hidden(
    group: dist.ProcessGroup, model: Decoder, lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Hidden states before the last rank's first token, with two different tokens there."""
    model = apply_sequence_parallel(copy.deepcopy(model), group)
    found = []
    for token in (1, 2):
        ids = torch.arange(sum(lengths))[None] % model.config.vocab_size
        ids[:, sum(lengths[:-1])] = token
        local = model.cut(ids, lengths=lengths)
        x, _ = Decoder.hidden(model, local.input_ids, positions=local.positions, keep_state=False)
        found.append(x[:, :0] if dist.get_rank(group) == len(lengths) - 1 else x)
    return found[0], found[1]


def train(
    group: dist.ProcessGroup | None,
    config: DecoderConfig,
    axes: Axes,
    start: dict[str, Any] | None,
    steps: range,
    optimizer_config: OptimizerConfig,
    parts: int = 1,
    device: str = "cpu",
    cut_residual: bool = False,
) -> dict[str, Any]:
    """Train on the batches of ``steps`` in a layout; what one process would see, from rank 0.

    Args:
        group: all processes; None is one process alone, without a layout.
        start: the whole tensors of an earlier call to go on from, of whatever layout.
        parts: micro-batches of a step.
        device: "cuda" is the current GPU.
        cut_residual: of the layout.
    """
    torch.manual_seed(3)
    here = torch.empty(0, device=device).device
    sync = OneProcess() if group is None else Layout(axes, here, cut_residual=cut_residual)
    model = sync.wrap(Decoder(config).double().to(here))
    optimizer = build_optimizer(model, optimizer_config, matrices=sync.matrices())
    if start is not None:
        sync.load(model, optimizer, start["model"], start["optimizer"])
    losses, norms = [], []
    for step in steps:
        batches = [
            [x[sync.rank :: sync.world_size] for x in (ids, labels)]
            for ids, labels in zip(*(x.chunk(parts) for x in train_batch(step, config.vocab_size)))
        ]
        count = sync.total(torch.tensor([sum((y >= 0).sum().item() for _, y in batches)]).double())
        nats = torch.zeros(1, dtype=torch.float64, device=here)
        for ids, labels in batches:
            loss = model.loss(ids.to(here), labels.to(here), reduction="sum")
            (loss / count.item()).backward()
            nats += loss.detach()
        sync.after_backward(model)
        norms.append(sync.total_norm(model).detach())
        losses.append((sync.total(nats) / count.item())[0])
        optimizer.set_lr(optimizer_config.lr)
        optimizer.step(clip_factor(optimizer_config.clip, norms[-1]))
        optimizer.zero_grad()
    whole = sync.whole(model, optimizer)
    return {
        "loss": torch.stack(losses).cpu(),
        "norm": torch.stack(norms).cpu(),
        "model": {} if whole is None else dict(whole[0].state_dict()),
        "optimizer": {} if whole is None else dict(whole[1]),
        "local": sum(x.numel() for x in local_parts(model)),
    }


def name_of(value: Axes | str) -> str:
    """What a test calls a layout, or something that has a name."""
    if isinstance(value, str):
        return value
    return "-".join(f"{axis}{ranks}" for axis, ranks in value._asdict().items() if ranks > 1)


def matrices_worked_on(group: dist.ProcessGroup, config: DecoderConfig, axes: Axes) -> list[int]:
    """Entries of the matrices that this rank is given, which are those of one process."""
    layout = Layout(axes, torch.device("cpu"))
    model = Decoder(config)
    exact = [x.detach().clone() for name, x in model.named_parameters() if is_matrix(name, x)]
    model = layout.wrap(model)
    sizes: list[int] = []

    def note(matrix: Tensor) -> Tensor:
        sizes.append(matrix.numel())
        assert any(x.shape == matrix.shape and torch.equal(x, matrix) for x in exact)
        return matrix

    named = {n: x.detach().clone() for n, x in model.named_parameters() if is_matrix(n, x)}
    of_blocks = {name: x for name, x in named.items() if "blocks." in name}
    before = {name: x.full_tensor().clone() for name, x in of_blocks.items()}
    layout.matrices().apply(of_blocks, note)
    assert all(torch.equal(x.full_tensor(), before[name]) for name, x in of_blocks.items())
    return sizes


def local_parts(model: torch.nn.Module) -> list[Tensor]:
    """What of the parameters this rank holds."""
    return [p.to_local() if isinstance(p, DTensor) else p.data for p in model.parameters()]


def assert_same_training(found: dict[str, Any], exact: dict[str, Any]) -> None:
    """Fail unless two answers of ``train`` agree: loss, norm, weights and optimizer states."""
    for name in ("loss", "norm"):
        assert_close(found[name], exact[name], limit=LAYOUT_FLOAT64, name=name)
    for group in ("model", "optimizer"):
        assert list(found[group]) == list(exact[group])
        for name, expected in exact[group].items():
            assert_close(found[group][name], expected, limit=LAYOUT_FLOAT64, name=f"{group} {name}")


def train_batch(step: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Eight rows of a step; rows have different numbers of labels, one none at all."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(vocab_size, (8, 22), generator=generator)
    labels = torch.randint(vocab_size, (8, 22), generator=generator)
    for row in range(8):
        labels[row, : 3 * row + (22 if row == 5 else 0)] = -100
    return ids, labels


def run_in_layout(
    group: dist.ProcessGroup, config: RunConfig, axes: Axes, resume: bool
) -> tuple[int, bool]:
    """A whole run in a layout; the steps done, and whether this rank wrote anything."""
    half = config.train.precision == "bfloat16"
    layout = Layout(
        axes,
        torch.device("cpu"),
        gather_dtype=torch.bfloat16 if half else None,
        keeps_rest=config.splits_weights,
    )
    notes = Notes()
    result = run_training(
        config, resume=resume, evaluate=constant_evaluation, progress=notes, sync=layout
    )
    return result.step, bool(notes.messages)


def logits_on_ranks(group: dist.ProcessGroup, model: Decoder, ids: Tensor) -> Tensor:
    """Logits of a model whose heads lie on all ranks."""
    layout = Layout(Axes(tp=dist.get_world_size(group)), torch.device("cpu"))
    with torch.no_grad():
        return layout.wrap(copy.deepcopy(model))(ids).logits


def scored_on_ranks(group: dist.ProcessGroup, model: Decoder, ids: list[int]) -> float:
    """Nats of a document by a model whose parameters are shared among all ranks."""
    layout = Layout(Axes(dp_shard=dist.get_world_size(group)), torch.device("cpu"))
    return score_tokens(layout.wrap(model), [ids], first_id=0)[0].nats
