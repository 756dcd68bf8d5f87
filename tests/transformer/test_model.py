"""Laws of the transformer: who sees whom, cached steps, precision, weights to start from, label dropout."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from varcli.errors import ShapeError
from varcli.transformer import Transformer, TransformerConfig, drop_branches, drop_labels

LABELS = torch.tensor([0, 3])  # 3 stands for no class


@pytest.fixture
def features():
    return torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def lively_transformer(tiny_transformer):
    """The tiny transformer with open gates and a large head, so that every part shows in the logits."""
    config = tiny_transformer.config
    torch.manual_seed(2)
    return Transformer(TransformerConfig(**{**vars(config), "init_adaln_gamma": 1.0, "init_head": 1.0})).eval()


@torch.no_grad()
def test_a_token_sees_its_own_step_and_earlier_ones_only(lively_transformer, features):
    logits = lively_transformer(LABELS, features)
    for token, (first, last) in {0: (1, 5), 3: (1, 5), 4: (5, 21), 19: (5, 21)}.items():
        changed = features.clone()
        changed[:, token] += 1
        moved = (lively_transformer(LABELS, changed) - logits).abs().amax(dim=(0, 2)) > 0
        assert not moved[:first].any(), f"feature {token} reached an earlier step"
        assert moved[first:last].all(), f"feature {token} did not reach its own step"
        assert moved[last:].all(), f"feature {token} did not reach a later step"


@torch.no_grad()
def test_logits_depend_on_the_class_and_on_no_other_sample(lively_transformer, features):
    logits = lively_transformer(LABELS, features)
    other = lively_transformer(torch.tensor([1, 3]), features)
    assert not torch.equal(logits[0], other[0])
    torch.testing.assert_close(logits[1], other[1])
    torch.testing.assert_close(lively_transformer(LABELS[1:], features[1:]), logits[1:], atol=1e-6, rtol=1e-5)


def test_hidden_then_head_is_the_forward_pass(lively_transformer, features):
    model = lively_transformer
    whole = model.head(model.hidden(LABELS, features))
    assert torch.equal(whole, model(LABELS, features))
    assert whole.dtype == torch.float32 and whole.shape == (2, 21, 16)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("changes", [{}, {"shared_adaln": True}, {"qk_norm": False}, {"mlp_ratio": 2.5}])
@torch.no_grad()
def test_cached_steps_match_teacher_forced_logits(lively_transformer, features, changes, kernels):
    model = Transformer(TransformerConfig(**{**vars(lively_transformer.config), **changes})).eval()
    model.kernels = kernels
    cache = model.start_cache(LABELS)
    steps = [model.step(x_BlZ, cache) for x_BlZ in (None, features[:, :4], features[:, 4:])]
    model.kernels = "torch"
    torch.testing.assert_close(torch.cat(steps, dim=1), model(LABELS, features), atol=2e-6, rtol=1e-5)
    assert (cache.step, cache.position) == (3, 21)


@torch.no_grad()
def test_keys_and_values_of_the_last_step_take_room_in_one_block_alone(lively_transformer, features):
    """Law: all blocks together keep what earlier steps left, and one block's last step."""
    model = Transformer(TransformerConfig(**{**vars(lively_transformer.config), "depth": 5})).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.1)
    cache = model.start_cache(LABELS)
    bytes_of_a_token = 2 * len(LABELS) * model.config.width * 4
    stored = {layer.keys.untyped_storage().data_ptr(): layer.keys.untyped_storage().nbytes() for layer in cache.layers}
    assert 2 * sum(stored.values()) == (5 * 5 + 16) * bytes_of_a_token
    steps = [model.step(x_BlZ, cache) for x_BlZ in (None, features[:, :4], features[:, 4:])]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(LABELS, features), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@torch.no_grad()
def test_samples_that_others_repeat_are_given_once(lively_transformer, features, kernels):
    lively_transformer.kernels = kernels
    labels = torch.cat((LABELS, LABELS.flip(0)))
    whole, part = (lively_transformer.start_cache(labels) for _ in range(2))
    for x_BlZ in (None, features[:, :4], features[:, 4:]):
        given = None if x_BlZ is None else torch.cat((x_BlZ, x_BlZ))
        assert torch.equal(lively_transformer.step(x_BlZ, part), lively_transformer.step(given, whole))


@pytest.mark.parametrize(("samples", "given"), [(5, 2), (4, 3), (3, 4)])
@torch.no_grad()
def test_samples_that_do_not_fit_the_cache_are_refused(lively_transformer, samples, given):
    cache = lively_transformer.start_cache(torch.zeros(samples, dtype=torch.int64))
    lively_transformer.step(None, cache)
    with pytest.raises(ShapeError, match=rf"x must have shape \({samples}, 4, 8\)"):
        lively_transformer.step(torch.zeros(given, 4, 8), cache)


def test_features_of_another_length_are_refused(tiny_transformer, features):
    with pytest.raises(ShapeError, match=r"x must have shape \(2, 20, 8\), but has \(2, 19, 8\)"):
        tiny_transformer(LABELS, features[:, :19])
    cache = tiny_transformer.start_cache(LABELS)
    tiny_transformer.step(None, cache)
    with pytest.raises(ShapeError, match="x must have shape"):
        tiny_transformer.step(features[:, :3], cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_weights_in_half_precision_work_as_autocast_does(lively_transformer, features, dtype):
    exact = lively_transformer(LABELS, features)
    with torch.autocast("cpu", dtype):
        autocast = lively_transformer(LABELS, features)
    half = lively_transformer.to(dtype)(LABELS, features)
    # eight mantissa bits of bfloat16 through two blocks: a few times 1/256 of the largest logit
    limit = exact.abs().max() * (8 / 256 if dtype == torch.bfloat16 else 8 / 2048)
    assert autocast.dtype == half.dtype == torch.float32
    assert (autocast - exact).abs().max() < limit
    assert (half - exact).abs().max() < limit


@pytest.mark.parametrize("autocast", [False, True])
def test_the_whole_forward_pass_compiles_as_one_graph(lively_transformer, features, autocast):
    compiled = torch.compile(lively_transformer, backend="aot_eager", fullgraph=True)
    branches = torch.rand(lively_transformer.config.depth, 2, len(LABELS))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for drawn in (None, branches):
            torch.testing.assert_close(compiled(LABELS, features, drawn), lively_transformer(LABELS, features, drawn))


def test_drop_path_closes_branches_more_often_the_deeper_and_keeps_the_mean():
    config = TransformerConfig(depth=3, width=8, num_heads=2, drop_path=0.5)
    branches = drop_branches(config, 4000, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert branches.shape == (3, 2, 4000)
    for index, keep in enumerate((1.0, 0.75, 0.5)):
        assert set(branches[index].unique().tolist()) == ({0.0, torch.tensor(1 / keep).item()} if index else {1.0})
    torch.testing.assert_close(branches.mean(dim=2), torch.ones(3, 2), rtol=0, atol=0.06)  # four standard errors
    assert drop_branches(TransformerConfig(depth=3, width=8, num_heads=2), 4, None, torch.device("cpu")) is None


def test_dropped_branches_change_their_samples_alone(lively_transformer, features):
    plain = lively_transformer(LABELS, features)
    branches = torch.ones(lively_transformer.config.depth, 2, len(LABELS))
    torch.testing.assert_close(lively_transformer(LABELS, features, branches), plain)
    branches[1, :, 0] = 0
    dropped = lively_transformer(LABELS, features, branches)
    torch.testing.assert_close(dropped[1:], plain[1:])
    assert not torch.allclose(dropped[0], plain[0])


def test_fresh_weights_have_the_spread_of_the_paper():
    torch.manual_seed(0)
    config = TransformerConfig(width=192, num_heads=3, depth=2, step_lengths=(1, 4), init_adaln_gamma=1e-3)
    model, std = Transformer(config), math.sqrt(1 / (3 * 192))
    block = model.blocks[1]
    gates, others = block.modulation.weight.split((2 * 192, 4 * 192))
    expected = {
        model.class_embedding.weight: std,
        model.positions: std,
        block.attention.qkv.weight: std,
        block.feed_forward.fc1.weight: std,
        block.attention.proj.weight: std / 2,  # over sqrt(2 * depth)
        block.feed_forward.fc2.weight: std / 2,
        gates: std * 1e-3,
        others: std * 0.5,
        model.head_modulation.weight: std * 0.5,
        model.output_projection.weight: std * 0.02,
    }
    for weight, spread in expected.items():
        assert weight.std().item() == pytest.approx(spread, rel=0.1)
    for name, parameter in model.named_parameters():
        assert "bias" not in name or not parameter.any()


def test_a_fresh_model_predicts_nearly_uniformly():
    torch.manual_seed(0)
    config = TransformerConfig(width=64, num_heads=1, depth=2, step_lengths=(1, 4), vocab_size=32, code_channels=8)
    logits = Transformer(config)(torch.tensor([7]), torch.randn(1, 4, 8))
    assert logits.abs().max() < 0.1


def test_shared_modulation_offsets_start_with_smaller_gates():
    torch.manual_seed(0)
    config = TransformerConfig(width=256, num_heads=4, depth=1, step_lengths=(1,), shared_adaln=True)
    gates, others = Transformer(config).blocks[0].modulation_offset.split((2, 4), dim=2)
    assert gates.std().item() == pytest.approx(1e-3 / 16, rel=0.1)
    assert others.std().item() == pytest.approx(0.5 / 16, rel=0.1)


def test_the_same_generator_draws_the_same_weights(tiny_transformer):
    drawn = []
    for _ in range(2):
        tiny_transformer.init_weights(torch.Generator().manual_seed(3))
        drawn.append([parameter.detach().clone() for parameter in tiny_transformer.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*drawn, strict=True))


def test_weight_decay_spares_biases_positions_and_temperatures(tiny_transformer):
    spared = tiny_transformer.undecayed_parameters()
    assert {"start_position", "positions", "step_embedding.weight", "blocks.0.attention.log_scale"} <= spared
    assert {"class_embedding.weight", "input_projection.weight", "blocks.0.attention.qkv.weight"}.isdisjoint(spared)


def test_label_dropout_replaces_the_asked_share():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10_000) % 10
    dropped = drop_labels(labels, 10, 0.1, generator)
    gone = dropped == 10
    assert gone.float().mean().item() == pytest.approx(0.1, abs=0.012)  # four standard errors
    assert torch.equal(dropped[~gone], labels[~gone])
    assert torch.equal(drop_labels(labels, 10, 0.0), labels)
    assert (drop_labels(labels, 10, 1.0) == 10).all()


def gradients(model: Transformer, features: torch.Tensor, call=Transformer.losses) -> list[torch.Tensor]:
    codes = torch.arange(2 * 21).view(2, 21) % model.config.vocab_size
    branches = torch.tensor([[2.0, 0.5], [1.0, 0.0]]).expand(model.config.depth, 2, 2)
    loss, losses_BL, hits_BL = call(model, LABELS, features, codes, 0.1, branches)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [loss, losses_BL, hits_BL.float(), *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False}, {"shared_adaln": True}], ids=str)
def test_fused_passes_give_the_loss_and_gradients_of_plain_torch(lively_transformer, features, changes):
    model = Transformer(TransformerConfig(**{**vars(lively_transformer.config), **changes, "init_adaln_gamma": 0.5}))
    plain = gradients(model, features)
    model.kernels = "triton"
    for actual, expected in zip(gradients(model, features), plain, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_fused_passes_compile_as_one_graph(lively_transformer, features, autocast):
    lively_transformer.kernels = "triton"
    lively_transformer.requires_grad_(True)
    compiled = torch.compile(Transformer.losses, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        eager = gradients(lively_transformer, features)
        for actual, expected in zip(gradients(lively_transformer, features, compiled), eager, strict=True):
            torch.testing.assert_close(actual, expected)


def test_attention_of_all_steps_at_once_gives_what_steps_one_by_one_do(lively_transformer, features, monkeypatch):
    changes = {"width": 64, "num_heads": 2, "init_adaln_gamma": 0.5}
    model = Transformer(TransformerConfig(**{**vars(lively_transformer.config), **changes}))
    model.kernels = "triton"
    exact = torch.cat([part.flatten() for part in gradients(model, features)])  # of float32, which is not served
    distances = []
    for is_served in (True, False):
        monkeypatch.setattr("varcli.transformer.attention.is_served", lambda *_, served=is_served: served)
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.cat([part.flatten() for part in gradients(model, features)])
        distances.append((found - exact).norm() / exact.norm())
    fused, stepwise = distances
    assert 0 < fused < 1.2 * stepwise < 0.02 and fused != stepwise


@torch.no_grad()
def test_steps_over_a_cache_see_what_all_steps_at_once_do(lively_transformer, features):
    changes = {"width": 64, "num_heads": 2, "init_adaln_gamma": 0.5}
    model = Transformer(TransformerConfig(**{**vars(lively_transformer.config), **changes})).eval()
    model.kernels = "triton"
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.start_cache(LABELS)
        steps = [model.step(x_BlZ, cache) for x_BlZ in (None, features[:, :4], features[:, 4:])]
        torch.testing.assert_close(
            torch.cat(steps, dim=1).float(), model(LABELS, features).float(), atol=0.02, rtol=0.02
        )


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_parts_compiled_alone_give_the_same_and_one_block_is_compiled_for_all(lively_transformer, features, kernels):
    changes = {"depth": 6, "init_adaln_gamma": 0.5, "width": 64, "num_heads": 2}
    model = Transformer(TransformerConfig(**{**vars(lively_transformer.config), **changes}))
    model.kernels = kernels
    with torch.autocast("cpu", torch.bfloat16):
        eager = gradients(model, features)
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model.compile_parts("aot_eager")
        for actual, expected in zip(gradients(model, features), eager, strict=True):
            torch.testing.assert_close(actual, expected)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == (3 if kernels == "torch" else 4)  # Triton's first block has no branch to add
    model.uncompile_parts()
    assert not {"forward", "_enter", "_losses_of"} & {*vars(model), *vars(model.blocks[0])}


def test_a_copy_of_a_compiled_model_computes_with_its_own_weights(lively_transformer, features):
    lively_transformer.compile_parts("aot_eager")
    assert lively_transformer.has_compiled_parts
    twin = copy.deepcopy(lively_transformer)
    assert not twin.has_compiled_parts
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(1.1)
        expected = Transformer(twin.config)
        expected.load_state_dict(twin.state_dict())
        torch.testing.assert_close(twin(LABELS, features), expected(LABELS, features))


# -- products in FP8 ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fp8_transformer(lively_transformer):
    """A wider lively transformer whose training takes its products in FP8."""
    torch.manual_seed(2)
    changes = {"width": 64, "init_adaln_gamma": 0.5}
    model = Transformer(TransformerConfig(**{**vars(lively_transformer.config), **changes}))
    model.train_in_fp8()
    return model


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": False, "dropout": 0.1}], ids=str)
def test_fp8_changes_gradients_by_its_rounding_alone(fp8_transformer, features, kernels, changes):
    torch.manual_seed(2)
    plain = Transformer(TransformerConfig(**{**vars(fp8_transformer.config), **changes}))
    model = Transformer(plain.config)
    model.load_state_dict(plain.state_dict())
    model.train_in_fp8()
    found = []
    for transformer in (model, plain):
        transformer.kernels = kernels
        torch.manual_seed(3)  # of dropout
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(transformer, features))
    fp8, bf16 = found
    assert fp8[0].item() == pytest.approx(bf16[0].item(), rel=0.01) and fp8[0] != bf16[0]
    names = [name for name, _ in model.named_parameters()]
    together = [torch.cat([grad.flatten() for grad in grads[3:]]) for grads in found]
    assert len(names) == len(fp8) - 3
    assert ((together[0] - together[1]).norm() / together[1].norm()).item() < 0.15


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_fp8_compiles_as_one_graph(fp8_transformer, features, kernels):
    fp8_transformer.kernels = kernels
    compiled = torch.compile(Transformer.losses, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        eager = gradients(fp8_transformer, features)
        for actual, expected in zip(gradients(fp8_transformer, features, compiled), eager, strict=True):
            torch.testing.assert_close(actual, expected)


@torch.no_grad()
def test_fp8_is_for_training_alone(fp8_transformer, features):
    plain = Transformer(fp8_transformer.config)
    plain.load_state_dict(fp8_transformer.state_dict())
    assert not torch.equal(fp8_transformer(LABELS, features), plain(LABELS, features))
    assert torch.equal(fp8_transformer.eval()(LABELS, features), plain.eval()(LABELS, features))


def test_thirty_steps_in_fp8_lose_as_fast_as_in_bf16(fp8_transformer, features):
    codes = torch.arange(2 * 21).view(2, 21) ** 2 % fp8_transformer.config.vocab_size
    plain = Transformer(fp8_transformer.config)
    plain.load_state_dict(fp8_transformer.state_dict())
    curves = []
    for model in (fp8_transformer, plain):
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-4), []
        for _ in range(30):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.losses(LABELS, features, codes)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    fp8, bf16 = curves
    assert bf16[-1] < 0.7 * bf16[0]
    assert fp8 == pytest.approx(bf16, abs=0.01)
