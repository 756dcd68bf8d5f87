"""Muon: steps of AdamW's size for matrices, AdamW for the rest, refusal of bad gradients, exact resume."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy_runs import TINY, StopAfter, losses, train

from varcli.artifacts.verify import read_tensors
from varcli.errors import ConfigError, InterruptedRun
from varcli.training import TrainConfig
from varcli.training.muon import build_optimizer
from varcli.training.optim import Updater
from varcli.training.schedules import Schedule
from varcli.transformer import Transformer


def make_updater(model: Transformer, name: str = "muon", **options) -> Updater:
    model.requires_grad_()
    schedule = Schedule(total_steps=99, learning_rate=1e-2, shape="constant")
    return Updater(build_optimizer(name, model, model.undecayed_parameters()), schedule, grad_clip=2.0, **options)


def take_step(model: Transformer, updater: Updater, step: int, factor: float = 1.0) -> dict:
    updater.begin(step)
    generator = torch.Generator().manual_seed(step)
    loss = model(torch.arange(3), torch.randn(3, 20, 8, generator=generator)).square().mean() * factor
    updater.backward(loss)
    return dict(updater.finish(loss.detach()))


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    return name.startswith("blocks.") and parameter.ndim == 2


def contents(model: Transformer, updater: Updater) -> dict[str, torch.Tensor]:
    moments = {
        f"{index}.{key}": value
        for index, state in enumerate(updater.optimizer.state.values())
        for key, value in state.items()
    }
    return {name: tensor.clone() for name, tensor in (*model.state_dict().items(), *moments.items())}


def test_matrices_of_blocks_are_muons_and_every_parameter_is_somebodys(tiny_transformer):
    updater = make_updater(tiny_transformer)
    take_step(tiny_transformer, updater, 0)
    for name, parameter in tiny_transformer.named_parameters():
        entries = set(updater.optimizer.state[parameter])
        assert entries == ({"momentum_buffer"} if is_matrix(name, parameter) else {"step", "exp_avg", "exp_avg_sq"}), (
            name
        )
    assert len(updater.parameters) == len(list(tiny_transformer.parameters()))


def test_a_step_is_torchs_muon_for_matrices_and_adamws_for_the_rest(tiny_transformer):
    plain, copies = Transformer(tiny_transformer.config), {}
    plain.load_state_dict(tiny_transformer.state_dict())
    matrices = [parameter for name, parameter in plain.named_parameters() if is_matrix(name, parameter)]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    ours, theirs = make_updater(tiny_transformer), make_updater(plain, "adamw")
    for step in range(3):
        take_step(tiny_transformer, ours, step)
        copies = [matrix.detach().clone() for matrix in matrices]
        take_step(plain, theirs, step)
        for matrix, old in zip(matrices, copies, strict=True):
            matrix.data.copy_(old)
        muon.step()
        for (name, one), other in zip(tiny_transformer.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_step_that_is_no_number_changes_nothing(tiny_transformer, factor, first):
    updater = make_updater(tiny_transformer)
    if not first:
        take_step(tiny_transformer, updater, 0)
    before = contents(tiny_transformer, updater)
    assert take_step(tiny_transformer, updater, 1, factor)["skipped"] == 1
    after = contents(tiny_transformer, updater)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert take_step(tiny_transformer, updater, 2)["skipped"] == 0
    assert not torch.equal(before["blocks.0.attention.qkv.weight"], tiny_transformer.blocks[0].attention.qkv.weight)


def test_resuming_equals_never_stopping(tmp_path, codes, tokenizer_folder):
    config = replace(TINY, optimizer="muon")
    train(codes, tmp_path / "whole", tokenizer_folder, config)
    for stop in (3, 7):
        with pytest.raises(InterruptedRun):
            train(codes, tmp_path / "cut", tokenizer_folder, config, on_step=StopAfter(stop))
    train(codes, tmp_path / "cut", tokenizer_folder, config)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    files = [f"checkpoints/step-0000012/{name}.safetensors" for name in ("transformer", "optimizer", "ema")]
    for path in files:
        assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "cut" / path).read_bytes(), path
    stored = read_tensors(tmp_path / "whole" / files[1])
    assert "transformer/transformer.blocks.0.attention.qkv.weight/momentum_buffer" in stored
    assert "transformer/transformer.output_projection.weight/exp_avg" in stored
    with pytest.raises(ConfigError, match="optimizer was muon, now adamw"):
        train(codes, tmp_path / "whole", tokenizer_folder, replace(config, optimizer="adamw"), given={"optimizer"})


def test_muon_needs_a_matrix_and_its_name(tiny_transformer):
    for parameter in tiny_transformer.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="the blocks are frozen"):
        build_optimizer("muon", tiny_transformer, ())
    with pytest.raises(ConfigError, match="unknown optimizer `moun`") as caught:
        TrainConfig(optimizer="moun")
    assert "muon" in caught.value.hint


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_no_step_waits_for_the_gpu_and_a_bad_one_changes_nothing(tiny_transformer, name):
    model = tiny_transformer.cuda()
    updater = make_updater(model, name)
    labels, x = torch.arange(3, device="cuda"), torch.randn(3, 20, 8, device="cuda")
    for step, factor in enumerate((1.0, float("nan"), 1.0)):
        before = contents(model, updater)
        updater.begin(step)
        loss = model(labels, x).square().mean() * factor
        updater.backward(loss)
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first one makes the state
        try:
            updater.finish(loss.detach())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        after = contents(model, updater)
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items()) == (step == 1)
