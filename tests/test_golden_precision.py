"""On a GPU float32 computes what the reference computes; bfloat16 and float16 stay near it, on CPU and GPU."""

from __future__ import annotations

import pytest
import torch
from golden_files import FEATURES, assert_codes, assert_near, assert_stored, cases, parametrize, whole_tokenizers

from varcli.devices import PRECISIONS, autocast
from varcli.interop.official import load_tokenizer, load_transformer

# largest difference of a logit as a share of the largest logit; measured on a CPU: 0.014 and 0.0026
LOGITS = {"bf16": 4e-2, "fp16": 8e-3}
# largest difference as a share of the largest value, 0.041 measured; of a picture in [-1, 1] 0.075
HALF_FEATURES, HALF_PICTURE = 1e-1, 2e-1
gpu = pytest.param("cuda", marks=pytest.mark.gpu)
transformer_cases = pytest.mark.parametrize(**parametrize(cases("var", having="teacher_forcing.safetensors")))
tokenizer_cases = pytest.mark.parametrize(**parametrize([c for c in whole_tokenizers() if c.tensors("io")]))
# the full-size tokenizer takes a while in half precision without a GPU
small_cases = pytest.mark.parametrize(
    **parametrize([c for c in whole_tokenizers() if c.tensors("io") and c.config["ch"] < 100])
)


@pytest.fixture
def exact_float32():
    """Float32 products in full precision: TF32 would round to ten bits."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def logits_of(case, device: str, precision: str):
    golden = {name: tensor.to(device) for name, tensor in case.tensors("teacher_forcing").items()}
    model = load_transformer(case.weights(), **case.config).to(device)
    features = golden["var_input"].split(model.config.step_lengths[1:], dim=1)
    with autocast(torch.device(device), PRECISIONS[precision]):
        forced = model(golden["labels"], golden["var_input"])
        cache = model.start_cache(golden["labels"])
        cached = torch.cat([model.step(x_BlZ, cache) for x_BlZ in (None, *features)], dim=1)
    return forced.cpu(), cached.cpu()


@pytest.mark.gpu
@transformer_cases
@torch.no_grad()
def test_logits_on_a_gpu_equal_the_reference(case, exact_float32):
    for logits in logits_of(case, "cuda", "fp32"):
        assert_stored(case.tensors("teacher_forcing"), "logits", logits, FEATURES)


@pytest.mark.parametrize("device", ["cpu", gpu])
@pytest.mark.parametrize("precision", LOGITS)
@transformer_cases
@torch.no_grad()
def test_logits_in_half_precision_stay_near_the_reference(case, precision, device):
    for logits in logits_of(case, device, precision):
        assert_stored(case.tensors("teacher_forcing"), "logits", logits, LOGITS[precision])


@pytest.mark.gpu
@tokenizer_cases
@torch.no_grad()
def test_features_codes_and_pictures_on_a_gpu_equal_the_reference(case, exact_float32):
    io, tokenizer = case.tensors("io"), load_tokenizer(case.weights(), **case.config).to("cuda")
    features = tokenizer.features(io["image_u8"].cuda().float() / 255 * 2 - 1)
    assert_near(features.cpu(), io["f"], FEATURES)
    assert_codes(tokenizer.quantizer.encode(io["f"].cuda()).cpu(), io["idx"], io["idx_margin"])
    f_hat = tokenizer.quantizer.embed(io["idx"].cuda())
    assert_stored(
        io,
        "f_hat_all",
        torch.stack([f for f, _ in tokenizer.quantizer.running_f_hat(io["idx"].cuda())]).cpu(),
        FEATURES,
    )
    assert_near(tokenizer.quantizer.teacher_forcing_input(io["idx"].cuda()).cpu(), io["var_input"], FEATURES)
    assert_stored(io, "recon_last", tokenizer.decode(f_hat).cpu(), FEATURES)


@pytest.mark.parametrize("device", ["cpu", gpu])
@small_cases
@torch.no_grad()
def test_features_and_pictures_in_half_precision_stay_near_the_reference(case, device):
    io, tokenizer = case.tensors("io"), load_tokenizer(case.weights(), **case.config).to(device)
    with autocast(torch.device(device), torch.bfloat16):
        features = tokenizer.features(io["image_u8"].to(device).float() / 255 * 2 - 1)
        pictures = tokenizer.decode(tokenizer.quantizer.embed(io["idx"].to(device)))
    assert_near(features.float().cpu(), io["f"], HALF_FEATURES)
    assert_stored(io, "recon_last", pictures.float().cpu(), HALF_PICTURE)
