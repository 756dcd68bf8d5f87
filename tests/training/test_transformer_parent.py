"""Fine-tuning a transformer: it starts where the parent stood, keeps what is frozen bit for bit, and says what cannot be."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_codes import CLASSES
from toy_runs import TINY, StopAfter, losses, train

from varcli.artifacts.verify import read_json, read_manifest
from varcli.data.classes import ClassNames, imagenet_names
from varcli.errors import ArtifactError, ConfigError, InterruptedRun
from varcli.tokenizer import VQVAE
from varcli.training.frozen import learn
from varcli.training.transformer_parent import PARTS, freeze_parts, match_classes
from varcli.transformer import Transformer, TransformerConfig
from varcli.transformer.store import load_transformer, save_transformer

OPEN = replace(TINY, depth=16, width=None, num_heads=None, shared_adaln=None, steps=4)  # the parent decides these
FEW = {"depth": 3, "width": 32, "num_heads": 2}


def save_parent(folder: Path, tokenizer: VQVAE, classes=CLASSES, **changes) -> Transformer:
    """A small model folder, as training leaves one."""
    torch.manual_seed(9)
    values = {"step_lengths": (1, 4, 16), "vocab_size": 16, "code_channels": 8, "num_classes": len(classes), **FEW}
    model = Transformer(TransformerConfig(**{**values, **changes}))
    info = {"tokenizer": tokenizer.fingerprint(), "patch_nums": [1, 2, 4], "order": "scale", "classes": list(classes)}
    save_transformer(folder / "transformer", model, info)
    return model


@pytest.fixture
def parent(tmp_path, tiny_tokenizer) -> Transformer:
    return save_parent(tmp_path / "parent", tiny_tokenizer)


def same(before: Transformer, after: Transformer, name: str) -> bool:
    ours, theirs = (
        {key: value for key, value in m.state_dict().items() if f"{key}.".startswith(f"{name}.")}
        for m in (before, after)
    )
    assert ours
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_tiny_learning_rate_reproduces_the_parent_and_its_digest_is_written(
    tmp_path, codes, tokenizer_folder, parent
):
    out, plans = tmp_path / "run", []
    config = replace(OPEN, learning_rate=1e-12)
    train(codes, out, tokenizer_folder, config, init_from=tmp_path / "parent", on_plan=plans.append)
    child, manifest = load_transformer(out / "transformer")
    assert (child.config.depth, child.config.width, child.config.num_heads) == (3, 32, 2)
    for name, before in parent.state_dict().items():
        torch.testing.assert_close(child.state_dict()[name], before, rtol=0, atol=1e-8, msg=name)
    digest = read_manifest(tmp_path / "parent" / "transformer", "transformer").digest[:16]
    checkpoint = read_manifest(out / "checkpoints" / "step-0000004", "checkpoint")
    for where in (manifest.info, checkpoint.info, read_json(out / "config.json")["inputs"]):
        assert where["init_from"] == digest
    assert "knows 3 of the 3 classes" in plans[0].notes[0]


@pytest.mark.parametrize("frozen", [("classes", "embeddings"), ("blocks",), ("head", "blocks:2-3"), ("blocks:1-1",)])
@pytest.mark.parametrize("shared_adaln", [False, True])
def test_frozen_parts_are_bit_identical_and_the_others_learn(
    tmp_path, codes, tokenizer_folder, tiny_tokenizer, frozen, shared_adaln
):
    before = save_parent(tmp_path / "parent", tiny_tokenizer, shared_adaln=shared_adaln)
    config = replace(OPEN, frozen=frozen, learning_rate=1e-2)
    train(codes, tmp_path / "run", tokenizer_folder, config, init_from=tmp_path / "parent")
    after, _ = load_transformer(tmp_path / "run" / "transformer")
    assert after.config.shared_adaln == shared_adaln
    resting = {name for part in frozen for name in PARTS.get(part, ())}
    resting |= {"blocks.1", "blocks.2"} if "blocks:2-3" in frozen else set()
    resting |= {"blocks.0"} if "blocks:1-1" in frozen else set()
    parts = [name for part in PARTS.values() for name in part if name != "blocks" and getattr(after, name) is not None]
    for name in (*parts, "blocks.0", "blocks.1", "blocks.2"):
        assert same(before, after, name) == (name in resting or name.split(".")[0] in resting), name


def test_classes_go_by_their_names_and_no_class_is_kept(tmp_path, tokenizer_folder, tiny_tokenizer, codes):
    before = save_parent(tmp_path / "parent", tiny_tokenizer, ("cat", "dog", "apple", "cow"))
    config, plans = replace(OPEN, learning_rate=1e-12), []
    train(codes, tmp_path / "run", tokenizer_folder, config, init_from=tmp_path / "parent", on_plan=plans.append)
    child, _ = load_transformer(tmp_path / "run" / "transformer")
    rows, known = child.class_embedding.weight, before.class_embedding.weight
    for row, found in ((0, 2), (2, 0), (3, 4)):
        torch.testing.assert_close(rows[row], known[found], rtol=0, atol=1e-8)
    assert (rows[1] - known).abs().sum(dim=1).min() > 0.1
    assert 0.5 < rows[1].std() * (3 * 32) ** 0.5 < 1.5  # as the paper starts them
    assert "knows 2 of the 3 classes" in plans[0].notes[0]
    with pytest.raises(ConfigError, match=r"classes cannot be frozen: .* knows 2 of the 3"):
        train(
            codes,
            tmp_path / "other",
            tokenizer_folder,
            replace(OPEN, frozen=("classes",)),
            init_from=tmp_path / "parent",
        )
    assert not (tmp_path / "other").exists()


def test_names_match_once_each_and_folders_of_imagenet_match_its_names():
    before, now = ClassNames(["crane", "owl", "crane", "crane"]), ClassNames(["crane", "dog", "crane"])
    assert match_classes(before, now) == {0: 0, 2: 2}
    released, folders = ClassNames.of(None, 1000), ClassNames(f"n{row:08d}" for row in range(1000))
    assert match_classes(released, folders) == {row: row for row in range(1000)}
    assert match_classes(ClassNames.of(None, 10), ClassNames(["cat", "7"])) == {}  # its numbers are no names
    assert match_classes(ClassNames(["3", "7"]), ClassNames(["7", "cat"])) == {0: 1}
    assert match_classes(released, ClassNames([imagenet_names()[7]])) == {0: 7}


def test_a_stopped_fine_tuning_goes_on_bit_for_bit_when_the_parent_is_gone(tmp_path, codes, tokenizer_folder, parent):
    config = replace(OPEN, frozen=("blocks:1-2",), steps=6, save_every=2)
    train(codes, tmp_path / "whole", tokenizer_folder, config, init_from=tmp_path / "parent")
    with pytest.raises(InterruptedRun):
        train(codes, tmp_path / "cut", tokenizer_folder, config, init_from=tmp_path / "parent", on_step=StopAfter(3))
    shutil.rmtree(tmp_path / "parent")
    train(codes, tmp_path / "cut", tokenizer_folder, config)
    train(codes, tmp_path / "cut", tokenizer_folder, config, init_from=tmp_path / "parent")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    models = [tmp_path / name / "transformer" / "weights.safetensors" for name in ("whole", "cut")]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_a_run_is_a_parent_and_another_one_is_refused_later(tmp_path, codes, tokenizer_folder, parent):
    train(codes, tmp_path / "first", tokenizer_folder, replace(TINY, steps=2))
    train(codes, tmp_path / "second", tokenizer_folder, replace(OPEN, steps=2), init_from=tmp_path / "first")
    assert load_transformer(tmp_path / "second" / "transformer")[0].config.depth == 2
    with pytest.raises(ConfigError, match=r"begun from the transformer .* but .* is "):
        train(codes, tmp_path / "second", tokenizer_folder, replace(OPEN, steps=2), init_from=tmp_path / "parent")
    with pytest.raises(ConfigError, match="begun without --init-from"):
        train(codes, tmp_path / "first", tokenizer_folder, replace(OPEN, steps=2), init_from=tmp_path / "parent")


def test_all_that_does_not_fit_is_one_error_and_leaves_no_trace(tmp_path, codes, tokenizer_folder, tiny_tokenizer):
    shapes = {"step_lengths": (1, 4, 9, 16), "vocab_size": 32}
    save_parent(tmp_path / "parent", tiny_tokenizer, **shapes)
    config = replace(OPEN, depth=2, width=64)
    with pytest.raises(ConfigError) as caught:
        train(codes, tmp_path / "run", tokenizer_folder, config, init_from=tmp_path / "parent")
    for text in ("30 tokens in 4 steps, not 21 in 3", "depth 3, not 2", "width 32, not 64", "vocab_size 32, not 16"):
        assert text in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_of_the_same_shape_is_told(tmp_path, tiny_tokenizer, codes, tokenizer_folder):
    save_parent(tmp_path / "parent", VQVAE(tiny_tokenizer.config))
    plans = []
    train(codes, tmp_path / "run", tokenizer_folder, OPEN, init_from=tmp_path / "parent", on_plan=plans.append)
    assert any("another tokenizer" in note for note in plans[0].notes)


@pytest.mark.parametrize(
    ("frozen", "text"),
    [
        (("blcks",), "part to freeze `blcks`"),
        (("blocks:0-1",), "counted from 1"),
        (("blocks:2-4",), "the 3 blocks"),
        (("classes", "embeddings", "head", "blocks:1-3"), "nothing is left to learn"),
    ],
)
def test_parts_that_cannot_be_frozen_are_refused(tmp_path, codes, tokenizer_folder, parent, frozen, text):
    with pytest.raises(ConfigError, match=text):
        train(codes, tmp_path / "run", tokenizer_folder, replace(OPEN, frozen=frozen), init_from=tmp_path / "parent")
    assert not (tmp_path / "run").exists()


def test_nothing_is_frozen_without_a_parent(tmp_path, codes, tokenizer_folder):
    with pytest.raises(ConfigError, match="before having learned"):
        train(codes, tmp_path / "run", tokenizer_folder, replace(TINY, frozen=("blocks",)))


@pytest.mark.parametrize("name", ["nowhere", "codes", "tokenizer"])
def test_a_folder_without_a_transformer_is_refused(tmp_path, codes, tokenizer_folder, name):
    with pytest.raises(ArtifactError, match="transformer"):
        train(codes, tmp_path / "run", tokenizer_folder, init_from=tmp_path / name)


def test_frozen_modules_drop_out_nothing(parent):
    frozen = freeze_parts(parent, ["blocks:1-1"])
    learn(parent, frozen)
    assert [block.feed_forward.dropout.training for block in parent.blocks] == [False, True, True]
    assert [block.attention.proj.weight.requires_grad for block in parent.blocks] == [False, True, True]
