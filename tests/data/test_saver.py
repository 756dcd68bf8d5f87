"""Saving beside what draws: the same files whatever the workers, a bounded number under way, and no silent loss."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import varcli
from varcli.artifacts.write import TEMPORARY_PREFIX
from varcli.data import saver as saver_module
from varcli.data.png import save_png
from varcli.data.saver import ImageSaver
from varcli.errors import ArtifactError, DataError, ShapeError

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), dtype=np.uint8)
NAMES = [f"{number}.png" for number in range(len(IMAGES))]


@pytest.fixture
def small_tasks(monkeypatch):
    monkeypatch.setattr(saver_module, "_TASK_BYTES", 3 * IMAGES[0].nbytes)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_files_do_not_depend_on_workers(tmp_path, small_tasks, workers):
    with ImageSaver(tmp_path, workers) as saver:
        saver.save(NAMES[:7], IMAGES[:7])
        saver.save(NAMES[7:], IMAGES[7:])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    for name, image in zip(NAMES, IMAGES, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / name)), image.transpose(1, 2, 0))
        save_png(tmp_path / "alone.png", image, is_sample=True)
        assert (tmp_path / name).read_bytes() == (tmp_path / "alone.png").read_bytes()


def test_only_so_many_tasks_are_under_way(tmp_path, small_tasks, monkeypatch):
    under_way = []
    with ImageSaver(tmp_path, 1) as saver:
        submit = saver._pool.submit
        monkeypatch.setattr(saver._pool, "submit", lambda task: under_way.append(len(saver._pending)) or submit(task))
        saver.save(NAMES, IMAGES)
    assert len(under_way) == 7 and max(under_way) <= 1


def test_a_sample_is_as_a_picture_saved_slowly(tmp_path):
    save_png(tmp_path / "a.png", IMAGES[0])
    save_png(tmp_path / "b.png", IMAGES[0], is_sample=True)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(Image.open(tmp_path / "b.png")))


def test_a_file_that_cannot_be_written_is_one_clear_error(tmp_path):
    for workers in (0, 1):
        with (
            pytest.raises(ArtifactError, match="cannot write") as caught,
            ImageSaver(tmp_path / "gone", workers) as saver,
        ):
            saver.save(NAMES, IMAGES)
        assert caught.value.hint is not None


def test_a_killed_worker_is_one_clear_error(tmp_path, small_tasks, monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with pytest.raises(DataError, match=r"worker died \(SIGKILL\)") as caught, ImageSaver(tmp_path, 2) as saver:
        os.kill(started[0].pid, signal.SIGKILL)
        saver.save(NAMES, IMAGES)
    assert "run the same command again" in caught.value.hint
    assert all(process.poll() is not None for process in started)


def test_images_of_another_shape_or_number_are_refused(tmp_path):
    with ImageSaver(tmp_path, 0) as saver:
        for names, images in ((NAMES, IMAGES[:3]), (NAMES, IMAGES.astype(np.float32)), (NAMES, IMAGES[:, :1])):
            with pytest.raises(ShapeError):
                saver.save(names, images)
    assert not list(tmp_path.iterdir())


def test_a_parent_that_is_killed_leaves_whole_files_only(tmp_path):
    """What is there is finished; the rest is drawn again by the next run, which sweeps half-written files away."""
    script = """
        import os, signal, sys
        import numpy as np
        from pathlib import Path
        from varcli.data import saver as module
        module._TASK_BYTES = 1
        images = np.random.default_rng(0).integers(0, 256, (200, 3, 64, 64), dtype=np.uint8)
        with module.ImageSaver(Path(sys.argv[1]), 2) as saver:
            saver.save([f"{n}.png" for n in range(100)], images[:100])
            os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(varcli.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), tmp_path], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    images = np.random.default_rng(0).integers(0, 256, (200, 3, 64, 64), dtype=np.uint8)
    whole = [path for path in tmp_path.iterdir() if not path.name.startswith(TEMPORARY_PREFIX)]
    assert len(whole) >= 90
    for path in whole:
        assert np.array_equal(np.asarray(Image.open(path)), images[int(path.stem)].transpose(1, 2, 0))
