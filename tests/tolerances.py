"""The one place for numeric limits: how far a result may be from the exact one, and why.

An error is rms(actual - exact) / rms(exact), with ``exact`` in float64. Elementwise limits are
not used: single entries of a sum that cancels are off by any factor without a fault.
"""

import torch
from torch import Tensor

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32)} | {
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: torch.finfo(torch.float16).eps,
}

# Sums of up to 1,000 products, accumulated in the op's accumulation dtype. The token recurrence
# adds them one after the other, which costs it sqrt(1000) / 6 = 5 eps; chunks stay below 2 eps.
# Half precision shows the one rounding on the way out (eps / 2 at most, 0.3 eps rms).
OUTPUT = {
    torch.float64: 1e-12,
    torch.float32: 8 * EPS[torch.float32],
    torch.bfloat16: 1 * EPS[torch.bfloat16],
    torch.float16: 1 * EPS[torch.float16],
}

# A gradient passes through twice as many sums, and log_decay's is a difference of large ones.
GRADIENT = {
    torch.float64: 1e-11,
    torch.float32: 16 * EPS[torch.float32],
    torch.bfloat16: 2 * EPS[torch.bfloat16],
    torch.float16: 2 * EPS[torch.float16],
}

# The gradient of a constant log_decay, relative to sqrt(sum of squares) of its terms: where nothing
# decays, the rounding of the state stays in every later term, so it adds up along the sequence
# (40 eps seen at 257 tokens in each form).
LOG_DECAY_GRADIENT = GRADIENT | {
    torch.float64: 1e-10,
    torch.float32: 128 * EPS[torch.float32],
}

# States are float32 for half inputs, so they show no rounding to the input's dtype.
STATE = {
    torch.float64: 1e-12,
    torch.float32: 8 * EPS[torch.float32],
    torch.bfloat16: 8 * EPS[torch.float32],
    torch.float16: 8 * EPS[torch.float32],
}

# Kernels multiply 16-bit tiles: scores, weighted values and states are rounded to the inputs' dtype
# before a product (sums stay float32). One rounding to bfloat16 is 1.65e-3 rms, k independent ones
# 1.65e-3 sqrt(k): three on the way to an output (2.9e-3), up to ten to a gradient through both
# sweeps. Per (batch, head), unit-scale inputs, against float64 on the rounded inputs. float16 has
# three more bits; float32 products keep IEEE or three-pass tf32 accuracy.
KERNEL_OUTPUT = {torch.bfloat16: 4e-3, torch.float16: 4e-3 / 8, torch.float32: 2e-6}
KERNEL_GRADIENT = {torch.bfloat16: 6e-3, torch.float16: 6e-3 / 8, torch.float32: 1e-5}
# A state is never rounded as a whole, only the weighted values that enter it are: one rounding for
# 16-bit inputs, and a margin of 1.8 for the heads where few tokens make the state.
KERNEL_STATE = {torch.bfloat16: 3e-3, torch.float16: 3e-3 / 8, torch.float32: 2e-6}
# Over all heads of a call, against the gradient or its typical size, whichever is larger: one
# number a head, which random signs may make small while its error stays.
KERNEL_LOG_DECAY = {torch.bfloat16: 1e-2, torch.float16: 1e-2 / 8, torch.float32: 1e-4}
# Of a gate's log decay, one a token: sums of products of two things with a gradient's error each.
KERNEL_GATE_GRADIENT = {torch.bfloat16: 8e-3, torch.float16: 8e-3 / 8, torch.float32: 1e-5}
# Rows around chunk boundaries, and the last ones, against all rows of the same head.
KERNEL_UNEVEN = 2.0

# Two packages against each other: independent errors of the kinds above add up. For float32 the
# other package multiplies in tf32, whose operands the hardware cuts to 10 bits instead of rounding
# them (1.5e-3 seen), and one rounds bfloat16 gradients twice.
PEER_OUTPUT = {torch.bfloat16: 6e-3, torch.float32: 2e-3}
PEER_GRADIENT = {torch.bfloat16: 9e-3, torch.float32: 4e-3}

# Acceptance: dense = tiles = chunks = recurrence in float32 (architecture note, section O.3).
FORMS_FLOAT32 = 1e-5
# Gradients of the chunked form against the closed formulas in float64 (O.3).
FORMS_GRADIENT_FLOAT64 = 1e-10

# Scores at position offset 4,000,000 against those at offset 0 (spec, decision 5).
LRPE_OFFSET = 1e-5

# Training, prefill and steps agree at every split, as a share of the logits' standard deviation
# (spec, decision 6).
SPLIT_CPU = 1e-5
SPLIT_GPU = 1e-4
# The same in float64, for every mixer.
SPLIT_FLOAT64 = 1e-12
# Gradients of a small model in float64, in parts or whole: sums of some thousand terms twice over.
GRADIENT_FLOAT64 = 1e-10
# Logits of a model of two blocks in bfloat16 (weights, activations or both) against float32 on the
# same weights: some ten roundings of 2^-9 in a row on each path.
BF16_MODEL = 0.03

# A float64 model against the float64 oracle: slopes are rounded to float32 (5e-8 on the logits).
DECODER_FLOAT64 = 1e-6
DECODER_FLOAT32 = 1e-5

# torchscale's RetNet, whose scores are divided by their sizes, against the plain recurrence after the
# norm of each head: with eps 0 only rounding is left; eps 1e-6 weighs more where outputs are tiny.
RETNET_NORMALISED = {torch.float64: 1e-12, torch.float32: 1e-4}
# Forget gates in float32, elementwise relative errors: two functions of one rounding each, and the
# rounding of their argument where the bound is near 1.
FORGET_GATE = 16 * EPS[torch.float32]
# Naive float32 loops of another package against float32: both round once a token, some 100 tokens.
PEER_LOOP = 2e-6

# AdamW in float32 against float64, of parameters and moments: a dozen roundings a step, four steps.
ADAMW = 8 * EPS[torch.float32]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """rms(actual - exact) / rms(exact), in float64; 0 for two equal or empty tensors."""
    difference = actual.detach().double() - exact.detach().double()
    if difference.numel() == 0 or not bool((difference != 0).any()):
        return 0.0
    scale = exact.detach().double().square().mean().sqrt().item()
    return difference.square().mean().sqrt().item() / scale if scale else float("inf")


def assert_close(
    actual: Tensor,
    exact: Tensor,
    baseline: Tensor | None = None,
    *,
    limit: float | None = None,
    scale: Tensor | None = None,
    name: str = "result",
) -> None:
    """Fail unless ``actual`` has the shape of ``exact`` and an error within the limit.

    Args:
        actual: what is tested.
        exact: the truth, float64.
        baseline: a trusted computation in actual's dtype; the limit is then twice its error plus
            one eps of the dtype.
        limit: relative error; default ``OUTPUT`` of actual's dtype.
        scale: what the error is relative to, instead of exact: for a sum of many terms that
            cancel, sqrt(sum of their squares), since that is what rounding is relative to.
        name: for the message.
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    assert bool(torch.isfinite(actual).all()), f"{name} has NaN or infinite entries"
    error = relative_error(actual, exact)
    if scale is not None and error:
        error *= (exact.double().square().mean() / scale.double().square().mean()).sqrt().item()
    if baseline is not None:
        limit = 2 * relative_error(baseline, exact) + EPS[actual.dtype]
    elif limit is None:
        limit = OUTPUT[actual.dtype]
    assert error <= limit, f"{name}: relative error {error:.3g} exceeds {limit:.3g}"


# eos in float32 against float64: up to 256 steps of the recurrence, or an FFT, which rounds relative
# to the largest value of a row (12 eps seen).
EOS_FLOAT32 = 32 * EPS[torch.float32]

# A loss and its gradients in segments against those of the whole sequence, float64, relative norms:
# the same sums in another order (2e-14 seen over all mixers).
SEGMENTS = 1e-12
# Losses of compiled blocks beside plain ones in float32, step by step over 10 steps: fused elements
# round in another order.
COMPILED_LOSS = 1e-6

# Gates of layers in kernels, float32: log decays, keys and masses of a softmax over the past, each
# from a sum of some thousand exponentials and two functions of it.
CUMULATIVE_SOFTMAX = 16 * EPS[torch.float32]
# Their gradients: scans of products of factors below 1; half precision shows two roundings, of the
# gradient that comes in and of the one that goes out, which the interpreter cuts off.
GATE_GRADIENT = {
    torch.float32: 32 * EPS[torch.float32],
    torch.bfloat16: 1 * EPS[torch.bfloat16],
    torch.float16: 1 * EPS[torch.float16],
}

# Counts of chance against their expectation, in standard deviations: one test in 30,000 misses.
STANDARD_DEVIATIONS = 4.0

# Greedy tokens of two runs may part only where the two likeliest logits are closer than this: the
# sums of another batch shape round differently.
TOP2_GAP = 1e-5

# Parts of a sequence on several ranks against the whole in one process, float64: the same sums in
# another order (5e-15 seen over all mixers).
SEQUENCE_PARALLEL = 1e-12
# Three steps of AdamW on a mesh of ranks against one process, float64: gradients summed in another
# order, divided by their own root mean square (8e-15 seen).
LAYOUT_FLOAT64 = 1e-12

# Logits of a model of two blocks with rounded weights, by bits. A weight is off by 0.6 % rms of its
# row for 8 bits (1.5 to 1.9 % seen in the logits) and by 9.5 % for 4 bits in groups of 32 (24 %).
QUANTIZED_LOGITS = {8: 0.03, 4: 0.4}
# The same in float32 on a GPU, where a row and its segments are cut at other places and compiled
# blocks fuse in another order: a gradient passes some 100 roundings.
GPU_SEGMENTS = 1e-4

# Bits of a smoothed n-gram model in float64 against Python's: sums and logarithms of some thousand
# terms, and tables in which two runs in four million share a cell.
SMOOTHED_BITS = 1e-9
# bfloat16 weights after three updates of other random numbers: each is rounded by up to 2^-8 of the
# weight, and moments that were rounded so move it elsewhere by a share of the step.
ROUNDED_WEIGHTS = 1.5e-2
# Losses in float32 of a run that is laid out anew on other ranks, beside one process (training note,
# section 5, 1).
RELAID_LOSS = 1e-6
# The same on GPUs, whose kernels round states and cut sums otherwise for parts of a sequence.
RELAID_LOSS_GPU = 1e-4
# Logits of a small model whose projections have 8-bit weights, one scale a row: 0.4 % a product, some
# ten of them in a row (2.3e-2 seen).
INT8_MODEL = 0.06

# Log probabilities of a float32 toy model on a CPU, against one pass in float32 and its softmax in
# float64: a few roundings of logits of size 1, in another shape of the products.
ENGINE_LOGPROB = 1e-5
# onnxruntime's step of toy models in float32 against one pass of the model, in deviations of the
# logits: products in another order, over 12 tokens and two layers (5e-6 seen, with tied gates).
ONNX_STEP = 1e-5

# Log probabilities of tokens drawn by vLLM for CPUs in float32, relative to the logits' standard
# deviation: its own products of matrices (oneDNN), in batches of another shape.
VLLM_LOGPROB = 1e-4

# Gradients of compiled blocks beside plain ones in float32: sums of some hundred terms in another order
# (4e-7 seen).
COMPILED_GRADIENT = 1e-5
# Losses of a run whose residual stream is bfloat16 beside one whose is float32, both under bfloat16
# autocast, step by step over 200 steps (training note, targets).
RESIDUAL_LOSS = 1e-3

# Log-likelihoods of continuations of some ten tokens in float32, in nats: logits of another split
# differ by 1e-5 of their deviation, and sums of them are compared across batches and with
# transformers' (3e-6 seen).
LOGLIKELIHOOD = 1e-4
# Losses and gradient norms, up to 6, of a captured run and a plain one in bfloat16 over 8 steps: the
# same kernels, of which the embedding's gradient adds in any order.
GPU_GRAPH = 5e-3
# One layer between its projections as one op of kernels, against float64: linear attention's own error
# (KERNEL_OUTPUT, KERNEL_GRADIENT), and for 16-bit inputs one rounding each of silu(q), silu(k), o and
# their gradients (bfloat16: 4.4e-3 and 5.1e-3 seen).
JOINT_ATTENTION = {torch.bfloat16: 8e-3, torch.float32: KERNEL_GRADIENT[torch.float32]}
# Gradients of segments on two ranks beside one, float32 parameters under bfloat16 autocast: parts of a
# parameter's gradient are added in another order.
SEGMENTS_BFLOAT16 = 1e-2
# Where 4,096 parameters have moved on average in 40 updates of 0.1 last places that are rounded at random:
# a deviation of some 2 places each, over 64.
ROUNDED_MOVES = 0.06
# An evaluation in bfloat16, as processes gather the parameters, beside float32: a mean over tokens of
# losses whose terms are rounded (3e-5 seen).
ROUNDED_EVALUATION = 1e-3
# Products of up to 96 float8 numbers whose sums are float32, beside sums in float64 (1e-7 seen). A factor
# rounded otherwise would be off by 3 %.
FLOAT8_PRODUCT = 4 * EPS[torch.float32]
# Losses, up to 6, of some updates with float8 products beside others with them or without: a factor is off
# by 2 to 3 %, in either direction.
FLOAT8_LOSS = 5e-3
