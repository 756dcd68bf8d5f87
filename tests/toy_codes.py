"""Codes caches without images, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path

import torch

from varcli.artifacts.manifest import write_manifest
from varcli.artifacts.write import write_tensors, write_text
from varcli.tokenizer import VQVAE

CLASSES = ("apple", "boat", "cat")


def write_codes(
    folder: Path,
    tokenizer: VQVAE,
    generator: torch.Generator,
    images: dict[str, int] | None = None,
    views: int = 2,
) -> Path:
    """Write a whole cache of learnable random codes: each class has its own range, with some noise."""
    folder.mkdir()
    config, splits, files = tokenizer.config, {}, []
    for split, count in (images or {"train": 40, "val": 12}).items():
        num_views = views if split == "train" else 1
        labels = torch.arange(count).repeat_interleave(num_views) % len(CLASSES)
        noise = torch.randint(0, 4, (count * num_views, config.scales.seq_len), generator=generator)
        tensors = {
            "codes": (labels.unsqueeze(1) * 4 + noise).to(torch.uint16),
            "labels": labels.to(torch.int32),
            "sources": torch.arange(count, dtype=torch.int32).repeat_interleave(num_views),
        }
        write_tensors(folder / f"{split}-00000.safetensors", tensors)
        write_text(folder / f"{split}-images.txt", "".join(f"{index}.png\n" for index in range(count)))
        files += [f"{split}-00000.safetensors", f"{split}-images.txt"]
        splits[split] = {"shards": [files[-2]], "rows": count * num_views, "images": count, "views": num_views}
    info = {
        "tokenizer": tokenizer.fingerprint(),
        "patch_nums": list(config.patch_nums),
        "vocab_size": config.vocab_size,
        "classes": list(CLASSES),
        "splits": splits,
    }
    write_manifest(folder, "codes", info, files=files)
    return folder
