"""Run the Triton kernels' launches on a CPU, in Triton's interpreter, and print how far they are from float64 autograd.

A program of its own: Triton decides when it is imported whether kernels are interpreted. Prints one JSON line: names of
results to their relative distances, for float32 and bfloat16.
"""

from __future__ import annotations

import json
import math
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from varcli.kernels import norm, norm_triton, qk, qk_triton

CAP = math.log(100)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative to the expected tensor's norm, or absolute where that is zero."""
    norm = expected.double().norm().item()
    return (actual.double() - expected.double()).norm().item() / (norm or 1.0)


def measure_norm(batch: int, length: int, width: int, gated: bool, dtype: torch.dtype) -> dict[str, float]:
    """Forward and backward of a modulated norm; the vectors are strided parts of one modulation, as in a block."""
    stream, branch, grad_out, grad_normed = (torch.randn(batch, length, width).to(dtype) for _ in range(4))
    gate, scale, shift = torch.randn(batch, 1, 6, width).to(dtype).unbind(2)[::2]
    wide = [tensor.double().requires_grad_() for tensor in (stream, branch, gate, scale, shift)]
    if gated:
        out, normed = norm.gated_norm_reference(*wide, 1e-6)
        torch.autograd.backward((out, normed), (grad_out.double(), grad_normed.double()))
    else:
        out, normed = wide[0], norm.norm_reference(wide[0], *wide[3:], 1e-6)
        normed.backward(grad_normed.double())
    given = (branch, gate) if gated else (None, None)
    found_out, found, mean, inverse = norm_triton.launch_forward(stream, *given, scale, shift, 1e-6)
    grads = norm_triton.launch_backward(
        grad_normed, grad_out if gated else None, found_out, *given, scale, mean, inverse
    )
    pairs = {"out": (found_out, out), "normed": (found, normed), "stream": (grads[0], wide[0].grad)}
    pairs |= {name: (grads[2][:, at], wide[3 + at].grad[:, 0]) for at, name in enumerate(("scale", "shift"))}
    if gated:
        pairs |= {"branch": (grads[1], wide[1].grad), "gate": (grads[2][:, 2], wide[2].grad[:, 0])}
    return {name: distance(*pair) for name, pair in pairs.items()}


def measure_steps(batch: int, lengths: tuple[int, ...], heads: int, width: int, dtype: torch.dtype) -> dict[str, float]:
    """Forward and backward of `normalized_steps`; the first head's temperature is above its cap."""
    qkv = torch.randn(batch, sum(lengths), 3 * heads * width).to(dtype)
    q_bias, v_bias = torch.randn(2, heads * width)
    log_scale = torch.linspace(5, -1, heads).view(1, heads, 1, 1)
    wide = [tensor.double().requires_grad_() for tensor in (qkv, q_bias, v_bias, log_scale)]
    steps = qk.normalized_steps_reference(*wide, CAP, lengths)
    parts = [part for step in steps for part in step]
    grads = [torch.randn(part.shape).to(dtype) for part in parts]
    torch.autograd.backward(parts, [grad.double() for grad in grads])
    q, k, v, *inverses = qk_triton.launch_forward(qkv, q_bias, v_bias, log_scale, CAP)
    pieces = [grad.transpose(1, 2) for grad in grads]
    found, biases, scales = qk_triton.launch_backward(
        pieces[0::3], pieces[1::3], pieces[2::3], q, k, *inverses, log_scale, CAP
    )
    pairs = {
        "q": (q, torch.cat(parts[0::3], dim=2).transpose(1, 2)),
        "k": (k, parts[-2].transpose(1, 2)),
        "v": (v, parts[-1].transpose(1, 2)),
        "qkv": (found, wide[0].grad),
        "q_bias": (biases[0], wide[1].grad),
        "v_bias": (biases[1], wide[2].grad),
    }
    result = {name: distance(*pair) for name, pair in pairs.items()}
    # a temperature's gradient is a sum that nearly cancels; what it is a sum of is the measure
    spread = sum((grad.double() * part).square().sum() for grad, part in zip(grads[0::3], parts[0::3])).sqrt()
    result["log_scale"] = ((scales - wide[3].grad.flatten()).norm() / spread).item()
    return result


def main() -> None:
    """Measure all shapes: odd lengths, several chunks of rows, widths that are no power of two."""
    torch.manual_seed(0)
    results = {}
    for dtype, several in ((torch.float32, True), (torch.bfloat16, False)):
        for shape in ((2, 7, 96), (1, 67, 40), (1, 3, 2304))[: None if several else 1]:
            for gated in (True, False):
                results[f"{dtype} norm {shape} {gated}"] = measure_norm(*shape, gated, dtype)
        for shape in ((2, (1, 4, 9), 3, 32), (1, (1, 4, 9, 30), 1, 24), (1, (140,), 1, 64))[: None if several else 1]:
            results[f"{dtype} steps {shape}"] = measure_steps(*shape, dtype)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
