"""Ordered parallel decoding: rows do not depend on workers or batches, and a dead worker is an error, not a hang."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import varcli
from varcli.data.images import DecodeConfig, decode_images, open_images
from varcli.data.stream import decode_pairs, decode_spans
from varcli.errors import DataError


def rows(tree, workers: int, batch_size: int = 7, **options):
    config = DecodeConfig(size=16, crop="random", seed=3)
    batches = list(decode_images(tree, "train", config, workers=workers, batch_size=batch_size, **options))
    images = torch.cat([batch.images for batch in batches])
    return images, [(int(i), int(v)) for b in batches for i, v in zip(b.indices, b.views, strict=True)], batches


@pytest.fixture
def odd_images(tiny_images: Path) -> Path:
    """`tiny_images` with a text file, an empty one and a grey image among them."""
    from PIL import Image

    folder = tiny_images / "train" / "boat"
    (folder / "1.png").write_text("not an image")
    (folder / "3.png").write_bytes(b"")
    Image.new("L", (20, 30), 99).save(folder / "4.png")
    return tiny_images


def test_rows_do_not_depend_on_workers_or_batches(odd_images):
    tree = open_images(odd_images)
    expected, pairs, _ = rows(tree, 0, batch_size=1000, views=3)
    assert pairs == [(index, number) for index in range(15) if index not in (6, 8) for number in range(3)]
    for workers, batch_size in ((0, 3), (1, 5), (3, 1)):
        images, same_pairs, batches = rows(tree, workers, batch_size, views=3)
        assert torch.equal(images, expected)
        assert same_pairs == pairs
        assert [int(index) for batch in batches for index in batch.requested] == list(range(15))
        assert all(len(batch.images) <= max(3, batch_size) for batch in batches)


def test_skips_and_conversions_are_reported_once_with_the_image(odd_images):
    _, _, batches = rows(open_images(odd_images), 2, views=2)
    skipped = [skip for batch in batches for skip in batch.skipped]
    assert [path for path, _ in skipped] == ["train/boat/1.png", "train/boat/3.png"]
    assert [int(index) for batch in batches for index in batch.skipped_indices] == [6, 8]
    assert sum((batch.converted for batch in batches), start=batches[0].converted.__class__())["grey"] == 1
    assert [note for batch in batches for note in batch.notes] == [(9, ["grey"])]


def test_chosen_images_and_views_are_those_of_the_whole(tiny_images):
    tree = open_images(tiny_images)
    whole, pairs, _ = rows(tree, 0, views=4)
    images, chosen, batches = rows(tree, 0, indices=[4, 9], views=[2, 3])
    assert chosen == [(4, 2), (4, 3), (9, 2), (9, 3)]
    assert torch.equal(images, whole[[pairs.index(pair) for pair in chosen]])
    assert np.concatenate([batch.labels for batch in batches]).tolist() == [0, 0, 1, 1]
    config = DecodeConfig(size=16, crop="random", seed=3)
    streamed = torch.cat([batch.images for batch in decode_pairs(tree, "train", config, chosen, 0, batch_size=3)])
    assert torch.equal(streamed, images)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_end_where_a_span_ends_and_hold_what_each_span_alone_gives(tiny_images, workers):
    tree, config = open_images(tiny_images), DecodeConfig(size=8, crop="random")
    spans = [range(5), range(5, 6), range(6, 14)]
    batches = list(decode_spans(tree, "train", config, spans, views=2, workers=workers, batch_size=6))
    alone = [batch for span in spans for batch in decode_images(tree, "train", config, span, 2, 0, batch_size=6)]
    assert [len(batch.images) for batch in batches] == [6, 4, 2, 6, 6, 4]
    for batch, expected in zip(batches, alone, strict=True):
        assert torch.equal(batch.images, expected.images)
        assert batch.requested.tolist() == expected.requested.tolist()


def test_an_endless_stream_can_be_left(tiny_images):
    tree = open_images(tiny_images)
    endless = ((index % 15, index // 15) for index in iter(int, 1))
    stream = decode_pairs(tree, "train", DecodeConfig(size=8), endless, workers=2, batch_size=4)
    assert len(next(stream).images) == 4
    stream.close()


def test_unknown_splits_and_classes_are_named(tiny_images):
    tree = open_images(tiny_images)
    with pytest.raises(DataError, match="unknown split `test`"):
        next(decode_images(tree, "test", DecodeConfig(size=8)))
    with pytest.raises(DataError, match="unknown class `dog`"):
        next(decode_images(tree, "train", DecodeConfig(size=8, flip_classes=("dog",))))


def test_a_killed_worker_is_one_clear_error(tiny_images, monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    tree = open_images(tiny_images)
    endless = ((index % 15, index // 15) for index in iter(int, 1))
    batches = decode_pairs(tree, "train", DecodeConfig(size=8), endless, workers=2, batch_size=4)
    next(batches)
    os.kill(started[0].pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"worker died \(SIGKILL\)") as caught:
        for _ in batches:
            pass
    assert "fewer --workers" in caught.value.hint
    assert all(process.poll() is not None for process in started)


def test_workers_end_with_their_parent_and_need_no_main_guard(tiny_images, tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(
        textwrap.dedent("""
            import os, signal, subprocess, sys
            from pathlib import Path
            from varcli.data.images import DecodeConfig, decode_images, open_images
            pids = []
            popen = subprocess.Popen
            subprocess.Popen = lambda *a, **k: (p := popen(*a, **k), pids.append(p.pid))[0]
            for batch in decode_images(open_images(Path(sys.argv[1])), "train", DecodeConfig(size=8), workers=2, batch_size=2):
                print(*pids, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(varcli.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, script, tiny_images], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    for pid in map(int, done.stdout.split()):
        for _ in range(100):
            if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
                break
            signal.sigtimedwait([], 0.05)
        else:
            pytest.fail(f"worker {pid} is still there")


def test_workers_do_not_import_torch():
    code = "import sys, varcli.data.worker; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(varcli.__file__).parents[1], check=True)


def test_images_that_vanish_are_skips(tiny_images):
    tree = open_images(tiny_images)
    shutil.rmtree(tiny_images / "train" / "apple")
    _, pairs, batches = rows(tree, 0)
    assert len(pairs) == 10
    assert len([skip for batch in batches for skip in batch.skipped]) == 5
