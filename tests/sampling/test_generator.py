"""Laws of the generator's ways to be fast and small: half weights, compiled steps, fewer rows, smaller batches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from varcli.errors import ArtifactError, ConfigError, MemoryLimitError, NumericError
from varcli.sampling import Generator, SampleConfig
from varcli.sampling.memory import choose_batch_size, choose_decode_chunk, image_bytes
from varcli.sampling.walk import walk_steps
from varcli.tokenizer import TokenizerConfig
from varcli.tokenizer.store import save_tokenizer
from varcli.transformer import TransformerConfig


@pytest.fixture
def generator(tiny_tokenizer, tiny_transformer):
    torch.manual_seed(2)
    for parameter in tiny_transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Generator(tiny_tokenizer, tiny_transformer.requires_grad_(False), ("apple", "boat", "cat"))


def logits_along(generator: Generator, config: SampleConfig, codes: list[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """Walk with given codes; return each step's logits, wanted and unwanted."""
    seen = []

    def choose(step: int, wanted_BlV: Tensor, unwanted_BlV: Tensor | None, strength: float) -> Tensor:
        seen.append((wanted_BlV, unwanted_BlV))
        return generator.order.lookup(codes[step])

    labels_B = torch.tensor([0, 2])
    list(walk_steps(generator.transformer, generator.order, labels_B, choose, config, generator.dtype(config)))
    return seen


@pytest.fixture
def codes():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(16, (2, length), generator=generator) for length in (1, 4, 16)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_kept_in_half_precision_give_what_autocast_gives_bit_for_bit(generator, codes, dtype):
    precision = str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
    expected = logits_along(generator, SampleConfig(precision=precision), codes)
    half = Generator(generator.tokenizer, copy.deepcopy(generator.transformer))
    half.transformer.keep_products_in(dtype)
    for (wanted, unwanted), (found, other) in zip(expected, logits_along(half, SampleConfig(), codes), strict=True):
        assert found.dtype == dtype and torch.equal(found, wanted)
        assert (unwanted is None) == (other is None) and (other is None or torch.equal(other, unwanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_decoder_kept_in_half_precision_gives_what_autocast_gives_bit_for_bit(generator, dtype, tmp_path):
    generator.transformer.keep_products_in(dtype)
    f_hat = torch.randn(2, *generator.order.start(1, generator.device).shape[1:])
    expected = generator.decode(f_hat)
    generator.tokenizer.keep_decoder_in(dtype)
    assert torch.equal(generator.decode(f_hat), expected)
    assert {parameter.dtype for parameter in generator.tokenizer.encoder.parameters()} == {torch.float32}
    with pytest.raises(ConfigError, match="no fingerprint"):
        generator.tokenizer.fingerprint()
    for stored in (None, torch.float16):
        with pytest.raises(ConfigError, match="is not saved"):
            save_tokenizer(tmp_path / "tokenizer", generator.tokenizer, dtype=stored)
    assert not (tmp_path / "tokenizer").exists()
    assert generator.tokenizer.decode(f_hat).shape == (2, 3, 32, 32)  # outside of autocast, too


def test_a_loaded_model_decodes_in_its_precision_and_knows_its_tokenizers_fingerprint():
    whole, half = (Generator.load("emoji64", "cpu", precision) for precision in ("fp32", "bf16"))
    assert half.tokenizer.decoder.conv_out.weight.dtype == torch.bfloat16
    assert half.tokenizer_fingerprint == whole.tokenizer_fingerprint == whole.tokenizer.fingerprint()


@pytest.mark.parametrize("classes", [["apple"], [1, 2, 3], "abc"])
def test_names_that_are_not_those_of_the_classes_are_refused(generator, classes):
    with pytest.raises(ArtifactError, match="the transformer has 3 classes"):
        Generator(generator.tokenizer, generator.transformer, classes)


def test_a_model_in_half_precision_samples_in_that_alone(generator):
    generator.transformer.keep_products_in(torch.bfloat16)
    with pytest.raises(ConfigError, match="loaded in bf16, but precision is fp32"):
        generator.sample([0], precision="fp32")
    assert torch.equal(generator.sample([0], precision="bf16"), generator.sample([0]))


def test_after_the_end_of_guidance_the_rows_of_no_class_are_left_out_and_the_rest_is_the_same(generator, codes):
    whole = logits_along(generator, SampleConfig(cfg=2.0, cfg_schedule="constant"), codes)
    ended = logits_along(generator, SampleConfig(cfg=2.0, cfg_schedule="constant", cfg_interval=(0, 0.5)), codes)
    assert [unwanted is None for _, unwanted in whole] == [False, False, False]
    assert [unwanted is None for _, unwanted in ended] == [False, False, True]
    for (expected, _), (found, _) in zip(whole, ended, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_guidance_is_that_of_the_schedule_inside_the_interval_and_none_outside():
    config = SampleConfig(cfg=3.0, cfg_interval=[0.25, 0.75])
    assert config.guidance(5) == [0.0, 0.75, 1.5, 2.25, 0.0]
    assert SampleConfig(cfg=3.0).guidance(1) == [0.0]
    for wrong in ((0.5, 0.2), (0, 2), (0.5,)):
        with pytest.raises(ConfigError, match="cfg_interval"):
            SampleConfig(cfg_interval=wrong)


def test_compiled_steps_are_two_graphs_a_half_and_give_the_same_pictures(generator):
    expected = generator.sample([0, 1, 2])
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    generator.compile(backend="aot_eager")
    found = generator.sample([0, 1, 2])
    # before and after attention, each for one token and for more, however many blocks and steps; and the decoder
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 5
    assert (found.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_a_batch_that_does_not_fit_is_halved_and_the_pictures_stay(generator, monkeypatch, error):
    expected = generator.sample([0, 1, 2, 0, 1])
    sizes, generate = [], generator.generate

    def full(labels_B, *rest):
        sizes.append(len(labels_B))
        if len(labels_B) > 2:
            raise error("out of memory")  # torch's own on CUDA, elsewhere one that only says so
        return generate(labels_B, *rest)

    monkeypatch.setattr(generator, "generate", full)
    assert torch.equal(generator.sample([0, 1, 2, 0, 1]), expected)
    assert sizes == [5, 2, 2, 1]
    assert generator.batch_size(SampleConfig()) == 2  # remembered
    with pytest.raises(MemoryLimitError, match="too little memory on cpu to draw 3 images at once"):
        generator.sample([0, 1, 2], batch_size=3)


class OneBuffer:
    """Draws as `Engine` does: into one buffer, which the next batch overwrites."""

    def __init__(self, images: Tensor, bad_batch: int | None = None) -> None:
        self.images, self.bad_batch, self.started = images, bad_batch, 0
        self.buffer, self.is_bad = torch.zeros_like(images[:2]), torch.zeros((), dtype=torch.int32)

    def start(self, seed, classes, indices):
        first = 2 * self.started
        self.buffer[: len(classes)] = self.images[first : first + len(classes)]
        self.is_bad.fill_(self.started == self.bad_batch)
        self.started += 1
        return self.buffer[: len(classes)], self.is_bad


def test_a_batch_is_handed_over_while_the_next_is_drawn_into_the_same_buffer(generator, monkeypatch):
    expected = generator.sample([0, 1, 2, 0, 1])
    engine = OneBuffer(expected)
    monkeypatch.setattr(generator, "_engine_for", lambda *rest, **named: engine)
    started, found = [], []
    for images in generator.batches([0, 1, 2, 0, 1], batch_size=2):
        started.append(engine.started)
        found.append(images)
    assert started == [2, 3, 3]
    assert torch.equal(torch.cat(found), expected)


def test_a_bad_batch_is_told_of_after_those_before_it(generator, monkeypatch):
    engine = OneBuffer(generator.sample([0, 1, 2, 0, 1]), bad_batch=1)
    monkeypatch.setattr(generator, "_engine_for", lambda *rest, **named: engine)
    batches = generator.batches([0, 1, 2, 0, 1], batch_size=2)
    assert len(next(batches)) == 2
    with pytest.raises(NumericError, match="not finite"):
        next(batches)


def test_a_batch_that_does_not_fit_after_others_is_drawn_in_smaller_ones_and_none_twice(generator, monkeypatch):
    expected, generate, calls = generator.sample([0, 1, 2, 0, 1, 2]), generator.generate, []

    def full(labels_B, *rest):
        calls.append(len(labels_B))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(labels_B, *rest)

    generator._batch_sizes[True, False, torch.float32] = 2
    monkeypatch.setattr(generator, "generate", full)
    found = list(generator.batches([0, 1, 2, 0, 1, 2]))
    assert [len(images) for images in found] == [2, 1, 1, 1, 1] and calls == [2, 2, 1, 1, 1, 1]
    assert torch.equal(torch.cat(found), expected)


def test_memory_of_a_batch_is_what_its_tensors_add_up_to(monkeypatch):
    """d30 at 256 px: keys and values of 64 guided images in bf16 are 11.8 GiB, the last step's activations 2.4 GiB."""
    config = TransformerConfig.from_depth(30)
    image = image_bytes(config, torch.bfloat16, is_guided=True)
    assert 64 * image / 2**30 == pytest.approx(14.6, abs=1.5)
    assert image_bytes(config, torch.bfloat16, is_guided=True, is_smooth=True) > image
    cpu = torch.device("cpu")
    assert choose_batch_size(config, image, cpu) == 64
    assert choose_decode_chunk(24, TokenizerConfig(), torch.float32, cpu) == 1
    gpu = torch.device("cuda")  # of 24 GiB, 4.5 of them weights
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (19.5 * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 4.5 * 2**30)
    assert choose_batch_size(config, image, gpu) == 64
    assert choose_decode_chunk(64, TokenizerConfig(), torch.bfloat16, gpu) == 32
    assert choose_decode_chunk(67, TokenizerConfig(), torch.bfloat16, gpu) == 32


@torch.no_grad()
def test_a_model_in_fp8_samples_in_bf16_and_fp8_alone(generator, codes):
    expected = logits_along(generator, SampleConfig(precision="bf16"), codes)
    generator.transformer.keep_in_fp8()
    found = logits_along(generator, SampleConfig(), codes)
    for (wanted, _), (other, _) in zip(expected, found, strict=True):
        assert other.dtype == torch.bfloat16
        assert 0 < (other - wanted).float().norm() < 0.3 * wanted.float().norm()
    with pytest.raises(ConfigError, match="loaded in bf16, but precision is fp16"):
        generator.sample([0], precision="fp16")
    whole = generator.sample([0, 1, 2], batch_size=3)
    assert whole.shape == (3, 3, 32, 32) and torch.equal(whole, generator.sample([0, 1, 2]))


@pytest.mark.gpu
def test_a_captured_batch_in_fp8_gives_the_pictures_of_an_uncaptured_one(generator):
    generator.transformer.keep_in_fp8()
    model = Generator(generator.tokenizer.cuda(), generator.transformer.cuda())
    assert model.transformer.kernels == "triton"
    expected = model.sample([0] * 24, range(24), batch_size=8)
    assert model._engine is None  # three batches are too few to be captured
    found = model.sample([0] * 32, range(32), batch_size=8)
    assert model._engine is not None
    assert ((found[:24] == expected).flatten(1).float().mean(dim=1) > 0.99).float().mean().item() > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("smooth", [False, True])
def test_a_captured_batch_gives_the_pictures_of_an_uncaptured_one(generator, smooth):
    model = Generator(generator.tokenizer.cuda(), generator.transformer.cuda())
    classes = [0, 1, 2] * 13

    def draw(start: int, end: int) -> torch.Tensor:
        return model.sample(classes[start:end], range(start, end), batch_size=8, smooth=smooth)

    # three batches, one of another size, one more: too few of one size in a row to be captured
    first, short, last = draw(0, 24), draw(32, 39), draw(24, 32)
    assert model._engine is None
    found = draw(0, 39)  # five batches, the last one short: captured
    assert model._engine is not None
    assert torch.equal(found[:32], torch.cat((first, last)))
    # products of another batch size round differently, which moves pixels a little and may draw another code
    distances = (found[32:].float() - short.float()).abs().flatten(1).mean(dim=1)
    assert (distances < 3).float().mean().item() > 0.5, distances
    again = model.sample(classes[8:16], range(8, 16), batch_size=8, smooth=smooth)  # another replay of the same graph
    assert torch.equal(again, found[8:16])
    other = model.sample(classes[:8], range(8), batch_size=8, smooth=smooth, seed=1)
    assert not torch.equal(other, found[:8])
