"""How likely an image is of its class, as a classifier that never saw the model judges: what rejection sampling keeps by."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varcli.data.classes import NUM_IMAGENET, ClassNames, imagenet_names
from varcli.data.defaults import default_decode
from varcli.data.emoji import EMOJI64_CLASSES, unpack_emoji64
from varcli.data.images import ImageTree, Split, decode_images, open_images
from varcli.data.paths import escape_path
from varcli.devices import exact_convolutions
from varcli.distributed import ALONE, World
from varcli.errors import ConfigError
from varcli.pretrained.lite0 import NUM_FEATURES, Lite0, load_lite0
from varcli.progress import OnStep, Step, counted, ignore

_MOST_IMAGES = 20_000  # that a classifier learns from, spread evenly over the training images
_MOST_HELD_OUT = 5_000
_EVERY = 10  # without validation images, each tenth training image is held out
_BATCH = 16  # images at a time: on a CPU more of them leave the cache
# of held-out drawings of emoji64, share right and cross entropy: 0.003 .695 1.31, 0.01 .699 1.10, 0.03 .692 1.00, 0.1 .675 .99
_PENALTY = 0.03  # on squared weights
_ITERATIONS = 200
_UNIT = "training images"  # of progress


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A linear classifier on lite0's features."""

    name: str  # what it is, for manifests
    accuracy: float | None  # on held-out real images; None where the network's own classes are used
    network: Lite0
    weight_KC: Tensor  # float32, on features as they are
    bias_K: Tensor
    device: torch.device

    @torch.no_grad()
    def logits(self, images_B3HW: Tensor) -> Tensor:
        """Return the class logits (B, classes), float32 on the CPU, of uint8 images."""
        features = extract(self.network, images_B3HW, self.device)
        return F.linear(features, self.weight_KC.cpu(), self.bias_K.cpu())

    def score(self, images_B3HW: Tensor, labels_B: Tensor) -> Tensor:
        """Return the logarithm of the probability that each image is of its class, (B,)."""
        chances = self.logits(images_B3HW).log_softmax(dim=-1)
        return chances.gather(1, labels_B.view(-1, 1)).squeeze(1)


def make_scorer(
    classes: ClassNames,
    source: str | None,
    image_size: int,
    device: torch.device,
    world: World = ALONE,
    on_step: OnStep = ignore,
) -> Scorer:
    """Return the scorer of a model's classes.

    lite0's own thousand classes where they are ImageNet's; else a classifier fitted on the images that the model learned
    from. source: these images, as the model's manifest names them; emoji64's need no name. world: processes that all call
    this; the first fits. on_step: told before it does, and how many images have gone through the network, which on a CPU
    takes minutes.
    Raises ConfigError if the images are not known, not there, or of other classes.
    """
    network = load_lite0(device).to(memory_format=torch.channels_last)
    if _are_imagenets(classes):
        own = network.classifier
        return Scorer(
            name="EfficientNet-lite0, ImageNet's classes",
            accuracy=None,
            network=network,
            weight_KC=own.weight.detach(),
            bias_K=own.bias.detach(),
            device=device,
        )
    weight_KC, bias_K = torch.zeros(len(classes), NUM_FEATURES), torch.zeros(len(classes))
    accuracy = torch.zeros((), dtype=torch.float64)
    if world.is_first:
        with _open(classes, source) as tree:
            learned, held_out = _splits(tree)
            count, total = learned.num_images, learned.num_images + held_out.num_images
            text = f"fitting the classifier on {counted(count, 'training image')}, once for this folder"
            on_step(Step(0, total, _UNIT, message=text))
            features, labels = _read(network, learned, image_size, device, 0, total, on_step)
            weight_KC, bias_K = fit(features, labels, len(classes))
            features, labels = _read(network, held_out, image_size, device, count, total, on_step)
            on_step(Step(total, total, _UNIT))
            accuracy += (F.linear(features, weight_KC, bias_K).argmax(dim=1) == labels).double().mean()
    for tensor in (weight_KC, bias_K, accuracy):
        world.copy_first(tensor)
    return Scorer(
        name="linear classifier on EfficientNet-lite0's features, fitted on the training images",
        accuracy=accuracy.item(),
        network=network,
        weight_KC=weight_KC,
        bias_K=bias_K,
        device=device,
    )


def require_images(classes: ClassNames, source: str | None) -> None:
    """Raise what `make_scorer` raises, without fitting."""
    if not _are_imagenets(classes):
        with _open(classes, source):
            pass


def _are_imagenets(classes: ClassNames) -> bool:
    return len(classes) == NUM_IMAGENET and tuple(map(classes.label, range(NUM_IMAGENET))) == imagenet_names()


def fit(features_NC: Tensor, labels_N: Tensor, num_classes: int, penalty: float = _PENALTY) -> tuple[Tensor, Tensor]:
    """Fit a softmax regression, every class counting alike; return weights (K, C) and biases (K,), float32.

    penalty: on the squared weights of features scaled to unit variance. In float64 on the CPU, from zero: no randomness.
    """
    rows = features_NC.double().cpu()
    mean, scale = rows.mean(dim=0), rows.std(dim=0).clamp_min(1e-6)
    rows = (rows - mean) / scale
    counts = torch.bincount(labels_N, minlength=num_classes).double()
    weights = (1 / counts.clamp_min(1)) / (counts > 0).sum()
    weight = torch.zeros(num_classes, rows.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_ITERATIONS, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-9
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        each = F.cross_entropy(F.linear(rows, weight, bias), labels_N, reduction="none")
        value = (each * weights[labels_N]).sum() + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight, bias = weight.detach() / scale, bias.detach()
    return weight.float(), (bias - weight @ mean).float()


@torch.no_grad()
def extract(network: Lite0, images_B3HW: Tensor, device: torch.device) -> Tensor:
    """Return lite0's features (B, 1280), float32 on the CPU, of uint8 images."""
    parts = []
    for part in images_B3HW.split(_BATCH if device.type == "cpu" else 256):
        images = part.to(device, torch.float32) / 127.5 - 1
        with exact_convolutions():
            parts.append(network(images.contiguous(memory_format=torch.channels_last))[0].cpu())
    return torch.cat(parts)


@contextlib.contextmanager
def _open(classes: ClassNames, source: str | None) -> Iterator[ImageTree]:
    """Open the images that a model of these classes learned from."""
    with contextlib.ExitStack() as stack:
        is_there = source is not None and Path(source).is_dir()
        if classes.names == EMOJI64_CLASSES and not is_there:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="varcli-"))) / "emoji64"
            unpack_emoji64(folder)
        elif source is None:
            raise ConfigError(
                "--reject needs the images that the model learned from, and the model does not say which they were",
                "models that `varcli train` makes now do; released ones need none, their classes are ImageNet's",
            )
        else:
            folder = Path(source)
            if not is_there:
                raise ConfigError(
                    f"--reject needs the images that the model learned from, `{escape_path(source)}`, which are not there",
                    "put them back, or draw without --reject",
                )
        tree = open_images(folder, allow_single_class=True)
        if tree.classes != classes.names:
            raise ConfigError(
                f"`{escape_path(str(folder))}` holds other classes than the model has", "put back what it learned from"
            )
        yield tree


def _splits(tree: ImageTree) -> tuple[ImageTree, ImageTree]:
    """Return trees of one split, of the images to learn from and of those to test on."""
    names = list(tree.splits)
    train = tree.splits[names[0]]
    rows = np.arange(len(train))
    if len(names) > 1:
        held_out = _take(tree, tree.splits[names[1]], _spread(np.arange(len(tree.splits[names[1]])), _MOST_HELD_OUT))
    else:
        held_out = _take(tree, train, _spread(rows[::_EVERY], _MOST_HELD_OUT))
        rows = rows[rows % _EVERY != 0]
    return _take(tree, train, _spread(rows, _MOST_IMAGES)), held_out


def _spread(rows: np.ndarray, most: int) -> np.ndarray:
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int))]


def _take(tree: ImageTree, split: Split, rows: np.ndarray) -> ImageTree:
    pixels = None if split.pixels is None else split.pixels[rows]
    # "val" is what is never cut at random
    chosen = Split(tuple(split.paths[row] for row in rows), split.labels[rows], pixels)
    return ImageTree(tree.root, tree.classes, {"val": chosen})


def _read(
    network: Lite0, tree: ImageTree, size: int, device: torch.device, done: int, total: int, on_step: OnStep
) -> tuple[Tensor, Tensor]:
    """Return features and labels of all images of a tree that can be used; `done` of `total` were read before it."""
    config = default_decode(tree, size)["val"]
    features, labels = [], []
    workers = 0 if len(tree.splits["val"]) < 2048 else None
    for batch in decode_images(tree, "val", config, workers=workers, batch_size=256):
        features.append(extract(network, batch.images, device))
        labels.append(torch.from_numpy(batch.labels))
        done += len(batch.labels)
        on_step(Step(min(done, total - 1), total, _UNIT))  # the last is told when all is done
    return torch.cat(features), torch.cat(labels)
