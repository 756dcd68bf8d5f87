"""Rejection sampling: the best of each group, whatever the batches, kills and processes, and nothing drawn twice."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from varcli.artifacts.verify import read_manifest, verify_folder
from varcli.data.classes import ClassNames
from varcli.data.emoji import EMOJI64_CLASSES
from varcli.errors import ConfigError
from varcli.sampling import Generator
from varcli.sampling import scorer as scorer_module
from varcli.sampling.reject import SCORES_NAME, Rejection
from varcli.sampling.scorer import fit, make_scorer
from varcli.sampling.write import sample_to_folder

WANTED = [(class_index, index) for class_index in (0, 2) for index in range(3)]


class Brightness:
    """Finds bright images likely."""

    name, accuracy = "brightness", 0.5

    def score(self, images_B3HW, labels_B):
        return images_B3HW.float().mean(dim=(1, 2, 3))


@pytest.fixture
def generator(tiny_tokenizer, tiny_transformer):
    torch.manual_seed(2)
    for parameter in tiny_transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Generator(tiny_tokenizer, tiny_transformer.requires_grad_(False), ("apple", "boat", "cat"))


@pytest.fixture(autouse=True)
def judged(monkeypatch):
    made = []
    monkeypatch.setattr(scorer_module, "make_scorer", lambda *rest: made.append(rest) or Brightness())
    monkeypatch.setattr(scorer_module, "require_images", lambda *rest: None)
    return made


def drawn(generator, monkeypatch):
    """Count the images that are drawn from now on."""
    seen, generate = [], generator.generate
    monkeypatch.setattr(
        generator, "generate", lambda labels, *rest: seen.extend(labels.tolist()) or generate(labels, *rest)
    )
    return seen


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("0*.png")}


def test_the_best_of_each_group_are_kept_as_the_images_they_are(generator, tmp_path):
    done = sample_to_folder(generator, WANTED, tmp_path / "out", rejection=Rejection(2, 3), batch_size=4)
    images = generator.sample([0] * 6 + [2] * 6, indices=[*range(6), *range(6)])
    light = images.float().mean(dim=(1, 2, 3)).view(2, 2, 3)  # class, group, candidate
    expected = set()
    for place, class_index in enumerate((0, 2)):
        for group, keep in ((0, 2), (1, 1)):  # the third image of a class is the best of its second group
            for winner in light[place, group].argsort(descending=True)[:keep].tolist():
                expected.add((class_index, 3 * group + winner))
    assert set(files(done.folder)) == {f"{c:04d}-{i:05d}.png" for c, i in expected}
    for class_index, index in expected:
        picture = np.asarray(Image.open(done.folder / f"{class_index:04d}-{index:05d}.png"))
        assert np.array_equal(picture, images[6 * (class_index == 2) + index].permute(1, 2, 0).numpy())
    manifest = read_manifest(done.folder, "samples")
    assert manifest.info["reject"] == "2/3" and manifest.info["scorer"] == {"name": "brightness", "accuracy": 0.5}
    assert SCORES_NAME in manifest.files and verify_folder(done.folder, manifest) == []
    assert (done.num_images, done.num_drawn) == (6, 12)


def test_a_rerun_draws_no_candidate_again_and_more_images_leave_the_others(generator, tmp_path, judged, monkeypatch):
    out = tmp_path / "out"
    sample_to_folder(generator, WANTED, out, rejection=Rejection(1, 2))
    before, seen = files(out), drawn(generator, monkeypatch)
    assert sample_to_folder(generator, WANTED, out, rejection=Rejection(1, 2)).num_drawn == 0
    assert seen == [] and len(judged) == 1  # no scorer was made
    lost = next(out.glob("0*.png"))
    lost.unlink()
    assert sample_to_folder(generator, WANTED, out, rejection=Rejection(1, 2)).num_drawn == 1
    assert files(out) == before
    more = [*WANTED, (0, 3)]
    assert sample_to_folder(generator, more, out, rejection=Rejection(1, 2)).num_drawn == 2
    assert before.items() < files(out).items() and len(files(out)) == 7


def test_what_was_scored_before_a_kill_is_not_drawn_again(generator, tmp_path, monkeypatch):
    sample_to_folder(generator, WANTED, tmp_path / "whole", rejection=Rejection(1, 2))
    generate, calls = generator.generate, []

    def killed(labels_B, *rest):
        calls.append(len(labels_B))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(labels_B, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(generator, "generate", killed)
        with pytest.raises(KeyboardInterrupt):
            sample_to_folder(generator, WANTED, tmp_path / "out", rejection=Rejection(1, 2), batch_size=3)
    seen = drawn(generator, monkeypatch)
    sample_to_folder(generator, WANTED, tmp_path / "out", rejection=Rejection(1, 2), batch_size=5)
    # six of twelve were scored; a winner whose group was cut apart is the only one to be drawn anew
    assert 6 <= len(seen) <= 7
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert json.loads((tmp_path / "out" / SCORES_NAME).read_text()).keys() == {"scorer", "scores"}


def test_rejection_and_its_ratio_are_settings_that_are_not_mixed(generator, tmp_path):
    sample_to_folder(generator, WANTED, tmp_path / "out", rejection=Rejection(1, 2))
    for other, shown in ((None, "none"), (Rejection(1, 3), "1/3")):
        with pytest.raises(ConfigError, match=f": reject was 1/2, now {shown}$"):
            sample_to_folder(generator, WANTED, tmp_path / "out", rejection=other)


@pytest.mark.parametrize("text", ["5/4", "0/4", "1", "a/b", "1/4/2", "-1/4"])
def test_a_ratio_that_keeps_nothing_or_more_than_there_is_is_refused(text):
    with pytest.raises(ConfigError, match="--reject"):
        Rejection.parse(text)


def test_a_softmax_regression_finds_what_separates_and_is_the_same_again():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = torch.randn(90, 12, generator=generator) + 4 * torch.eye(3, 12)[labels]
    weight, bias = fit(features, labels, 3)
    assert ((features @ weight.T + bias).argmax(dim=1) == labels).float().mean() > 0.95
    assert all(torch.equal(a, b) for a, b in zip(fit(features, labels, 3), (weight, bias), strict=True))


def test_a_scorer_learns_from_the_images_the_model_learned_from(tiny_images):
    scorer = make_scorer(ClassNames(("apple", "boat", "cat")), str(tiny_images), 32, torch.device("cpu"))
    assert scorer.accuracy is not None and scorer.accuracy >= 0.5  # six held-out images, whose upper half tells
    pictures = [np.asarray(Image.open(tiny_images / "train" / name / "0.png")) for name in ("apple", "boat", "cat")]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    scores = torch.stack([scorer.score(images, torch.full((3,), label)) for label in range(3)], dim=1)
    assert scores.argmax(dim=1).tolist() == [0, 1, 2]
    torch.testing.assert_close(scores.exp().sum(dim=1), torch.ones(3))


def test_fitting_is_told_before_it_starts_and_as_it_goes(tiny_images):
    steps = []
    make_scorer(ClassNames(("apple", "boat", "cat")), str(tiny_images), 32, torch.device("cpu"), on_step=steps.append)
    assert steps[0].done == 0 and "fitting the classifier on" in steps[0].message
    assert [step.done for step in steps] == sorted(step.done for step in steps) and len(steps) >= 4
    assert steps[-1].done == steps[-1].total > 0 and {step.unit for step in steps} == {"training images"}


@pytest.mark.parametrize(
    ("names", "source", "said"),
    [
        (("a", "b"), None, "does not say"),
        (("a", "b"), "/nowhere/at/all", "not there"),
        (("apple", "boat"), "images", "other classes"),
    ],
)
def test_unknown_images_are_one_clear_error(tiny_images, names, source, said):
    with pytest.raises(ConfigError, match=said):
        make_scorer(ClassNames(names), str(tiny_images) if source == "images" else source, 32, torch.device("cpu"))


def test_the_model_that_comes_with_varcli_needs_no_source(monkeypatch):
    asked = []
    monkeypatch.setattr(scorer_module, "unpack_emoji64", lambda folder: asked.append(folder))
    with pytest.raises(Exception, match="no folder"):  # nothing was unpacked
        make_scorer(ClassNames(EMOJI64_CLASSES), None, 64, torch.device("cpu"))
    assert asked
