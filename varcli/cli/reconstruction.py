"""`varcli eval --tokenizer`: what a tokenizer changes in images, and how it uses its codebook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from varcli.cli import console, formats
from varcli.errors import ConfigError

# unit, and which direction is better, of every number by name without the network's
_METRICS = {
    "rfid": ("", "lower"),
    "rfd": ("", "lower"),
    "rkid": ("", "lower"),
    "psnr": ("dB", "higher"),
    "psnr_of_mean_error": ("dB", "higher"),
    "ssim": ("", "higher"),
    "lpips": ("", "lower"),
    "lite0_distance": ("", "lower"),
    "codebook_used": ("share", "higher"),
    "perplexity": ("codes", "higher"),
}


def evaluate_tokenizer(tokenizer: str, images: Path, *, as_json: bool, **settings: Any) -> None:
    """Evaluate and print. settings: fields of ReconstructionConfig."""
    from varcli.distributed import join_world
    from varcli.metrics.reconstruct import ReconstructionConfig, evaluate_reconstruction

    with join_world(settings["device"]) as (world, _):
        if world.size > 1:
            raise ConfigError(
                f"a tokenizer is evaluated by one process, but torchrun started {world.size}",
                "start it without torchrun",
            )
        result = evaluate_reconstruction(
            tokenizer, images, ReconstructionConfig(**settings), on_step=console.progress("reconstructing")
        )
    if as_json:
        console.json_result(result.to_json())
    else:
        show(result)


def show(result: Any) -> None:
    """Print a ReconstructionResult for people: the numbers, then each scale, then what they stand for."""
    network = result.features["network"]
    rows = []
    for name, value in result.metrics.items():
        unit, better = _METRICS[name.removesuffix(f"_{network}")]
        rows.append((name, formats.number(value), unit, better))
    console.table(("metric", "value", "unit", "better"), rows)
    console.result("")
    console.table(
        ("scale", "tokens", "codes used", "at most", "perplexity"),
        [
            (
                f"{scale.side} x {scale.side}",
                scale.tokens,
                f"{scale.codebook_used:.1%}",
                f"{scale.codebook_reachable:.1%}",
                f"{scale.perplexity:.1f}",
            )
            for scale in result.scales
        ],
    )
    made = result.tokenizer
    console.result("")
    console.result(f"images:    {formats.images(result.images)}")
    console.result(f"reference: {result.measured_against}")
    console.result(f"tokenizer: {made['path']} ({made['fingerprint']})")
    bits = (
        f"{made['bits_per_pixel']:.3f} bits a pixel, {made['compression']:.0f} times fewer than 24"
        if made["compression"]
        else "0 bits a pixel"
    )
    console.result(f"codes:     {made['tokens_per_image']} of {made['vocab_size']:,} an image: {bits}")
    console.result(f"features:  {network}, weights {result.features['weights_sha256'][:12]}")
    if result.num_exact and "psnr" in result.metrics:
        console.note(f"{result.num_exact:,} images came back without any error; psnr is the mean over the others")
    for name, reason in result.skipped.items():
        console.note(f"skipped {name}: {reason}")
    for warning in result.warnings:
        console.note(f"warning: {warning}")
