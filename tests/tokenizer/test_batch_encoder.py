"""A fast encoder gives the codes of float32 but for a few, and says how many; float32 itself is the tokenizer's own."""

from __future__ import annotations

import pytest
import torch

from varcli.tokenizer import TokenizerConfig
from varcli.tokenizer.agreement import ENOUGH, measure_agreement
from varcli.tokenizer.batch_encoder import BatchEncoder, _FastPath, default_batch_size


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_float32_is_what_the_tokenizer_encodes(tiny_tokenizer, images):
    expected = tiny_tokenizer.encode(images.float() / 127.5 - 1)
    encoder = BatchEncoder(tiny_tokenizer, torch.float32, 8)
    assert torch.equal(encoder.encode(images), expected)
    assert torch.equal(encoder.begin(images).wait(), expected)


@pytest.mark.parametrize(("side", "expected"), [(256, 128), (512, 32), (1024, 8), (64, 256)])
def test_batches_on_cuda_keep_indices_short(side, expected):
    config = TokenizerConfig.for_side(side)
    config = config if side in (64, 256) else config.at_size(side)
    assert default_batch_size(config, torch.device("cuda")) == expected
    assert expected * config.width * side**2 < 2**31
    assert default_batch_size(config, torch.device("cpu")) == 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_images_codes_do_not_depend_on_the_batch_and_the_tokenizer_stays_as_it_was(tiny_tokenizer, images, dtype):
    layout = tiny_tokenizer.encoder.conv_in.weight.stride()
    encoder = BatchEncoder(tiny_tokenizer, dtype, 5)
    together = encoder.encode(images)
    alone = torch.cat([encoder.encode(image[None]) for image in images])
    assert torch.equal(alone, together) and together.shape == (5, 21) and together.dtype == torch.int64
    assert tiny_tokenizer.encoder.conv_in.weight.stride() == layout


def test_channels_last_alone_changes_no_code(tiny_tokenizer, images):
    # sums of a convolution come in another order, far below what moves a vector to another code
    fast = _FastPath(tiny_tokenizer, torch.channels_last)
    with torch.no_grad():
        assert torch.equal(fast(images), tiny_tokenizer.encode(images.float() / 127.5 - 1))
    assert fast.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_float32_agrees_with_itself_on_everything(tiny_tokenizer, images):
    agreement = measure_agreement(BatchEncoder(tiny_tokenizer, torch.float32, 2), [images[:3], images[3:]])
    assert (agreement.images, agreement.tokens, agreement.by_scale) == (5, 1.0, (1.0, 1.0, 1.0))
    assert agreement.psnr == agreement.psnr_fp32 and agreement.is_enough
    assert measure_agreement(BatchEncoder(tiny_tokenizer, torch.float32, 2), []) is None


def test_agreement_is_the_share_of_equal_tokens(tiny_tokenizer, images):
    encoder = BatchEncoder(tiny_tokenizer, torch.bfloat16, 5)
    same = encoder.encode(images) == tiny_tokenizer.encode(images.float() / 127.5 - 1)
    agreement = measure_agreement(encoder, [images])
    assert agreement.tokens == pytest.approx(float(same.float().mean()))
    assert agreement.by_scale == pytest.approx([float(part.float().mean()) for part in same.split((1, 4, 16), dim=1)])
    assert agreement.is_enough == (agreement.tokens >= ENOUGH)


def test_a_compiler_that_fails_is_left_out_unless_it_was_asked_for(tiny_tokenizer, images, monkeypatch):
    def fail(module, **options):
        def run(*arguments):
            raise RuntimeError("no compiler here\nmore")

        return run

    monkeypatch.setattr(torch, "compile", fail)
    told: list[str] = []
    encoder = BatchEncoder(tiny_tokenizer, torch.bfloat16, 5, True, told.append)
    expected = BatchEncoder(tiny_tokenizer, torch.bfloat16, 5).encode(images)
    assert torch.equal(encoder.encode(images[:2]), expected[:2]) and torch.equal(encoder.encode(images), expected)
    assert told == ["going without torch.compile: no compiler here"] and not encoder.is_compiled
    with pytest.raises(RuntimeError, match="no compiler"):
        BatchEncoder(tiny_tokenizer, torch.bfloat16, 5, True).encode(images)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_codes_on_a_gpu_come_back_by_themselves(tiny_tokenizer, images, dtype):
    model = tiny_tokenizer.cuda()
    encoder = BatchEncoder(model, dtype, 4, is_compiled=True)
    pinned = images.pin_memory()
    arrived = [encoder.begin(part).wait() for part in pinned.split(4)]
    assert all(codes.device.type == "cpu" for codes in arrived)
    assert torch.equal(torch.cat(arrived), torch.cat([encoder.encode(part).cpu() for part in images.split(4)]))
    assert measure_agreement(encoder, [images]).tokens > 0.8
