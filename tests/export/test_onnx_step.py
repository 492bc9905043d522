"""The ONNX step: onnxruntime computes what the model does, for any batch, from its own start."""

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from decoder_cases import tnl_config
from nn.mixer_cases import CASES, MixerCase, ids_of
from tolerances import ONNX_STEP

from transnormer import Decoder, generate
from transnormer.data import ByteTokenizer
from transnormer.data.tokenizers import load_tokenizer
from transnormer.export import onnx_step
from transnormer.export.onnx_step import write_onnx
from transnormer.models.checkpoint import load

BY_NAME = {case.name: case for case in CASES}
GROWS = ("softmax", "softmax-no-positions", "softmax-hybrid", "gau-quad")
REFUSED = (*GROWS, "eos-phase")


class Session:
    """A graph and its state, driven with numpy alone."""

    def __init__(self, directory: Path) -> None:
        self.graph = onnxruntime.InferenceSession(
            directory / "model.onnx", providers=["CPUExecutionProvider"]
        )
        with np.load(directory / "state.npz") as file:
            self.empty = dict(file)
        self.names = [x.name for x in self.graph.get_outputs()]

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits of every token of ids, [batch, seq], token by token."""
        state = {name: np.repeat(x, len(ids), 0) for name, x in self.empty.items()}
        position, found = np.zeros(len(ids), np.int64), []
        for t in range(ids.shape[1]):
            inputs = {"token": ids[:, t], "position": position, **state}
            logits, position, *after = self.graph.run(None, inputs)
            state = dict(zip(state, after, strict=True))
            found.append(logits)
        return np.stack(found, 1)


def check(model: Decoder, directory: Path, rows: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(vocab, (rows, 12), generator=generator)
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    error = Session(directory).logits(ids.numpy()) - expected
    assert np.sqrt((error**2).mean()) <= ONNX_STEP * expected.std()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name not in REFUSED], ids=lambda case: case.name
)
def test_every_mixer_with_a_constant_state_has_a_graph(case: MixerCase, tmp_path: Path) -> None:
    model = case.model()
    write_onnx(model, tmp_path / "out")
    # The example batch of the export is neither of these; 100 rows take other forms of some ops.
    for rows in (1, 100):
        check(model, tmp_path / "out", rows, case.config().vocab_size)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_graph_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        NotImplementedError, match=r"blocks\[\d\].token_mixer.(kind|oscillation) is"
    ):
        write_onnx(BY_NAME[name].model(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bidirectional_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="causal is False"):
        write_onnx(BY_NAME["lightning"].model(causal=False), tmp_path / "out")


def test_without_its_packages_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_step, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'transnormer\[onnx\]'"):
        write_onnx(BY_NAME["lightning"].model(), tmp_path / "out")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Path]:
    """A bfloat16 model and its export, whose weights lie in a file of their own, as of large ones."""
    out = tmp_path_factory.mktemp("onnx") / "out"
    config = tnl_config(vocab_size=300, init_std=0.2)
    torch.manual_seed(3)
    model = Decoder(config).eval().bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_step, "_LARGEST_MESSAGE", 0)
        write_onnx(model, out, tokenizer=ByteTokenizer())
    return model, out


def test_the_graph_computes_what_the_model_does(written: tuple[Decoder, Path]) -> None:
    model, out = written
    for rows in (1, 100):
        check(copy.deepcopy(model).float(), out, rows, 300)


def test_the_directory_says_what_it_holds(written: tuple[Decoder, Path]) -> None:
    model, out = written
    assert next(model.parameters()).dtype == torch.bfloat16
    about = json.loads((out / "config.json").read_text())
    assert about["model_type"] == "transnormer_onnx_step"
    assert about["fingerprint"] == model.fingerprint()
    assert (out / "model.onnx.data").is_file()
    assert load_tokenizer(out).fingerprint == ByteTokenizer().fingerprint
    graph = onnx.load(out / "model.onnx", load_external_data=False)
    assert [(x.domain, x.version) for x in graph.opset_import] == [("", 20)]
    inputs = {x.name: x.type.tensor_type.shape.dim for x in graph.graph.input}
    layers = len(model.config.blocks)
    assert list(inputs) == ["token", "position", *(f"state.{i}" for i in range(layers))]
    assert {dims[0].dim_param for dims in inputs.values()} == {"batch"}
    # No path of the machine that wrote it.
    assert b".py" not in (out / "model.onnx").read_bytes()
    with pytest.raises(ValueError, match="model_type is 'transnormer_onnx_step'"):
        load(out)


def test_greedy_text_is_that_of_generate(written: tuple[Decoder, Path]) -> None:
    model, out = written
    ids = ids_of(1, 5)
    expected = generate(
        copy.deepcopy(model).float(), ids, max_new_tokens=8, temperature=0.0, stop=[]
    )
    list(expected)
    session, tokens = Session(out), ids
    for _ in range(8):
        best = session.logits(tokens.numpy())[:, -1].argmax(-1)
        tokens = torch.cat([tokens, torch.from_numpy(best)[:, None]], 1)
    assert tokens[0, 5:].tolist() == expected.token_ids[0]
