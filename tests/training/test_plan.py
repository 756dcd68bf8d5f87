"""What is worked out before a run starts: how a batch is cut, and what to change when memory runs out."""

from __future__ import annotations

import pytest
import torch

from varcli.distributed import World
from varcli.errors import ConfigError
from varcli.kernels import KERNELS
from varcli.scales import PatchNums
from varcli.training import plan
from varcli.training.objective import measure
from varcli.training.plan import activation_bytes, choose_mode, fit_micro_batch, memory_hint
from varcli.transformer import Transformer, TransformerConfig


@pytest.mark.parametrize(
    ("batch_size", "fitting", "expected"),
    [(768, 1000, 768), (768, 400, 384), (768, 250, 192), (768, 0.5, 1), (7, 5, 5), (1, 9, 1)],
)
def test_a_batch_is_cut_into_the_largest_equal_pieces_that_fit(monkeypatch, batch_size, fitting, expected):
    monkeypatch.setattr(plan, "free_bytes", lambda device: 100 + fitting * 10 / 0.85 + 1e-6)
    assert fit_micro_batch(batch_size, 10, 85, torch.device("cpu")) == expected


def kept_bytes(config: TransformerConfig, dtype: torch.dtype, kernels: str, batch: int, fp8: bool = False) -> int:
    """What autograd keeps of a forward pass up to the loss, weights left out."""
    torch.manual_seed(0)
    model = Transformer(config).train()
    model.kernels = kernels
    if fp8:
        model.train_in_fp8()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = []
    codes, labels = torch.zeros(batch, config.seq_len, dtype=torch.long), torch.zeros(batch, dtype=torch.long)
    x = torch.randn(batch, config.seq_len - config.step_lengths[0], config.code_channels)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        measure(model, labels, x, codes, 0.0, config.step_lengths[-1])
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for place, size in storages.items() if place not in weights)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mlp_ratio": 2.5, "dropout": 0.1, "shared_adaln": True},
        {"num_heads": 8},  # 24 channels wide, which attention in Triton does not serve
    ],
    ids=str,
)
def test_activations_are_what_autograd_keeps(kernels, dtype, changes):
    changes = {"mlp_ratio": 4.0, "vocab_size": 64, **changes}
    scales = PatchNums((1, 2, 3, 4, 5, 6, 8))
    config = TransformerConfig.from_depth(3, **changes, step_lengths=scales.step_lengths, num_classes=3)
    image = kept_bytes(config, dtype, kernels, 3) - kept_bytes(config, dtype, kernels, 2)
    per_token = (
        (4, 12) if kernels == "torch" else (0, 0)
    )  # of a code: log-softmax alone, and with what the backward adds
    logits, whole = (64 * config.seq_len * count for count in per_token)
    estimate = activation_bytes(config, dtype, False, kernels) - whole
    assert estimate == pytest.approx(image - logits, rel=0.05)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_an_image_in_fp8_keeps_what_it_keeps_in_bf16(kernels):
    config = TransformerConfig.from_depth(3, vocab_size=64, step_lengths=(1, 4, 9, 16), num_classes=3)
    bf16, fp8 = (
        kept_bytes(config, torch.bfloat16, kernels, 3, fp8) - kept_bytes(config, torch.bfloat16, kernels, 2, fp8)
        for fp8 in (False, True)
    )
    assert fp8 == pytest.approx(bf16, rel=0.01)


def test_the_flag_to_change_is_named_and_fits_what_was_tried():
    assert "--set micro_batch_size=24" in memory_hint(48, "bf16")
    assert "--precision" not in memory_hint(48, "bf16")
    assert memory_hint(3, "fp32").startswith("--set micro_batch_size=1 ")
    assert "--precision bf16" in memory_hint(1, "fp32")
    assert "smaller --depth" in memory_hint(1, "bf16")


def test_shards_are_taken_where_a_copy_does_not_fit_and_the_optimizer_can_do_with_them(monkeypatch):
    monkeypatch.setattr(plan, "free_bytes", lambda device: 1000)
    cpu = torch.device("cpu")
    assert choose_mode("auto", "adamw", 800, cpu, World()) == "ddp"
    assert choose_mode("auto", "adamw", 900, cpu, World()) == "fsdp"
    assert choose_mode("auto", "muon", 900, cpu, World()) == "ddp"
    assert choose_mode("hsdp", "adamw", 1, cpu, World()) == "hsdp"
    with pytest.raises(ConfigError, match="muon needs whole matrices"):
        choose_mode("fsdp", "muon", 1, cpu, World(0, 2))
