"""Run the Triton kernels' launches on a CPU, in Triton's interpreter, and print how far they are from float64 autograd.

A program of its own: Triton decides when it is imported whether kernels are interpreted. Prints one JSON line: names of
results to their relative distances, for float32 and bfloat16.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from varcli.kernels import (
    attention,
    attention_backward_triton,
    attention_step_triton,
    attention_triton,
    few_rows_triton,
    fp8_triton,
    gelu_triton,
    group_norm_triton,
    norm,
    norm_triton,
    qk,
    qk_triton,
    small_maps_triton,
)
from varcli.kernels.fp8 import round_rows
from varcli.kernels.outputs import rows_like

CAP = math.log(100)


@contextmanager
def rows_spread(kernels: ModuleType, is_spread: bool) -> Iterator[None]:
    """Take the path of few rows, spread one a program, as the shapes here are few; or that of many, as in training."""
    with patch.object(kernels, "_FEW_ROWS", kernels._FEW_ROWS if is_spread else 0):
        yield


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative to the expected tensor's norm, or absolute where that is zero."""
    norm = expected.double().norm().item()
    return (actual.double() - expected.double()).norm().item() / (norm or 1.0)


def measure_norm(batch: int, length: int, width: int, given: int, dtype: torch.dtype) -> dict[str, float]:
    """Forward and backward of a modulated norm: alone, with a branch and its gate, or also with its bias.

    given: 0, 1 or 2 of these; with all, the norm's rows are rounded to FP8 too. The vectors are strided parts of one
    modulation, as in a block.
    """
    stream, branch, grad_out, grad_normed = (torch.randn(batch, length, width).to(dtype) for _ in range(4))
    gate, scale, shift = torch.randn(batch, 1, 6, width).to(dtype).unbind(2)[::2]
    bias = torch.randn(width)
    wide = [tensor.double().requires_grad_() for tensor in (stream, branch, bias, gate, scale, shift)]
    if given:
        biased = wide[:2] + [wide[2] if given == 2 else None] + wide[3:]
        out, normed = norm.gated_norm_reference(*biased, 1e-6)
        torch.autograd.backward((out, normed), (grad_out.double(), grad_normed.double()))
    else:
        out, normed = wide[0], norm.norm_reference(wide[0], *wide[4:], 1e-6)
        normed.backward(grad_normed.double())
    branches = (branch if given else None, bias if given == 2 else None, gate if given else None)
    rows = torch.empty(batch * length, width, dtype=torch.float8_e4m3fn), torch.empty(batch * length, 1)
    launched = norm_triton.launch_forward(stream, *branches, scale, shift, 1e-6, *(rows if given == 2 else ()))
    found_out, found, mean, inverse = launched
    grads = norm_triton.launch_backward(
        grad_normed, grad_out if given else None, found_out, *branches, scale, mean, inverse
    )
    pairs = {"out": (found_out, out), "normed": (found, normed), "stream": (grads[0], wide[0].grad)}
    pairs |= {name: (grads[2][:, at], wide[4 + at].grad[:, 0]) for at, name in enumerate(("scale", "shift"))}
    if given:
        pairs |= {"branch": (grads[1], wide[1].grad), "gate": (grads[2][:, 2], wide[3].grad[:, 0])}
    if given == 2:
        pairs["bias"] = (grads[2][:, 3].sum(dim=0), wide[2].grad)
    rounded = measure_rows("normed", found.flatten(0, 1), *rows) if given == 2 else {}
    alone = rows_like(stream)
    lone = norm_triton.launch_forward(stream, *branches, scale, shift, 1e-6, *alone, keeps=False)
    pairs["out alone"] = (lone[0], out)
    rounded |= measure_rows("normed alone", found.flatten(0, 1), *alone)
    return {name: distance(*pair) for name, pair in pairs.items()} | rounded


def measure_gelu(num_rows: int, width: int, dtype: torch.dtype) -> dict[str, float]:
    """Forward and backward of `biased_gelu`, as they are and with rows in FP8 beside them."""
    before, grad = (torch.randn(num_rows, width).to(dtype) for _ in range(2))
    bias = torch.randn(width)
    wide = [tensor.double().requires_grad_() for tensor in (before, bias)]
    result = torch.nn.functional.gelu(wide[0] + wide[1], approximate="tanh")
    result.backward(grad.double())
    found, rows = {}, {}
    for rounds in (False, True):
        made, *rounded = gelu_triton.launch_forward(before, bias, rounds)
        *grads, rounded_grad, scales = gelu_triton.launch_backward(grad, before, bias, rounds)
        pairs = {"result": (made, result), "before": (grads[0], wide[0].grad), "bias": (grads[1], wide[1].grad)}
        found |= {f"{name} {rounds}": distance(*pair) for name, pair in pairs.items()}
        if rounds:
            rows = measure_rows("result", made, *rounded) | measure_rows("before", grads[0], rounded_grad, scales)
            rows |= measure_rows("alone", made, *gelu_triton.launch_forward(before, bias, True, keeps=False)[1:])
    return found | rows | measure_rows("plain", before, *fp8_triton.launch_round(before))


def measure_rows(name: str, whole: Tensor, rounded: Tensor, scales: Tensor) -> dict[str, float]:
    """How far the scales are off, and the share of entries that are more than a step off in FP8.

    The interpreter loses the carry where an entry is rounded up to a power of two; these do not count.
    """
    expected, expected_scales = round_rows(whole)
    right, wrong = expected.double(), (rounded.double() - expected.double()).abs()
    is_off = (wrong > right.abs() / 8 + 2**-9) & (right.abs().log2() % 1 > 0)
    return {
        f"{name} scales": distance(scales, expected_scales),
        f"{name} rows": is_off.double().mean().item() + (wrong > right.abs() / 2 + 2**-9).double().mean().item(),
    }


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


def measure_attention(
    batch: int, lengths: tuple[int, ...], heads: int, width: int, tile: int | None
) -> dict[str, float]:
    """Forward and backward of `attend`, and a step over a cache; the first head's temperature is above its cap.

    tile: tokens of a tile, or None for as many as on a GPU.
    """
    qkv = torch.randn(batch, sum(lengths), 3 * heads * width)
    q_bias, v_bias = torch.randn(2, heads * width)
    log_scale = torch.linspace(5, -1, heads).view(1, heads, 1, 1)
    wide = [tensor.double().requires_grad_() for tensor in (qkv, q_bias, v_bias, log_scale)]
    expected = attention.attend(*wide, CAP, lengths, 0.7).unflatten(2, (heads, width))
    grad = torch.randn(expected.shape)
    expected.backward(grad.double())
    q, k, v, *inverses = qk_triton.launch_forward(qkv, q_bias, v_bias, log_scale, CAP)
    small = None if tile is None else attention_triton.Tiling(tile, 16, 4, 1)
    with (
        patch.object(attention_triton, "FORWARD", small or attention_triton.FORWARD),
        patch.object(attention_backward_triton, "QUERY_TILES", small or attention_backward_triton.QUERY_TILES),
        patch.object(attention_backward_triton, "KEY_TILES", small or attention_backward_triton.KEY_TILES),
    ):
        seen = attention_triton.launch_forward(q, k, v, lengths, 0.7)
        given = (grad, q, k, v, *seen, *inverses, log_scale, CAP, lengths, 0.7)
        found, biases, scales = attention_backward_triton.launch_backward(*given)
    pairs = {"seen": (seen[0], expected), "qkv": (found, wide[0].grad), "log_scale": (scales, wide[3].grad.flatten())}
    pairs |= {"q_bias": (biases[0], wide[1].grad), "v_bias": (biases[1], wide[2].grad)}
    for before, length in ((0, 1), (5, 40), (70, 7), (3, 131)):
        if length > qkv.shape[1]:
            continue
        given = qkv[:, :length].contiguous(), q_bias, v_bias, log_scale, CAP
        room = torch.randn(2, batch, heads, before + length + 3, width)[:, :, :, : before + length]
        room[0] = torch.nn.functional.normalize(room[0], dim=-1)
        wanted = room.double()
        rows = (part if isinstance(part, float) else part.double() for part in given)
        seen_by_step = attention.attend_step(*rows, *wanted, 0.7)
        pairs[f"step {length}"] = (attention_step_triton.launch_step(*given, *room, 0.7).flatten(2), seen_by_step)
        pairs[f"cache {length}"] = (room, wanted)
    # queries are up to 100 long, which multiplies the rounding of keys before the softmax: so much that the gradients show it
    loose = {"qkv", "q_bias", "log_scale"}
    return {name: distance(*pair) / (20 if name in loose else 2) for name, pair in pairs.items()}


def measure_group_norm(batch: int, length: int, width: int, dtype: torch.dtype) -> dict[str, float]:
    """The passes of `group_norm`: sums of tokens with and without a bias, of a residual, and the normalised values."""
    tokens, branch = torch.randn(2, batch, length, width).to(dtype)
    bias, scale, shift = torch.randn(width), *torch.randn(2, batch, width)
    out, summed = group_norm_triton.launch_residual(tokens, branch, bias)
    alone, alone_summed = group_norm_triton.launch_residual(tokens, None, bias)
    biased = tokens.double() + bias.double()
    pairs = {"out": (out, biased + branch.double()), "alone": (alone, biased)}
    phases = torch.randn(batch, 13 * 11, 4 * width).to(dtype)
    doubled, doubled_summed = group_norm_triton.launch_phases(phases, bias, 12, 10)
    sides = next((rows, length // rows) for rows in (20, 17, 7) if length % rows == 0)
    margined = torch.ops.varcli.add_with_margin(tokens.double(), branch.double(), bias.double(), *sides)
    pairs["margined"] = (group_norm_triton.launch_margin(tokens, branch, bias, *sides), margined)
    pairs["doubled"] = (doubled, torch.ops.varcli.interleave_phases(phases.double(), bias.double(), 12, 10)[0])
    for name, found, values in (
        ("plain", group_norm_triton.launch_sums(tokens, None), tokens.double()),
        ("biased", group_norm_triton.launch_sums(tokens, bias), biased),
        ("residual", summed, out.double()),  # as it is rounded
        ("stored", alone_summed, alone.double()),
        ("phases", doubled_summed, doubled.double()),
    ):
        pairs |= {f"{name} sums": (found[:, :, 0].sum(1), values.sum(1))}
        pairs |= {f"{name} squares": (found[:, :, 1].sum(1), values.square().sum(1))}
    wide = tokens.double() * scale.double().unsqueeze(1) + shift.double().unsqueeze(1)
    pairs["scaled"] = (group_norm_triton.launch_scale(tokens, scale, shift, False), wide)
    pairs["silu"] = (group_norm_triton.launch_scale(tokens, scale, shift, True), torch.nn.functional.silu(wide))
    return {name: distance(*pair) for name, pair in pairs.items()}


def measure_small_maps(batch: int, channels: int, side: int, target: int) -> dict[str, float]:
    """Maps of a step: resized from tokens and from maps, blended into larger ones, and embedded for twice as many samples."""
    tokens, maps = torch.randn(batch, side * side, channels), torch.randn(batch, channels, side, side)
    by_token = tokens.transpose(1, 2).view(batch, channels, side, side)
    f_hat, enlarge = torch.randn(batch, channels, target, target), torch.randn(target, side)
    weight, bias = torch.randn(channels, channels, 3, 3), torch.randn(channels)
    linear, linear_bias, places = torch.randn(72, channels), torch.randn(72), torch.randn(1, side * side, 72)
    large = enlarge.double() @ by_token.double() @ enlarge.T.double()
    convolved = torch.nn.functional.conv2d(large, weight.double(), bias.double(), padding=1)
    embedded = tokens.double() @ linear.T.double() + linear_bias + places
    resized = small_maps_triton.launch_resize(by_token, enlarge)
    embed = small_maps_triton.launch_embed(tokens, linear, linear_bias, places, 2, torch.float32)
    with patch.object(small_maps_triton, "_FEW_TOKENS", 0):
        embed_many = small_maps_triton.launch_embed(tokens, linear, linear_bias, places, 2, torch.float32)
    strided = resized.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).view(f_hat.shape)
    assert strided.stride(1) == 1
    return {
        "of tokens": distance(resized, large),
        "of maps": distance(
            small_maps_triton.launch_resize(maps, enlarge), enlarge.double() @ maps.double() @ enlarge.T.double()
        ),
        "blended": distance(
            small_maps_triton.launch_blend(f_hat, strided, weight, bias, 0.3), f_hat + 0.7 * large + 0.3 * convolved
        ),
        "embedded": distance(embed, torch.cat((embedded, embedded))),
        "embedded, as many tokens are": distance(embed_many, torch.cat((embedded, embedded))),
    }


def measure_few_rows(rows: int, depth: int, width: int) -> dict[str, float]:
    """A product of few rows, and its GELU with a bias."""
    x, weight, bias = torch.randn(rows, depth), torch.randn(width, depth), torch.randn(width)
    product = x.double() @ weight.double().T
    gelu = torch.nn.functional.gelu(product + bias, approximate="tanh")
    return {
        "product": distance(few_rows_triton.launch_product(x, weight), product),
        "gelu": distance(few_rows_triton.launch_product(x, weight, bias), gelu),
    }


def main() -> None:
    """Measure all shapes: odd lengths, several chunks of rows, widths that are no power of two."""
    torch.manual_seed(0)
    results = {}
    for dtype, several in ((torch.float32, True), (torch.bfloat16, False)):
        few = None if several else 1
        for shape, is_spread in itertools.product(((2, 7, 96), (1, 67, 40), (1, 3, 2304))[:few], (True, False)):
            for given in (2, 1, 0):
                with rows_spread(norm_triton, is_spread):
                    results[f"{dtype} norm {shape} {given} {is_spread}"] = measure_norm(*shape, given, dtype)
        for shape in ((2, (1, 4, 9), 3, 32), (1, (1, 4, 9, 30), 1, 24), (1, (140,), 1, 64))[:few]:
            results[f"{dtype} steps {shape}"] = measure_steps(*shape, dtype)
        for shape, is_spread in itertools.product(((7, 96), (131, 40), (3, 1100))[:few], (True, False)):
            with rows_spread(gelu_triton, is_spread):
                results[f"{dtype} gelu {shape} {is_spread}"] = measure_gelu(*shape, dtype)
        for shape in ((2, 289, 40), (1, 7, 160), (1, 600, 3))[:few]:
            results[f"{dtype} group norm {shape}"] = measure_group_norm(*shape, dtype)
    # the interpreter's products of bfloat16 are wrong
    for shape in ((2, (1, 4, 9, 16, 25), 3, 32, 32), (1, (1, 40, 9), 2, 24, 16), (1, (9, 130, 70), 2, 16, None)):
        results[f"{torch.float32} attention {shape}"] = measure_attention(*shape)
    for shape in ((2, 8, 5, 6), (1, 40, 3, 4), (1, 6, 3, 17), (2, 6, 6, 5)):
        results[f"{torch.float32} small maps {shape}"] = measure_small_maps(*shape)
    for shape in ((3, 40, 24), (16, 1100, 48)):
        results[f"{torch.float32} few rows {shape}"] = measure_few_rows(*shape)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
