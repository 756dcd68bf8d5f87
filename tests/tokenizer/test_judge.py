"""How tokenizers are judged: the same numbers whatever is decoded at a time, and never too much at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from varcli.tokenizer.judge import evaluate_tokenizer, judged_at_once, scale_strip


class Recorder(nn.Module):
    """Stands in for a perceptual network; remembers how many pixels it was shown at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels: list[int] = []

    def forward(self, images, reconstructions):
        self.pixels.append(images[:, 0].numel())
        return (images - reconstructions).abs().mean()


@pytest.mark.parametrize("side, most", [(32, 128), (64, 128), (128, 64), (256, 16), (512, 4), (2048, 1)])
def test_the_larger_the_images_the_fewer_are_judged_at_a_time(side, most):
    assert judged_at_once(side) == most
    assert most == 1 or most * side**2 <= 2**20


def test_numbers_and_pictures_do_not_depend_on_what_is_judged_at_a_time(tiny_tokenizer, monkeypatch):
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole, strip = evaluate_tokenizer(tiny_tokenizer, images, Recorder()), scale_strip(tiny_tokenizer, images)
    monkeypatch.setattr("varcli.tokenizer.judge._CHUNK_PIXELS", 2 * 32**2)
    seen = Recorder()
    decoded = []
    decode = tiny_tokenizer.decode
    monkeypatch.setattr(tiny_tokenizer, "decode", lambda f_hat: decoded.append(len(f_hat)) or decode(f_hat))
    assert evaluate_tokenizer(tiny_tokenizer, images, seen) == pytest.approx(whole, rel=1e-5)
    assert seen.pixels == [2048, 2048, 2048, 1024]
    again = scale_strip(tiny_tokenizer, images)
    assert max(decoded) == 2
    assert again.shape == strip.shape == (4, 7, 3, 32, 32)
    assert (again.int() - strip.int()).abs().max() <= 1  # of rounding: sums of other batches round otherwise
