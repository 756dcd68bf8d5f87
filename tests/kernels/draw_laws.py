"""Laws of the draw kernel, on a GPU or in Triton's interpreter: run as a program with TRITON_INTERPRET=1 for the latter,
since that must be set before triton is imported."""

from __future__ import annotations

import math

import torch

from varcli.kernels.draw_triton import draw_codes
from varcli.sampling.logits import draw, guide, truncate
from varcli.sampling.noise import STREAM_CODES, KeyedNoise, salt

CASES = [
    # codes, tokens, images, top_k, top_p, guidance, whether many logits tie
    (100, 2, 4, 20, 0.9, 1.5, False),
    (100, 2, 4, 20, 0.9, 1.0, True),
    (64, 2, 3, None, 0.7, 0.5, True),
    (37, 4, 2, 5, None, None, True),
    (4096, 2, 2, 900, 0.96, 1.5, False),
    (50, 1, 2, None, None, 0.3, False),
    (16, 5, 3, 1, 0.5, 2.0, False),
]
MANY_CODES = (33_000, 2, 2, 900, 0.96, 1.5, False)  # whose counts take 64 bits; the interpreter would take minutes


def check_codes_are_those_of_torch(device: torch.device) -> None:
    cases = CASES + ([MANY_CODES] if device.type == "cuda" else [])
    for number, (vocab_size, length, batch, top_k, top_p, strength, are_tied) in enumerate(cases):
        generator = torch.Generator().manual_seed(number)
        wanted, unwanted = (3 * torch.randn(2, batch, length, vocab_size, generator=generator)).to(device)
        if are_tied:
            wanted, unwanted = wanted.round(), unwanted.round()
        noise = KeyedNoise(3, range(batch), range(batch), device)
        is_bad = torch.zeros((), dtype=torch.int32, device=device)
        given = None if strength is None else unwanted
        found = draw_codes(wanted, given, noise.keys_B, salt(2, STREAM_CODES), strength or 0.0, top_k, top_p, is_bad)
        kept = truncate(guide(wanted, given, strength or 0.0), top_k, top_p)
        expected = draw(kept, noise(2, STREAM_CODES, length, vocab_size))
        differing = (found != expected).float().mean().item()
        # two codes may tie within rounding where logarithms are computed otherwise
        assert differing <= (0 if device.type == "cpu" else 0.01), (cases[number], differing)
        assert kept.gather(-1, found.unsqueeze(-1)).isfinite().all()
        assert not is_bad.item()


def check_draws_follow_the_truncated_distribution(device: torch.device) -> None:
    count = 20_000
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -8.0], device=device).expand(count, 1, -1)
    keys = KeyedNoise(5, range(count), [0] * count, device).keys_B, salt(0, STREAM_CODES)
    is_bad = torch.zeros((), dtype=torch.int32, device=device)
    counts = draw_codes(logits, None, *keys, 0.0, 4, 0.9, is_bad).flatten().cpu().bincount(minlength=6)
    expected = truncate(logits[:1], 4, 0.9).flatten().softmax(0).cpu() * count
    assert counts[expected == 0].sum() == 0
    chi_square = ((counts - expected)[expected > 0].square() / expected[expected > 0]).sum()
    assert chi_square < 20, chi_square  # 3 degrees of freedom: exceeded once in 6,000


def check_logits_that_are_no_numbers_are_told_and_touch_no_other_row(device: torch.device) -> None:
    logits = torch.randn(3, 2, 10, generator=torch.Generator().manual_seed(0)).to(device)
    noise = KeyedNoise(0, [0, 1, 2], [0, 0, 0], device).keys_B, salt(0, STREAM_CODES)
    is_bad = torch.zeros((), dtype=torch.int32, device=device)
    expected = draw_codes(logits, None, *noise, 0.0, 5, 0.9, is_bad)
    for wrong in (math.nan, math.inf, -math.inf):
        spoilt = logits.clone()
        spoilt[1, 0, 3] = wrong
        is_bad.zero_()
        found = draw_codes(spoilt, None, *noise, 0.0, 5, 0.9, is_bad)
        assert is_bad.item() == 1 and found[1, 0] == 0
        found[1, 0] = expected[1, 0]
        assert torch.equal(found, expected)


LAWS = [value for name, value in list(globals().items()) if name.startswith("check_")]

if __name__ == "__main__":
    # the interpreter takes a tenth of a second a row: 20,000 draws are for a GPU
    for law in (check_codes_are_those_of_torch, check_logits_that_are_no_numbers_are_told_and_touch_no_other_row):
        law(torch.device("cpu"))
