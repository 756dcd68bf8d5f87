"""Time the attention kernels in several tilings, beside an attention a step by torch's own kernels.

    python3 examples/benchmarks/attention_shapes.py            the layer of depth 16 at 256 px, 96 images; needs a CUDA GPU

Prints milliseconds of one layer and the rate of the arithmetic that counts, that of keys which are seen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from varcli.bench.calibrate import measure_matmul, median_seconds
from varcli.kernels import attention_backward_triton as backward
from varcli.kernels import attention_triton as forward
from varcli.kernels import qk_triton
from varcli.kernels.attention_triton import Tiling
from varcli.kernels.qk import Step, normalized_steps
from varcli.scales import PatchNums

BATCH, HEADS, WIDTH, CAP = 96, 16, 64, math.log(100)
LENGTHS = PatchNums.parse("256").step_lengths
FORWARD = ((128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 4), (64, 64, 4, 2, 112), (64, 32, 4, 3, 96))
QUERY_TILES = ((128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2, 128), (64, 32, 4, 3, 128), (64, 32, 4, 4, 128))
KEY_TILES = (
    (128, 64, 8, 2),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 64, 4, 2, 168),
    (64, 64, 4, 3, 168),
    (64, 64, 4, 1, 168),
)
"""What is tried, as `Tiling` names it."""


def main() -> None:
    """Time the forward pass, then the backward pass for each shape of either of its kernels, the other left as it is."""
    device = torch.device("cuda")
    seen = sum(length * sum(LENGTHS[: step + 1]) for step, length in enumerate(LENGTHS))
    product = 2 * seen * BATCH * HEADS * WIDTH  # operations of one of the products that attention is made of
    print(f"{torch.cuda.get_device_name()}: bf16 product {measure_matmul(device, torch.bfloat16):.0f} TFLOP/s")

    def show(name: str, products: int, work: Callable[..., object], *given: object) -> None:
        seconds = median_seconds(functools.partial(work, *given), device, in_a_row=40)
        print(f"{name}: {seconds * 1e3:.3f} ms, {products * product / seconds / 1e12:.0f} TFLOP/s", flush=True)

    qkv = torch.randn(BATCH, sum(LENGTHS), 3 * HEADS * WIDTH, device=device, dtype=torch.bfloat16)
    biases = torch.zeros(2, HEADS * WIDTH, device=device)
    log_scale = torch.full((1, HEADS, 1, 1), math.log(4), device=device)
    given = [part.requires_grad_() for part in (qkv, *biases.unbind(), log_scale)]
    steps = normalized_steps(*given, CAP, LENGTHS)
    out = attend(steps)
    grad = torch.randn_like(out)
    show("a step at a time, forward", 2, attend, steps)
    show(
        "a step at a time, backward, normalisation too",
        5,
        lambda: torch.autograd.grad(out, given, grad, retain_graph=True),
    )
    with torch.no_grad():
        q, k, v, *inverses = qk_triton.launch_forward(qkv, *biases, log_scale, CAP)
        trials = (
            (forward, "FORWARD", FORWARD),
            (backward, "QUERY_TILES", QUERY_TILES),
            (backward, "KEY_TILES", KEY_TILES),
        )
        for room, kernel, shapes in trials:
            usual = getattr(room, kernel)
            for shape in shapes:
                setattr(room, kernel, Tiling(*shape))
                kept = forward.launch_forward(q, k, v, LENGTHS, 1.0)
                if kernel == "FORWARD":
                    show(f"{kernel} {shape}", 2, forward.launch_forward, q, k, v, LENGTHS, 1.0)
                else:
                    passed = (grad, q, k, v, *kept, *inverses, log_scale, CAP, LENGTHS, 1.0)
                    show(f"{kernel} {shape}", 5, backward.launch_backward, *passed)
            setattr(room, kernel, usual)


def attend(steps: list[Step]) -> Tensor:
    """An attention a step, (B, L, n, d)."""
    return torch.cat([F.scaled_dot_product_attention(*step, scale=1.0).transpose(1, 2) for step in steps], dim=1)


if __name__ == "__main__":
    main()
