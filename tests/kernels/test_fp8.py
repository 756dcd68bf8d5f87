"""Products in FP8: rounded as worked out by hand, as near as three bits of mantissa allow, and row by row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from varcli.errors import ConfigError
from varcli.kernels.fp8 import fp8_product, require_fp8, round_rows, scaled_product

# an entry is off by up to 2^-4 of itself, 0.026 in the mean square; a product of two such matrices by sqrt(2) of that
CLOSE = 0.045


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def inputs(device: str = "cpu", tokens: int = 40, width: int = 128, out: int = 96) -> list[torch.Tensor]:
    """Features (2, tokens, width) and their gradient's future, a weight, and the gradient to the product."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, width, generator=generator).bfloat16()
    weight = 0.02 * torch.randn(out, width, generator=generator)
    grad = 1e-6 * torch.randn(2, tokens, out, generator=generator).bfloat16()
    return [x.to(device).requires_grad_(), weight.to(device).requires_grad_(), grad.to(device)]


def results(product, x, weight, grad) -> list[torch.Tensor]:
    y = product(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


def test_rows_are_rounded_as_worked_out_by_hand():
    # steps are 1/32 from 1/4 on, 1/8 from 1 on, 16 from 128 on; the second row is twice the first
    row = [448.0, 0.3, -1.07, 139.0]
    rounded, scales = round_rows(torch.tensor([row, [2 * value for value in row]]))
    assert rounded.dtype == torch.float8_e4m3fn and rounded.is_contiguous()
    assert scales.tolist() == [[1.0], [2.0]]
    assert rounded.float().tolist() == [[448.0, 0.3125, -1.125, 144.0]] * 2


def test_a_gradient_that_is_not_finite_makes_its_own_row_so_alone():
    x, weight, grad = inputs()
    grad[0, 3, 5], grad[1, 7, 2] = float("nan"), float("inf")
    is_finite = results(fp8_product, x, weight, grad)[1].isfinite()
    assert is_finite.sum(dim=(1, 2)).tolist() == [39 * 128, 39 * 128]
    assert not is_finite[0, 3].any() and not is_finite[1, 7].any()


def test_the_operator_keeps_torchs_rules():
    x, *_ = inputs()
    torch.library.opcheck(torch.ops.varcli.round_rows, (x[0].detach(),))


def test_rows_of_any_size_are_as_exact_and_zero_rows_stay_zero():
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    expected = x * torch.tensor([1e30, 1.0, 1e-25, 0.0])[:, None]
    rounded, scales = round_rows(expected.bfloat16())
    found = rounded.double() * scales
    assert not found[3].any() and (scales > 0).all()
    for row in range(3):
        assert distance(found[row], expected[row]) < CLOSE / 2**0.5


def test_what_is_not_finite_makes_its_row_so_and_no_other():
    x, weight, _ = inputs()
    with torch.no_grad():
        x[0, 3, 5], x[1, 7, 2] = float("nan"), float("inf")
        is_finite = fp8_product(x, weight).isfinite()
    assert is_finite.sum(dim=(1, 2)).tolist() == [39 * 96, 39 * 96]
    assert not is_finite[0, 3].any() and not is_finite[1, 7].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_near_those_of_bf16(dtype):
    x, weight, grad = inputs()
    weight = weight.detach().to(dtype).requires_grad_()
    found = results(fp8_product, x, weight, grad)
    expected = results(lambda x, weight: F.linear(x, weight.bfloat16()), x, weight, grad)
    for actual, other in zip(found, expected, strict=True):
        assert actual.dtype == other.dtype
    assert 0.02 < distance(found[0], expected[0]) < CLOSE
    assert 0.02 < distance(found[1], expected[1]) < CLOSE
    assert torch.equal(found[2], expected[2])


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_products_equal_eager_ones_and_autocast_changes_nothing(autocast):
    given = inputs()
    expected = results(fp8_product, *given)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        compiled = torch.compile(fp8_product, backend="aot_eager", fullgraph=True)
        for product in (fp8_product, compiled):
            assert all(torch.equal(*pair) for pair in zip(results(product, *given), expected, strict=True))


def test_a_frozen_weight_or_input_has_no_gradient():
    x, weight, grad = inputs()
    fp8_product(x, weight.detach()).backward(grad)
    assert x.grad is not None
    fp8_product(x.detach(), weight).backward(grad)
    assert weight.grad is not None


class Gpu:
    """What torch says of a GPU that is not there."""

    def __init__(self, monkeypatch, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")


def test_devices_without_fp8_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="the device is cpu"):
        require_fp8(torch.device("cpu"), torch.bfloat16)
    Gpu(monkeypatch, (8, 0))
    with pytest.raises(ConfigError, match="the device is Some GPU"):
        require_fp8(torch.device("cuda"), torch.bfloat16)
    Gpu(monkeypatch, (8, 9))
    require_fp8(torch.device("cuda"), torch.bfloat16, 1024, 4096)


def test_fp8_is_for_bf16_and_widths_that_its_kernels_can_do(monkeypatch):
    Gpu(monkeypatch, (9, 0))
    with pytest.raises(ConfigError, match="the precision is fp16"):
        require_fp8(torch.device("cuda"), torch.float16, 1024)
    with pytest.raises(ConfigError, match="multiples of 16, but they are 64, 150"):
        require_fp8(torch.device("cuda"), torch.bfloat16, 64, 150)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("tokens", "width", "out"), [(5, 64, 96), (680, 1024, 4096), (680, 4096, 1024)])
def test_products_on_a_gpu_equal_those_on_a_cpu(tokens, width, out, compiled):
    expected = results(fp8_product, *inputs("cpu", tokens, width, out))
    product = torch.compile(fp8_product, fullgraph=True) if compiled else fp8_product
    found = results(product, *inputs("cuda", tokens, width, out))
    # sums in another order and of fewer digits; a scale that differs in its last bit moves some entries by a step
    assert max(distance(*pair) for pair in zip([f.cpu() for f in found], expected, strict=True)) < 0.01


@pytest.mark.gpu
def test_the_gpus_product_is_that_of_the_rounded_numbers():
    x, weight, _ = inputs("cuda", 680, 1024, 4096)
    a, b = round_rows(x.detach().flatten(0, 1)), round_rows(weight.detach())
    expected = (a[0].double() * a[1]) @ (b[0].double() * b[1]).t()
    assert distance(scaled_product(*a, *b), expected) < 0.01
