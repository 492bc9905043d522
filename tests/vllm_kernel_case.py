"""vLLM's own prefill kernel for lightning attention in Triton's interpreter, in a process of its own.

Writes its inputs and outputs to the file that the command line names.
"""

import sys
from typing import Any

import torch
import triton
import vllm.triton_utils
from triton import language

# vLLM hides a Triton that has no backend for the device; the interpreter needs none.
hidden: Any = vllm.triton_utils
hidden.triton, hidden.tl = triton, language

# Read after the lines above: its kernels take Triton from there.
from vllm.model_executor.layers.lightning_attn import lightning_attention  # noqa: E402

HEADS, TOKENS, DIM = 2, 300, 64
SLOPES = (0.5, 0.02)


def main() -> None:
    """One sequence of 300 tokens, which is a block of 256 and a part of the next one."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, TOKENS, HEADS, DIM) for _ in range(3))
    slopes = torch.tensor(SLOPES)
    by_head = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    o, states = lightning_attention(*by_head, slopes)
    result = {"q": q, "k": k, "v": v, "slopes": slopes, "o": o.transpose(1, 2)}
    # The last of the states is the one after the last token.
    result["state"] = states[:, :, -1]
    torch.save(result, sys.argv[1])


if __name__ == "__main__":
    main()
