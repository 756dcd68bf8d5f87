"""Every stage can be measured on a CPU, and its numbers belong together."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from varcli.bench import calibrate, sampling, stages
from varcli.bench.config import BenchConfig
from varcli.bench.counting import encoding_flops
from varcli.bench.profile import by_kind, kind_of
from varcli.bench.stages import STAGES, run_bench
from varcli.cli.app import app
from varcli.errors import ConfigError, MemoryLimitError
from varcli.sampling import SampleConfig


@pytest.fixture(autouse=True)
def small_ceiling(monkeypatch):
    ceiling = calibrate.Ceiling(device="test", dtype="float32", matmul_tflops=0.1, copy_gb_per_second=10.0)
    monkeypatch.setattr("varcli.bench.stages.measure_ceiling", lambda *_: ceiling)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_measured_with_consistent_numbers(stage):
    config = BenchConfig(depth=1, scales="1,2", tokenizer_width=32, batch_sizes=(1, 2), repeats=1, device="cpu")
    result = run_bench(stage, config)
    assert [entry.batch_size for entry in result.measurements if entry.stage == stage] == [1, 2]
    for entry in result.measurements:
        assert entry.images_per_second == pytest.approx(entry.batch_size / entry.milliseconds * 1e3)
        assert entry.share_of_matmul == pytest.approx(entry.tflops / 0.1)
        assert entry.tflops > 0


@pytest.mark.parametrize("stage", STAGES)
def test_each_line_of_json_says_on_its_own_what_ran_where(stage):
    command = ["bench", stage, "--scales", "1,2", "--tokenizer-width", "32", "--repeats", "1"]
    command += ["--depth", "1"] if stage in ("train", "sample") else []
    command += ["--batch-size", "1", "--batch-size", "2", "--device", "cpu", "--precision", "bf16", "--json"]
    if stage == "train-tokenizer":  # without its large networks, which take long
        command += ["--set", "perceptual_weight=0", "--set", "adversarial_weight=0"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in result.stdout.splitlines()]
    whole = [(record["stage"], record["batch_size"]) for record in records if ":" not in record["stage"]]
    assert whole == [(stage, 1), (stage, 2)]
    for record in records:
        assert {"milliseconds", "images_per_second", "tflops", "share_of_matmul", "peak_gib"} <= record.keys()
        assert (record["precision"], record["is_compiled"], record["torch"]) == ("bf16", False, torch.__version__)
        assert (record["device"], record["matmul_tflops"], record["copy_gb_per_second"]) == ("test", 0.1, 10.0)
        assert (record["model"]["image_size"], record["details"]["repeats"]) == (32, 1)
        assert ("depth" in record["model"]) == (stage in ("train", "sample"))


def test_work_of_the_released_tokenizer_matches_the_count_on_the_reference():
    assert encoding_flops(BenchConfig().tokenizer) / 1e9 == pytest.approx(215.1 + 0.23, rel=0.01)


def test_what_was_measured_is_told_at_once_and_too_little_memory_costs_that_job_alone(monkeypatch):
    config = BenchConfig(depth=1, scales="1,2", tokenizer_width=32, batch_sizes=(1, 2, 3), repeats=1, device="cpu")
    measure, messages, told = stages._measure, [], []

    def full(job, *rest):
        if job.size == 2:
            raise torch.OutOfMemoryError
        return measure(job, *rest)

    monkeypatch.setattr(stages, "_measure", full)
    result = run_bench("train", config, lambda step: messages.append(step.message), told.append)
    assert [entry.batch_size for entry in result.measurements] == [1, 3]
    assert [part.measurements[0] for part in told] == list(result.measurements)
    assert any(message and "batch 2" in message and "too little memory" in message for message in messages)
    with pytest.raises(MemoryLimitError):
        run_bench("train", replace(config, batch_sizes=(2,)))


def test_on_a_gpu_the_whole_generation_is_the_engines(monkeypatch):
    started = []

    class Stub:
        def __init__(self, generator, settings, batch_size):
            assert batch_size == 3

        def start(self, seed, classes, indices):
            started.append((seed, list(classes), list(indices)))

    monkeypatch.setattr(sampling, "Engine", Stub)
    sampling._whole(None, SampleConfig(), [4, 5, 6], torch.device("cuda"))()
    assert started == [(0, [4, 5, 6], [0, 1, 2])]


def test_an_unknown_stage_is_refused():
    with pytest.raises(ConfigError, match="stage"):
        run_bench("tokenise")


def test_kernels_are_compared_where_a_transformer_runs_and_refused_before_anything_is_measured():
    config = BenchConfig(depth=1, scales="1,2", tokenizer_width=32, batch_sizes=(1,), repeats=1, device="cpu")
    result = run_bench("all", replace(config, kernels=("auto", "torch")))
    assert [(entry.stage, entry.kernels) for entry in result.measurements] == [
        ("tokenize", None),
        ("train", "torch"),  # which auto is, too
        ("sample", None),
        ("sample: transformer", None),
        ("sample: decoder", None),
        ("sample", "torch"),
        ("sample: transformer", "torch"),
        ("sample: decoder", "torch"),
    ]
    with pytest.raises(ConfigError, match="CUDA"):
        run_bench("train", replace(config, kernels=("torch", "triton")))


def test_fp8_is_refused_before_anything_is_measured_where_there_is_none():
    config = BenchConfig(depth=1, scales="1,2", tokenizer_width=32, batch_sizes=(1,), repeats=1, device="cpu", fp8=True)
    with pytest.raises(ConfigError, match="fp8 needs an NVIDIA GPU"):
        run_bench("all", config)
    with pytest.raises(ConfigError, match="fp8 needs an NVIDIA GPU"):
        run_bench("sample", config)
    assert not run_bench("tokenize", config).measurements[0].is_fp8


def test_fp8_is_told_of_what_it_changes_alone(monkeypatch):
    monkeypatch.setattr(stages, "require_fp8", lambda *sizes: None)  # a CPU computes the formulas
    config = BenchConfig(depth=1, scales="1,2", tokenizer_width=32, batch_sizes=(1,), repeats=1, device="cpu", fp8=True)
    result = run_bench("all", replace(config, precision="bf16"))
    told = {entry.stage: entry.is_fp8 for entry in result.measurements}
    assert told == {
        "tokenize": False,
        "train": True,
        "sample": True,
        "sample: transformer": True,
        "sample: decoder": False,
    }


def test_a_profile_accounts_for_the_time_of_a_batch():
    config = BenchConfig(depth=1, scales="1,2", tokenizer_width=32, batch_sizes=(2,), repeats=1, device="cpu")
    (entry,) = run_bench("train", replace(config, profile=True)).measurements
    assert sum(kernel.share for kernel in entry.profile) == pytest.approx(1)
    times = [kernel.milliseconds for kernel in entry.profile]
    assert times == sorted(times, reverse=True) and times[-1] > 0
    kinds = by_kind(entry.profile)
    assert {"matrix product", "attention", "optimizer"} <= set(kinds)
    assert sum(milliseconds for milliseconds, _ in kinds.values()) == pytest.approx(sum(times))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNN", "matrix product"),
        ("triton_poi_fused_convolution_silu_3", "fused by torch.compile"),
        ("triton_tem_fused_mm_1", "matrix product"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64x64", "attention"),
        ("_varcli_norm_backward", "varcli's own"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "element-wise"),
        ("something new", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(name, kind):
    assert kind_of(name) == kind


def test_an_unknown_stage_lists_all_and_a_count_below_one_names_its_option():
    told = CliRunner().invoke(app, ["bench", "trian"])
    assert told.exit_code == 1
    assert "known: all, eval, sample, tokenize, tokenize-files, train, train-tokenizer" in told.output
    for option in ("--batch-size", "--repeats", "--depth"):
        told = CliRunner().invoke(app, ["bench", "train", option, "0"], env={"COLUMNS": "120"})
        assert told.exit_code == 1 and f"`{option}` must be 1 or more, but is 0" in told.output
    with pytest.raises(ConfigError, match="batch_size must be 1 or more, but is 0"):
        BenchConfig(batch_sizes=(4, 0))


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("tokenize --depth 8", "`--depth` belongs to train, sample and all; but the stage is tokenize"),
        ("tokenize --kernels torch", "`--kernels` belongs to train, sample and all; but the stage is tokenize"),
        ("train --workers 0", "`--workers` belongs to tokenize-files and eval; but the stage is train"),
        ("tokenize-files --profile", "`--profile` belongs to tokenize, train, sample, all and train-tokenizer"),
        ("train --set steps=1", "`--set` belongs to train-tokenizer"),
        ("eval --depth 16 --fp8 --size 64 --n 300", "`--depth` and `--fp8` belong to train, sample and all"),
        ("train --n 8 --size 64", "`--n` belongs to tokenize-files and eval; `--size` belongs to eval; but"),
        ("--size 64", "`--size` belongs to eval; but the stage is all"),
    ],
)
def test_options_of_other_stages_are_refused_with_the_stages_they_belong_to(arguments, said, monkeypatch):
    monkeypatch.setattr("varcli.bench.stages.measure_ceiling", lambda *_: pytest.fail("something was measured"))
    told = CliRunner().invoke(app, ["bench", *arguments.split()])
    assert told.exit_code == 1, told.output
    assert said in told.stderr and told.stderr.count("error: ") == 1
