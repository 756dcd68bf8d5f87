"""The transformer computes what the reference computes: blocks, logits, losses, gradients, four steps of training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden_files import (
    FEATURES,
    GRADIENT,
    GRADIENT_NORM,
    LOSS,
    Case,
    assert_near,
    assert_stored,
    cases,
    parametrize,
)
from torch import Tensor

from varcli.interop.names import transformer_names
from varcli.interop.official import load_transformer
from varcli.scales import PatchNums
from varcli.transformer import Transformer

transformer_cases = pytest.mark.parametrize(**parametrize(cases("var", having="teacher_forcing.safetensors")))
TRAJECTORY = 1e-4  # relative: losses and weights after some steps of training


def load(case: Case) -> tuple[Transformer, dict[str, Tensor], dict[str, torch.nn.Parameter]]:
    """The model, its golden tensors, and its parameters under the reference's names."""
    model = load_transformer(case.weights(), **case.config)
    names = transformer_names(model.state_dict())
    parameters = {names[name]: parameter for name, parameter in model.named_parameters()}
    assert set(parameters) == set(case.config["param_names"])
    return model, case.tensors("teacher_forcing"), parameters


def token_losses(logits_BLV: Tensor, codes_BL: Tensor, **options: float) -> Tensor:
    losses = F.cross_entropy(logits_BLV.flatten(0, 1), codes_BL.flatten().long(), reduction="none", **options)
    return losses.view(codes_BL.shape)


@transformer_cases
@torch.no_grad()
def test_every_block_and_the_logits_equal_the_reference(case):
    model, golden, _ = load(case)
    seen = {}
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.update(block0_input=inputs[0]))
    for index, block in enumerate(model.blocks):
        name = f"block{index}_output"
        block.register_forward_hook(lambda block, inputs, output, name=name: seen.update({name: output}))
    logits = model(golden["labels"], golden["var_input"])
    for name, actual in seen.items():
        if name in golden:
            assert_near(actual[: len(golden[name])], golden[name], FEATURES, name)
    assert_stored(golden, "logits", logits, FEATURES)


@transformer_cases
@torch.no_grad()
def test_logits_without_a_class_equal_the_reference(case):
    model, golden, _ = load(case)
    no_class = torch.tensor([model.config.num_classes])
    assert_near(model(no_class, golden["var_input"][:1]), golden["logits_uncond_b0"], FEATURES)


@transformer_cases
@torch.no_grad()
def test_cached_steps_equal_the_reference(case):
    model, golden, _ = load(case)
    cache = model.start_cache(golden["labels"])
    features = [None, *golden["var_input"].split(model.config.step_lengths[1:], dim=1)]
    logits = torch.cat([model.step(x_BlZ, cache) for x_BlZ in features], dim=1)
    assert_stored(golden, "logits", logits, FEATURES)


@transformer_cases
@torch.no_grad()
def test_losses_equal_the_reference(case):
    model, golden, _ = load(case)
    logits, codes = model(golden["labels"], golden["var_input"]), golden["gt_idx"]
    losses = token_losses(logits, codes)
    assert_near(losses, golden["ce_per_token"], FEATURES)
    torch.testing.assert_close(losses.mean(), golden["loss"], rtol=LOSS, atol=0)
    smooth = token_losses(logits, codes, label_smoothing=0.1).mean()
    torch.testing.assert_close(smooth, golden["loss_label_smooth_0.1"], rtol=LOSS, atol=0)
    lengths = PatchNums(tuple(case.config["patch_nums"])).step_lengths
    by_scale = torch.stack([scale.mean() for scale in losses.split(lengths, dim=1)])
    torch.testing.assert_close(by_scale, golden["per_scale_ce"], rtol=LOSS, atol=1e-6)
    hits = (logits.argmax(dim=-1) == codes).float().split(lengths, dim=1)
    accuracy = torch.stack([scale.mean() for scale in hits])
    if golden["per_scale_acc"].max() > 1:
        accuracy = accuracy * 100
    torch.testing.assert_close(accuracy, golden["per_scale_acc"], rtol=1e-5, atol=1e-6)


@transformer_cases
def test_gradients_equal_the_reference(case):
    model, golden, parameters = load(case)
    token_losses(model(golden["labels"], golden["var_input"]), golden["gt_idx"]).mean().backward()
    norms = torch.stack([parameters[name].grad.norm() for name in case.config["param_names"]])
    noise = torch.tensor([name in case.config["grad_norms_rounding_noise"] for name in case.config["param_names"]])
    torch.testing.assert_close(norms[~noise], golden["grad_norms"][~noise], rtol=GRADIENT_NORM, atol=1e-8)
    assert not noise.any() or norms[noise].max() < 1e-6
    torch.testing.assert_close(norms.norm(), golden["grad_norm_total"], rtol=GRADIENT_NORM, atol=0)
    for key, expected in golden.items():
        if key.startswith("grad."):
            assert_near(parameters[key.removeprefix("grad.")].grad, expected, GRADIENT, key)


@transformer_cases
def test_gradients_of_the_fused_passes_equal_the_reference(case):
    model, golden, parameters = load(case)
    model.kernels = "triton"
    loss, losses_BL, _ = model.losses(golden["labels"], golden["var_input"], golden["gt_idx"].long())
    assert_near(losses_BL, golden["ce_per_token"], FEATURES)
    loss.backward()
    norms = torch.stack([parameters[name].grad.norm() for name in case.config["param_names"]])
    torch.testing.assert_close(norms.norm(), golden["grad_norm_total"], rtol=GRADIENT_NORM, atol=0)
    for key, expected in golden.items():
        if key.startswith("grad."):
            assert_near(parameters[key.removeprefix("grad.")].grad, expected, GRADIENT, key)


@transformer_cases
def test_a_temperature_above_its_cap_has_no_gradient(case):
    model, golden, parameters = load(case)
    token_losses(model(golden["labels"], golden["var_input"]), golden["gt_idx"]).mean().backward()
    first = parameters["blocks.0.attn.scale_mul_1H11"]
    capped = first > torch.tensor(100.0).log()
    assert capped.any() and not capped.all()
    assert (first.grad[capped] == 0).all() and (first.grad[~capped] != 0).all()


@transformer_cases
def test_weight_decay_leaves_alone_what_the_reference_leaves_alone(case):
    model, _, _ = load(case)
    names = transformer_names(model.state_dict())
    assert {names[name] for name in model.undecayed_parameters()} == set(case.config["no_weight_decay"])


@transformer_cases
def test_four_training_steps_equal_the_reference(case):
    model, golden, parameters = load(case)
    settings, undecayed = case.config["train_traj"], set(case.config["no_weight_decay"])
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    groups = [
        {"params": [p for name, p in parameters.items() if (name in undecayed) == flag], "weight_decay": 0.0}
        for flag in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    tail = case.config["patch_nums"][-1] ** 2
    rows = zip(
        golden["traj_Lmean_Ltail_Accmean_Acctail_gradnorm"].tolist(),
        golden["traj_lrmin_lrmax_wdmin_wdmax"].tolist(),
        strict=True,
    )
    for (mean, last, _, _, norm), (_, learning_rate, _, weight_decay) in rows:
        optimizer.param_groups[1]["weight_decay"] = weight_decay
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        losses = token_losses(model(golden["labels"], golden["var_input"]), golden["gt_idx"])
        assert losses.mean().item() == pytest.approx(mean, rel=TRAJECTORY)
        assert losses[:, -tail:].mean().item() == pytest.approx(last, rel=TRAJECTORY)
        optimizer.zero_grad()
        losses.mean().backward()
        total = torch.nn.utils.clip_grad_norm_(model.parameters(), settings["grad_clip"])
        assert total.item() == pytest.approx(norm, rel=GRADIENT_NORM)
        optimizer.step()
    names = case.config["param_names"]
    norms = torch.stack([parameters[name].detach().norm() for name in names])
    torch.testing.assert_close(norms, golden["param_norms_after"], rtol=TRAJECTORY, atol=1e-6)
    moved = torch.stack([(parameters[name].detach() - before[name]).norm() for name in names])
    torch.testing.assert_close(moved, golden["param_delta_norms_after"], rtol=GRADIENT_NORM, atol=1e-6)
