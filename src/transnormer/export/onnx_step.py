"""One decoding step as an ONNX graph: token and state in, logits and state out.

A model whose states have a constant size needs no more than this graph to read and to write text of
any length: a prompt is read token by token, and nothing is kept beside the state.
"""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from transnormer import files
from transnormer.models.cost import bytes_per_token
from transnormer.models.decoder import Decoder
from transnormer.models.directories import replaced
from transnormer.models.state import DecoderState
from transnormer.nn.state import from_named_tensors, named_tensors, tensors_of
from transnormer.nn.token_mixers import EosConfig

if TYPE_CHECKING:
    from transnormer.data.tokenizers import Tokenizer

GRAPH, STATE, ABOUT = "model.onnx", "state.npz", "config.json"
MODEL_TYPE = "transnormer_onnx_step"
FORMAT, OPSET = 1, 20
# An example batch unlike any other size of a model, so that no dim of it is taken for the batch.
_EXAMPLE_ROWS = 7
# A protobuf message ends at 2 GiB; from here on weights lie in a file of their own.
_LARGEST_MESSAGE = 1_900_000_000


class Step(nn.Module):
    """A decoder's step over tensors alone, as a graph needs it.

    Args:
        model: a causal decoder.
    """

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model
        self._empty = model.empty_state(1, device="cpu")

    def empty(self) -> dict[str, Tensor]:
        """The state before the first token, one row, by the names of the graph's inputs."""
        return {
            name: x
            for i, layer in enumerate(self._empty.layers)
            for name, x in named_tensors(f"state.{i}", layer).items()
        }

    def forward(self, token: Tensor, position: Tensor, state: dict[str, Tensor]) -> Any:
        """Read a token a row.

        Args:
            token: int64 [batch].
            position: of the token, int64 [batch].
            state: as ``empty``, with batch rows.

        Returns:
            logits [batch, vocab_size], the next position, and the state after the token.
        """
        layers = tuple(
            from_named_tensors(f"state.{i}", state, like)
            for i, like in enumerate(self._empty.layers)
        )
        before = DecoderState(layers, position)
        logits, after = self.model(token[:, None], state=before)
        assert after is not None
        return logits[:, 0], after.positions, *(x for y in after.layers for x in tensors_of(y))


def check_exportable(model: Decoder) -> None:
    """Raise NotImplementedError, with the block's name, for what has no step of constant size."""
    if not model.config.causal:
        raise NotImplementedError(
            "causal is False; expected True: a bidirectional model has no state, so no step"
        )
    for i, layer in enumerate(model.empty_state(0, device="meta").layers):
        kind = model.config.blocks[i].token_mixer.kind
        if bytes_per_token(layer):
            raise NotImplementedError(
                f"blocks[{i}].token_mixer.kind is {kind!r}, whose state grows with the tokens; "
                "expected a state of constant size in every block; export with --to hf"
            )
        mixer = model.config.blocks[i].token_mixer
        if isinstance(mixer, EosConfig) and mixer.oscillation == "phase":
            raise NotImplementedError(
                f"blocks[{i}].token_mixer.oscillation is 'phase', which is complex; expected a real "
                "one, since ONNX's operators take no complex numbers; export with --to hf"
            )


def write_onnx(model: Decoder, path: str | Path, *, tokenizer: "Tokenizer | None" = None) -> None:
    """Write the step of a model as a directory, which appears whole or not at all.

    ``model.onnx`` is the graph, in float32 and of opset 20 (from 1.9 GB on its weights are in
    ``model.onnx.data``); ``state.npz`` the state before the first token, one row a tensor;
    ``config.json`` the model's configuration and fingerprint. Inputs of the graph: ``token`` and
    ``position``, int64 [batch], and each tensor of the state, ``state.N`` of layer N, [batch, ...].
    Outputs: ``logits`` [batch, vocab_size], ``next_position``, ``next.N``. The batch is free. Angles
    are float64 inside, as in the model, so positions have no end.

    Args:
        model: a causal decoder whose states have a constant size; it is not changed.
        path: the directory; a saved model there is replaced.
        tokenizer: written beside the graph.

    Raises:
        NotImplementedError: a state that grows with the tokens, a complex one, or none; the block
            is named.
        RuntimeError: onnx or onnxscript is not installed.
        ValueError: path holds something that is not a saved model.
    """
    check_exportable(model)
    if find_spec("onnx") is None or find_spec("onnxscript") is None:
        raise RuntimeError("ONNX needs onnx and onnxscript; run: pip install 'transnormer[onnx]'")
    # A copy: weights of the caller's model stay where and as they are.
    plain = copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)
    step = Step(plain)
    graph = _graph(step)
    size = sum(x.numel() * x.element_size() for x in plain.state_dict().values())
    with replaced(path) as directory:
        graph.save(str(directory / GRAPH), external_data=size > _LARGEST_MESSAGE)
        empty: dict[str, Any] = {name: x.numpy() for name, x in step.empty().items()}
        np.savez_compressed(directory / STATE, **empty)
        about = {
            "model_type": MODEL_TYPE,
            "format": FORMAT,
            "fingerprint": model.fingerprint(),
            "decoder": model.config.model_dump(mode="json"),
        }
        files.write_json(about, directory / ABOUT)
        if tokenizer is not None:
            tokenizer.save(directory)


def _graph(step: Step) -> Any:
    """The ONNX program of a step."""
    from onnxscript import optimizer

    # Two tensors: torch would take one for the other where they are the same.
    token, position = (torch.zeros(_EXAMPLE_ROWS, dtype=torch.int64) for _ in range(2))
    state = {name: x.repeat_interleave(_EXAMPLE_ROWS, 0) for name, x in step.empty().items()}
    # Some forms are chosen by the size of the work, which may narrow the range of the batch for
    # which torch would have made the same choice; each of them is right for every batch.
    batch = {0: torch.export.Dim.AUTO}
    shapes = {"token": batch, "position": batch, "state": dict.fromkeys(state, batch)}
    outputs = ["logits", "next_position", *(f"next.{name[6:]}" for name in state)]
    named = {0: torch.export.Dim("batch")}
    with _without_notices():
        program = torch.export.export(step, (token, position, state), dynamic_shapes=shapes)
        _check_free(program)
        program = program.run_decompositions({torch.ops.transnormer.logcumsumexp.default: _running})
        graph = torch.onnx.export(
            program,
            input_names=["token", "position", *state],
            output_names=outputs,
            opset_version=OPSET,
            dynamic_shapes={
                "token": named,
                "position": named,
                "state": dict.fromkeys(state, named),
            },
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert graph is not None
    # Not the exporter's own simplification, which takes x + 1e-8 for x: zeros of a norm become NaN.
    optimizer.inline(graph.model)
    optimizer.fold_constants(graph.model)
    optimizer.remove_unused_nodes(graph.model)
    # Notes of the exporter for its developers, among them paths of this machine.
    graph.model.graph.metadata_props.clear()
    for part in (graph.model.graph, *graph.model.functions.values()):
        for node in part.all_nodes():
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
    return graph


def _check_free(program: torch.export.ExportedProgram) -> None:
    """Assert that the batch of every input is free: torch may fix one without an error."""
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.name in inputs:
            assert isinstance(node.meta["val"].shape[0], torch.SymInt), f"{node.name} has no batch"


@contextmanager
def _without_notices() -> Iterator[None]:
    """Silence torch's notices about parts of its exporter that are absent or will change."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _running(x: Tensor, starts: Tensor | None) -> Tensor:
    """``ops.logcumsumexp`` of a few tokens in operations that ONNX has; float64 inside, as there."""
    total, found = x[:, 0].double(), [x[:, 0].double()]
    for t in range(1, x.shape[1]):
        new = x[:, t].double()
        high, low = torch.maximum(total, new), torch.minimum(total, new)
        # -inf minus -inf would be NaN: where there is no mass, there is none.
        gap = torch.where(high == -torch.inf, 0.0, low - high)
        total = high + torch.log1p(gap.exp())
        found.append(total)
    return torch.stack(found, 1).to(x.dtype)
