"""transnormer.ops stands on torch alone."""

import subprocess
import sys

# The imports of a fresh process that has nothing of the environment but torch.
PROGRAM = """
import sys
import importlib.machinery

finder = importlib.machinery.PathFinder
find = finder.find_spec
blocked = {blocked!r}
finder.find_spec = staticmethod(
    lambda name, path=None, target=None: (
        None if name.split(".")[0] in blocked else find(name, path, target)
    )
)
import torch
from transnormer.ops import decay, linear_attention, linear_attention_step
x = torch.randn(1, 70, 2, 16, requires_grad=True)
o, state = linear_attention(x, x, x, decay.tnl_log_decay(2, 0, 2))
o.sum().backward()
linear_attention_step(x[:, 0], x[:, 0], x[:, 0], None, state)
print("rooms:", *sorted(n for n in sys.modules if n.count(".") == 1 and n[:11] == "transnormer"))
"""
# What torch itself may import is left out: it decides for itself what it can do without.
BLOCKED = [
    "huggingface_hub",
    "hypothesis",
    "matplotlib",
    "numpy",
    "pydantic",
    "rich",
    "safetensors",
    "tensorboard",
    "tokenizers",
    "transformers",
    "triton",
    "typer",
]


def test_ops_import_and_run_with_torch_alone() -> None:
    program = PROGRAM.format(blocked=BLOCKED)
    # torch warns where numpy is missing; that warning is not this package's.
    command = [sys.executable, "-W", "ignore", "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["rooms:", "transnormer.ops"]
