"""One update: groups, clipping, refusal of bad gradients; four golden steps with all of it together."""

from __future__ import annotations

import pytest
import torch
from golden_files import GRADIENT_NORM, cases, parametrize
from torch import nn

from varcli.interop.names import transformer_names
from varcli.interop.official import load_transformer
from varcli.training.ema import Ema
from varcli.training.objective import measure
from varcli.training.optim import LossScale, Updater, build_adamw, parameter_groups
from varcli.training.schedules import Schedule

TRAJECTORY = 1e-4  # relative, as the golden README suggests


@pytest.mark.parametrize(**parametrize(cases("var", having="teacher_forcing.safetensors")))
def test_four_steps_of_training_equal_the_reference(case):
    model, golden = load_transformer(case.weights(), **case.config), case.tensors("teacher_forcing")
    model.requires_grad_()
    settings, names = case.config["train_traj"], transformer_names(model.state_dict())
    parameters = {names[name]: parameter for name, parameter in model.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    schedule = Schedule(
        total_steps=settings["max_it"],
        learning_rate=settings["peak_lr"],
        shape=settings["schedule"],
        warmup_steps=settings["warmup_it"],
        warmup_start=settings["wp0"],
        final=settings["wpe"],
        weight_decay=settings["wd"],
        final_weight_decay=settings["wd_end"],
    )
    optimizer = build_adamw(model, model.undecayed_parameters())
    updater = Updater(optimizer, schedule, grad_clip=settings["grad_clip"])
    rows = zip(golden["traj_Lmean_Ltail_Accmean_Acctail_gradnorm"], golden["traj_lrmin_lrmax_wdmin_wdmax"], strict=True)
    for step, (expected, hyper) in enumerate(rows):
        updater.begin(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(hyper[1].item(), rel=1e-6)
        assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0, hyper[3].item()])
        last = case.config["patch_nums"][-1] ** 2
        loss, numbers = measure(model, golden["labels"], golden["var_input"], golden["gt_idx"].long(), 0.0, last)
        torch.testing.assert_close(numbers * torch.tensor([1, 1, 100, 100]), expected[:4], rtol=TRAJECTORY, atol=1e-5)
        updater.backward(loss)
        norm = updater.finish(loss.detach())["gradient_norm"]
        assert norm.item() == pytest.approx(expected[4].item(), rel=GRADIENT_NORM)
    order = case.config["param_names"]
    norms = torch.stack([parameters[name].detach().norm() for name in order])
    torch.testing.assert_close(norms, golden["param_norms_after"], rtol=TRAJECTORY, atol=1e-6)
    moved = torch.stack([(parameters[name].detach() - before[name]).norm() for name in order])
    torch.testing.assert_close(moved, golden["param_delta_norms_after"], rtol=GRADIENT_NORM, atol=1e-6)


def test_groups_hold_every_trainable_parameter_once(tiny_transformer):
    tiny_transformer.step_embedding.requires_grad_(False)
    undecayed = tiny_transformer.undecayed_parameters()
    groups = parameter_groups(tiny_transformer, undecayed)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = {name: p for name, p in tiny_transformer.named_parameters() if p.requires_grad}
    assert sorted(held) == sorted(id(parameter) for parameter in trainable.values())
    kept = {id(parameter) for parameter in groups[0]["params"]}
    assert kept == {id(p) for name, p in trainable.items() if name in undecayed}


def make_updater(**options) -> tuple[nn.Module, Updater]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    ema = Ema(model, 0.5)
    return model, Updater(build_adamw(model), Schedule(total_steps=9, learning_rate=0.1), ema=ema, **options)


def take_step(model: nn.Module, updater: Updater, step: int, factor: float = 1.0) -> dict:
    updater.begin(step)
    loss = model(torch.ones(2, 4)).square().mean() * factor
    updater.backward(loss)
    return dict(updater.finish(loss.detach()))


def contents(model: nn.Module, updater: Updater) -> list[torch.Tensor]:
    moments = [value for state in updater.optimizer.state.values() for value in state.values()]
    return [tensor.clone() for tensor in (*model.state_dict().values(), *updater.ema.tensors().values(), *moments)]


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_step_that_is_no_number_changes_nothing(factor):
    model, updater = make_updater(grad_clip=1.0)
    assert take_step(model, updater, 0)["skipped"] == 0
    before = contents(model, updater)
    assert take_step(model, updater, 1, factor)["skipped"] == 1
    assert all(torch.equal(one, other) for one, other in zip(before, contents(model, updater), strict=True))
    assert take_step(model, updater, 2)["skipped"] == 0
    assert not torch.equal(before[0], model.weight)


def test_an_optimizer_without_a_fused_kernel_skips_too():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    updater = Updater(torch.optim.Adagrad(model.parameters()), Schedule(total_steps=9, learning_rate=0.1))
    before = model.weight.clone()
    take_step(model, updater, 0, float("nan"))
    assert torch.equal(before, model.weight)
    take_step(model, updater, 1)
    assert not torch.equal(before, model.weight)


def test_clipping_bounds_the_norm_and_reports_the_norm_before():
    model, updater = make_updater(grad_clip=0.01)
    norm = take_step(model, updater, 0, 100.0)["gradient_norm"]
    clipped = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    assert norm > 1
    assert clipped.item() == pytest.approx(0.01, rel=1e-3)


def test_a_loss_scale_does_not_change_the_update():
    scaled, plain = make_updater(grad_clip=1.0, loss_scale=LossScale(torch.device("cpu"))), make_updater(grad_clip=1.0)
    for model, updater in (scaled, plain):
        for step in range(3):
            take_step(model, updater, step)
    torch.testing.assert_close(scaled[0].weight, plain[0].weight)


def test_a_loss_scale_halves_on_overflow_grows_when_quiet_and_is_capped():
    scale = LossScale(torch.device("cpu"), start=8.0, interval=2, largest=16.0)
    good, bad = torch.tensor(0.0), torch.tensor(1.0)
    factors = []
    for overflowed in (good, good, good, good, bad, good, bad):
        assert scale.update(overflowed) == 0
        factors.append(scale.factor.item())
    assert factors == [8, 16, 16, 16, 8, 8, 4]
    for _ in range(2):
        assert scale.update(bad) == 0
    assert scale.factor == 1
    assert scale.update(bad) == 1  # at its floor, so it is not the scale's fault


def test_an_average_follows_the_weights_and_swaps_in_bit_for_bit():
    model, updater = make_updater()
    start = model.weight.detach().clone()
    take_step(model, updater, 0)
    weights = model.weight.detach().clone()
    torch.testing.assert_close(updater.ema.shadow["weight"], start + (weights - start) * (1 - 1 / 10))
    average = updater.ema.shadow["weight"].clone()
    with updater.ema.swapped():
        assert torch.equal(model.weight, average)
    assert torch.equal(model.weight, weights)
    assert torch.equal(updater.ema.shadow["weight"], average)
