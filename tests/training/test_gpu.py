"""On a GPU: compiled training learns what plain training learns, resuming is exact, graphs and float16 run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_codes import write_codes

from varcli.errors import InterruptedRun
from varcli.tokenizer import VQVAE
from varcli.tokenizer.store import save_tokenizer
from varcli.training import TrainConfig, train_transformer
from varcli.training.runlog import read_log

pytestmark = pytest.mark.gpu

SMALL = TrainConfig(
    depth=2,
    steps=12,
    batch_size=32,
    learning_rate=1e-3,
    dropout=0.1,
    drop_path=0.1,
    ema_decay=0.9,
    keep_best=False,
    compile=False,
    log_every=1,
    validate_every=0,
    sample_every=0,
    tensorboard=False,
)


@pytest.fixture
def places(tmp_path: Path, tiny_tokenizer: VQVAE) -> tuple[Path, Path]:
    """Codes and their tokenizer on disk."""
    save_tokenizer(tmp_path / "tokenizer", tiny_tokenizer)
    generator = torch.Generator().manual_seed(0)
    images = {"train": 400, "val": 12}
    return write_codes(tmp_path / "codes", tiny_tokenizer, generator, images), tmp_path / "tokenizer"


def train(places: tuple[Path, Path], out: Path, config: TrainConfig, **options) -> list[float]:
    codes, tokenizer = places
    train_transformer(codes, out, config, tokenizer=tokenizer, device="cuda", **options)
    return [line["loss"] for line in read_log(out, "train")]


def norms(run: Path) -> list[float]:
    """The gradients' norm in each step of a run."""
    return [line["gradient_norm"] for line in read_log(run, "train")]


@pytest.fixture
def open_gates(monkeypatch) -> None:
    """Blocks that act from the first step on: those of a new model hardly do, and a wrong one would not be seen."""
    monkeypatch.setattr("varcli.transformer.base._GAMMA_BY_DEPTH", ((99, 1.0),))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resuming_equals_never_stopping(places, tmp_path, precision):
    import os
    import signal

    def stop(report):
        if report.done == 5 and report.values and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            os.kill(os.getpid(), signal.SIGTERM)

    config = replace(SMALL, precision=precision)
    whole = train(places, tmp_path / "whole", config)
    with pytest.raises(InterruptedRun):
        train(places, tmp_path / "broken", config, on_step=stop)
    assert train(places, tmp_path / "broken", config) == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("graphs", [False, True])
def test_compiled_training_learns_the_same(places, tmp_path, open_gates, graphs):
    config = replace(SMALL, dropout=0.0, drop_path=0.0, steps=40)
    plain = train(places, tmp_path / "plain", config)
    fused = train(places, tmp_path / "fused", replace(config, compile=True, cuda_graphs=graphs))
    assert fused == pytest.approx(plain, rel=0.01)
    assert norms(tmp_path / "fused") == pytest.approx(norms(tmp_path / "plain"), rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kernels_of_our_own_learn_the_same(places, tmp_path, open_gates, precision, compiled):
    config = replace(SMALL, dropout=0.0, label_smoothing=0.1, precision=precision, compile=compiled)
    plain = train(places, tmp_path / "plain", replace(config, kernels="torch"))
    fused = train(places, tmp_path / "fused", replace(config, kernels="triton"))
    assert fused == pytest.approx(plain, rel=1e-4 if precision == "fp32" else 0.01)
    close = 1e-3 if precision == "fp32" else 3e-3  # blocks that act a tenth less make it 5e-3
    assert norms(tmp_path / "fused") == pytest.approx(norms(tmp_path / "plain"), rel=close)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("compiled", [False, True])
def test_fp8_learns_nearly_the_same(places, tmp_path, open_gates, kernels, compiled):
    config = replace(SMALL, dropout=0.0, precision="bf16", kernels=kernels, compile=compiled, steps=30)
    plain = train(places, tmp_path / "plain", config)
    assert train(places, tmp_path / "fp8", replace(config, fp8=True)) == pytest.approx(plain, rel=0.02)


def test_the_cpu_and_the_gpu_take_the_same_steps(places, tmp_path):
    config = replace(SMALL, dropout=0.0, drop_path=0.0, label_dropout=0.0, precision="fp32")
    codes, tokenizer = places
    on_gpu = train(places, tmp_path / "gpu", config)
    train_transformer(codes, tmp_path / "cpu", config, tokenizer=tokenizer, device="cpu")
    on_cpu = [line["loss"] for line in read_log(tmp_path / "cpu", "train")]
    assert on_gpu == pytest.approx(on_cpu, rel=2e-3)  # TF32 products
