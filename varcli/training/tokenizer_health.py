"""Warnings of a codebook that dies while a tokenizer is trained, and the settings that may save it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from varcli.tokenizer.health import find_collapse
from varcli.training.tokenizer_settings import TokenizerTrainConfig

_JUDGED_SHARE, _JUDGED_STEPS = 0.1, 500  # of the run, and steps, before which codes may still be finding their places


def collapse_warnings(config: TokenizerTrainConfig, step: int, validation: Mapping[str, Any]) -> dict[str, str]:
    """Say what has collapsed after `step` steps, and what to change: warnings by what they are about.

    validation: of `evaluate_tokenizer`. Nothing is judged in the first tenth of the run and the first 500 steps, nor what
    too few images were measured for (`find_collapse`).
    """
    if step < max(_JUDGED_SHARE * config.steps, _JUDGED_STEPS):
        return {}
    tokenizer = config.tokenizer
    found = find_collapse(validation, tokenizer.scales, tokenizer.vocab_size, int(validation["images"]))
    advice = advise(config)
    return {"codebook" if scale is None else f"scale {scale}": f"{text}; {advice}" for scale, text in found.items()}


def advise(config: TokenizerTrainConfig) -> str:
    """Say, by what the settings are now, which to change against collapse, the likeliest help first."""
    every = max(config.restart_every // 2, 10) if config.restart_every else 100
    settings = {
        "restart_every": every,
        "quantizer_weight": 2 * config.quantizer_weight or 1.0,
        "learning_rate": config.learning_rate / 2,
        "scale_dropout": min(config.scale_dropout + 0.1, 1.0),
    }
    listed = ", ".join(f"--set {name}={value:g}" for name, value in settings.items() if value != getattr(config, name))
    return f"if it does not recover, try in a new run, one at a time: {listed}"
