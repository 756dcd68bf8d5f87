"""Several processes share the shards of one cache, whose bytes are those of one process, also after a kill."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest

import varcli
from varcli.artifacts.verify import read_json_lines, read_manifest, verify_folder
from varcli.data.codes_shards import CodesPlan
from varcli.data.codes_writer import CodesWriter
from varcli.data.defaults import default_decode
from varcli.data.images import open_images
from varcli.distributed import World
from varcli.errors import ConfigError
from varcli.tokenizer import encode
from varcli.tokenizer.encode_shards import SharedCache
from varcli.tokenizer.store import save_tokenizer

ROOT = Path(varcli.__file__).parents[1]
PROCESS = """
import os, signal, sys
from functools import partial
from pathlib import Path
import torch
from varcli.cli.app import report_error
from varcli.data import codes_shards
from varcli.distributed import join_world
from varcli.errors import VarcliError
from varcli.tokenizer import encode
torch.set_num_threads(1)
images, out, tokenizer, killed_rank, precision = sys.argv[1:]
encode.CodesPlan = partial(codes_shards.CodesPlan, shard_images=2)
plain, written = codes_shards.append_json_line, []
def append(path, record):
    plain(path, record)
    written.append(record["name"])
    if os.environ["RANK"] == killed_rank and len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
codes_shards.append_json_line = append
try:
    with join_world("cpu") as (world, device):
        encode.tokenize(Path(images), Path(out), Path(tokenizer), views=2, batch_size=3, workers=0, device=device,
                        precision=precision, world=world)
    print(" ".join(written))
except VarcliError as error:
    sys.exit(report_error(error))
"""


def run_processes(
    size: int, *arguments: object, killed: int = -1, precision: str = "fp32"
) -> list[tuple[int, str, str]]:
    """Start `size` processes as torchrun would; returns exit code, stdout and stderr of each."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", textwrap.dedent(PROCESS), *map(str, arguments), str(killed), precision]
    processes = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (".lock", "manifest.json")}


@pytest.fixture
def tokenizer(tiny_tokenizer, tmp_path) -> Path:
    save_tokenizer(tmp_path / "tokenizer", tiny_tokenizer)
    return tmp_path / "tokenizer"


@pytest.fixture
def whole(tokenizer, tiny_images, tmp_path, monkeypatch) -> Path:
    """The cache of one process, eight shards of train and three of val."""
    monkeypatch.setattr(encode, "CodesPlan", partial(CodesPlan, shard_images=2))
    encode.tokenize(tiny_images, tmp_path / "whole", tokenizer, views=2, batch_size=3, workers=0, device="cpu")
    return tmp_path / "whole"


@pytest.mark.distributed
@pytest.mark.timeout(240)
@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_two_processes_killed_and_run_again_write_what_one_writes(whole, tokenizer, tiny_images, tmp_path, killed):
    out = tmp_path / "out"
    dead = run_processes(2, tiny_images, out, tokenizer, killed=killed)
    assert dead[killed][0] == -signal.SIGKILL and dead[1 - killed][0] != 0
    assert not (out / "manifest.json").exists()
    finished = [line["name"] for log in out.glob(".progress*.jsonl") for line in read_json_lines(log)]
    done = run_processes(2, tiny_images, out, tokenizer)
    assert [code for code, _, _ in done] == [0, 0], done
    names = [name for _, text, _ in done for name in text.split()]
    assert len(finished) >= 2 and sorted(names + finished) == sorted(path.name for path in whole.glob("*.safetensors"))
    assert contents(out) == contents(whole)
    assert read_manifest(out, "codes").digest == read_manifest(whole, "codes").digest
    assert verify_folder(out, read_manifest(out, "codes")) == []


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_three_processes_share_a_faster_precision_and_its_measure(tokenizer, tiny_images, tmp_path):
    done = run_processes(3, tiny_images, tmp_path / "three", tokenizer, precision="bf16")
    one = run_processes(1, tiny_images, tmp_path / "one", tokenizer, precision="bf16")
    assert [code for code, _, _ in done + one] == [0, 0, 0, 0], done
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    manifests = [read_manifest(tmp_path / name, "codes") for name in ("three", "one")]
    assert manifests[0].digest == manifests[1].digest and manifests[0].info["agreement"]["images"] == 15


def test_processes_that_see_other_images_are_one_clear_error(tokenizer, tiny_images, tmp_path):
    plan = CodesPlan(
        tokenizer="3fa1c2aa00000000",
        patch_nums=(1, 2),
        vocab_size=16,
        code_channels=4,
        downsampling=16,
        decode=default_decode(open_images(tiny_images), 32),
        views={"train": 1, "val": 1},
    )

    class Differing(World):
        def largest(self, *values: int) -> list[int]:
            return [value + 1 for value in values]

    with pytest.raises(ConfigError, match="same images"):
        SharedCache(tmp_path / "out", plan, open_images(tiny_images), Differing(0, 2)).__enter__()
    assert not (tmp_path / "out").exists()


def test_shards_of_all_processes_are_all_shards_once(tiny_images, tmp_path):
    tree = open_images(tiny_images)
    decode = default_decode(tree, 32)
    plan = CodesPlan(
        tokenizer="3fa1c2aa00000000",
        patch_nums=(1, 2),
        vocab_size=16,
        code_channels=4,
        downsampling=16,
        decode=decode,
        views={"train": 1, "val": 1},
        shard_images=4,
    )
    with SharedCache(tmp_path / "out", plan, tree, World()) as cache:
        every = [(split, shard) for split in tree.splits for shard in CodesWriter.missing_shards(cache.writer, split)]
        assert (
            cache.missing == every == [("train", 0), ("train", 1), ("train", 2), ("train", 3), ("val", 0), ("val", 1)]
        )
        parts = []
        for rank in range(4):
            cache.world = World(rank, 4)
            parts += [(split, shard) for split, shards in cache.own().items() for shard in shards]
        assert parts == every
