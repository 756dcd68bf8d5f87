"""The Triton kernels compute what float64 autograd of plain torch computes: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from varcli.kernels.gelu import biased_gelu, linear_gelu
from varcli.kernels.norm import gated_norm, gated_norm_reference, norm, norm_reference
from varcli.kernels.qk import normalize_into, normalized_steps, normalized_steps_reference

ROOT = Path(__file__).resolve().parent.parent.parent
# the interpreter cuts bfloat16 off where hardware rounds: up to 2^-8 a value, a bit less than that on average
INTERPRETED = {"torch.float32": 1e-6, "torch.bfloat16": 5e-3}
ON_GPU = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_interpreted_kernels_compute_what_float64_autograd_does():
    script = ROOT / "tests" / "interpret_kernels.py"
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, check=False)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of Triton 3.6 does not work with NumPy 2.4 and later")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 49
    far = {
        f"{case}: {name}": value
        for case, values in results.items()
        for name, value in values.items()
        if not value < INTERPRETED[case.split()[0]]
    }
    assert not far


def distances(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(((a.double() - e.double()).norm() / e.double().norm()).item() for a, e in zip(actual, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 65, 200), (2, 680, 1024), (13, 680, 256), (2, 31, 2304)])
def test_norms_on_a_gpu_equal_their_references(shape, dtype, compiled):
    torch.manual_seed(0)

    def compute(gated, plain, stream, branch, bias, gate, scale, shift):
        out, normed = gated(stream, branch, bias, gate, scale, shift, 1e-6)
        out, other = gated(out, normed, None, gate, shift, scale, 1e-6)
        return out, other, plain(out, shift, scale, 1e-6)

    stream, branch = torch.randn(2, *shape, device="cuda").to(dtype)
    gate, scale, shift = torch.randn(shape[0], 1, 6, shape[2], device="cuda").to(dtype).unbind(2)[::2]
    bias = torch.randn(shape[2], device="cuda")
    given = [tensor.detach().requires_grad_() for tensor in (stream, branch, bias, gate, scale, shift)]
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = compute(gated_norm_reference, norm_reference, *wide)
    call = torch.compile(compute, fullgraph=True) if compiled else compute
    actual = call(gated_norm, norm, *given)
    grads = [torch.randn_like(tensor) for tensor in actual]
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    torch.autograd.backward(actual, grads)
    assert distances(actual, expected) < 2 * ON_GPU[dtype]
    assert distances([t.grad for t in given], [t.grad for t in wide]) < 4 * ON_GPU[dtype]  # through three of them


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 65, 200), (2, 680, 4096)])
def test_gelu_on_a_gpu_equals_torchs(shape, dtype, compiled):
    torch.manual_seed(0)
    before = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
    bias = torch.randn(shape[2], device="cuda", requires_grad=True)
    wide = [tensor.detach().double().requires_grad_() for tensor in (before, bias)]
    expected = F.gelu(wide[0] + wide[1], approximate="tanh")
    actual = (torch.compile(biased_gelu, fullgraph=True) if compiled else biased_gelu)(before, bias)
    grad = torch.randn_like(actual)
    expected.backward(grad.double())
    actual.backward(grad)
    assert distances([actual, before.grad, bias.grad], [expected, wide[0].grad, wide[1].grad]) < ON_GPU[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, (1, 4, 9), 3, 40), (2, (1, 4, 9, 16, 25, 36, 64, 100, 169, 256), 16, 64)])
def test_attention_by_step_on_a_gpu_equals_its_reference(shape, dtype, compiled):
    torch.manual_seed(0)
    batch, lengths, heads, width = shape

    def attend(steps_of, *inputs):
        steps = steps_of(*inputs, math.log(100), lengths)
        return torch.cat([F.scaled_dot_product_attention(*step, scale=1.0).transpose(1, 2) for step in steps], dim=1)

    qkv = torch.randn(batch, sum(lengths), 3 * heads * width, device="cuda").to(dtype)
    biases = torch.randn(2, heads * width, device="cuda")
    log_scale = torch.linspace(5, 1, heads, device="cuda").view(1, heads, 1, 1)
    given = [tensor.detach().requires_grad_() for tensor in (qkv, *biases, log_scale)]
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = attend(normalized_steps_reference, *wide)
    call = torch.compile(attend, fullgraph=True) if compiled else attend
    actual = call(normalized_steps, *given)
    grad = torch.randn_like(actual)
    expected.backward(grad.double())
    actual.backward(grad)
    # queries are up to 100 long, which multiplies the rounding of keys before the softmax
    assert distances([actual], [expected]) < 20 * ON_GPU[dtype]
    assert distances([t.grad for t in given[:3]], [t.grad for t in wide[:3]]) < 20 * ON_GPU[dtype]
    spread = (given[0].grad.double().norm() * wide[0].norm() / wide[0].numel() ** 0.5).item()
    assert (given[3].grad - wide[3].grad).abs().max().item() < 20 * ON_GPU[dtype] * max(spread, 1.0)
    assert given[3].grad.flatten()[0] == 0  # above its cap


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 25, 16, 64), (4, 256, 30, 64), (3, 1, 3, 40)])
def test_keys_and_values_go_to_their_room_and_nowhere_else(shape):
    """Law: what a GPU writes to a cache is what the formulas write, between what was there before and after."""
    torch.manual_seed(0)
    batch, length, heads, width = shape
    before, after = 7, 3
    given = (torch.randn(batch, length, 3 * heads * width), *torch.randn(2, heads * width))
    log_scale = torch.linspace(5, 1, heads).view(1, heads, 1, 1)
    found = []
    for device in ("cpu", "cuda"):
        caches = torch.zeros(2, batch, heads, before + length + after, width, dtype=torch.bfloat16, device=device)
        rooms = caches.narrow(3, before, length).unbind()
        q = normalize_into(
            given[0].to(device, torch.bfloat16), *(t.to(device) for t in (*given[1:], log_scale)), 4, *rooms
        )
        found.append((q.cpu(), caches.cpu()))
    (q_cpu, cpu), (q_cuda, cuda) = found
    assert distances([q_cuda], [q_cpu.double()]) < ON_GPU[torch.bfloat16]
    assert distances([cuda], [cpu.double()]) < ON_GPU[torch.bfloat16]
    assert cuda[:, :, :, :before].count_nonzero() == cuda[:, :, :, before + length :].count_nonzero() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_that_ends_with_gelu_is_one_followed_by_it(dtype):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape, device="cuda").to(dtype) for shape in ((2, 9, 64), (256, 64), (256,)))
    expected = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    with torch.no_grad():
        assert distances([linear_gelu(x, weight, bias)], [expected]) < ON_GPU[torch.bfloat16]
    assert distances([linear_gelu(x, weight, bias.float())], [expected]) < ON_GPU[torch.bfloat16]
