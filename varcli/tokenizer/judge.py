"""How good a tokenizer is: distances between images and their reconstructions, and what each scale adds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from varcli.tokenizer.health import codebook_report, count_codes
from varcli.tokenizer.vqvae import VQVAE

# decoded at a time: the released architecture's tensors take some 3 GiB then, whatever the side (in float32, computed)
_CHUNK_PIXELS = 2**20


def peak_signal_to_noise(squared_errors: Tensor, peak: float) -> Tensor:
    """Return 10 log10(peak^2 / e) in dB for mean squared errors of any shape; infinite where they are 0.

    peak: largest difference that two pixels can have, 255 for 8 bits and 2 in [-1, 1].
    """
    return 10 * torch.log10(peak**2 / squared_errors)


def judged_at_once(side: int) -> int:
    """Return how many images of `side` px are judged at a time: 128 at most, 16 at 256 px, 4 at 512 px."""
    return max(1, min(128, _CHUNK_PIXELS // side**2))


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: VQVAE, images_u8: Tensor, perceptual: nn.Module | None, batch_size: int | None = None
) -> dict[str, float]:
    """Measure reconstructions of uint8 images (N, 3, H, W): PSNR in dB over [0, 255], distances, codebook usage.

    batch_size: images judged at a time, None chooses by their side (`judged_at_once`).
    """
    config = tokenizer.config
    counts = torch.zeros(config.scales.num_scales, config.vocab_size, device=images_u8.device)
    squared, absolute, distance = 0.0, 0.0, 0.0
    psnr_sum = 0.0
    for chunk in images_u8.split(batch_size or judged_at_once(images_u8.shape[-1])):
        images = chunk.float() / 127.5 - 1
        codes = tokenizer.encode(images)
        counts += count_codes(codes, config.scales, config.vocab_size)
        reconstructions = tokenizer.decode(tokenizer.quantizer.embed(codes))
        errors = (reconstructions - images).square().mean(dim=(1, 2, 3))
        psnr_sum += float(peak_signal_to_noise(errors.clamp(min=1e-10), peak=2).sum())
        squared += float(errors.sum())
        absolute += float((reconstructions - images).abs().mean(dim=(1, 2, 3)).sum())
        if perceptual is not None:
            distance += float(perceptual(images, reconstructions)) * len(chunk)
    count = len(images_u8)
    report = {"psnr": psnr_sum / count, "mse": squared / count, "l1": absolute / count, "images": count}
    if perceptual is not None:
        report["perceptual"] = distance / count
    return {**report, **codebook_report(counts)}


@torch.no_grad()
def scale_strip(tokenizer: VQVAE, images_u8: Tensor) -> Tensor:
    """Show what each scale adds: uint8 (1 + K, N, 3, H, W), the images, then their decode after 1, 2, ... K scales."""
    strips = []
    for chunk in images_u8.split(judged_at_once(images_u8.shape[-1])):
        codes = tokenizer.encode(chunk.float() / 127.5 - 1)
        rows = [chunk]
        for f_hat, _ in tokenizer.quantizer.running_f_hat(codes):
            rows.append(((tokenizer.decode(f_hat) + 1) * 127.5).round().to(torch.uint8))
        strips.append(torch.stack(rows))
    return torch.cat(strips, dim=1)
