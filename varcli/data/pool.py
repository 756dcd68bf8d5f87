"""Worker processes, and a bounded number of tasks on their way to them: what decodes images, and what saves them."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from varcli.data.paths import escape_path
from varcli.data.worker import receive, send
from varcli.errors import ArtifactError, DataError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TASKS_PER_WORKER = 2  # in flight, so that none waits for the parent
_PIPE_BYTES = 2**20
_MAX_WORKERS = 16  # chosen by default; images for one GPU need no more

Answer = tuple[dict[str, Any], bytearray]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Some images to do something with; see `varcli.data.worker` for what header and raw hold."""

    header: dict[str, Any]
    raw: bytes | memoryview
    paths: list[str]  # of the images, for messages
    advice: str  # what to do where a worker was killed


def default_workers() -> int:
    """Return the number of processes used where none is given: one a core this process may use, at most 16.

    The processes that torchrun started on one machine share its cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, min(cores // max(1, int(beside) if beside.isdecimal() else 1), _MAX_WORKERS))


class WorkerPool:
    """Processes that do tasks; a thread each waits for it, so the caller's is free.

    On the way out the processes are killed, which also frees the threads that wait for them.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._threads = stack.enter_context(ThreadPoolExecutor(self.num_workers))
            for _ in range(self.num_workers):
                worker = _Worker()
                stack.callback(worker.stop)
                self._idle.put(worker)
            stack.callback(self._threads.shutdown, wait=False, cancel_futures=True)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def submit(self, task: Task) -> Future[Answer]:
        """Have a task done; its answer's header and bytes come when they come.

        Raises, from the future, DataError if the process is gone, ArtifactError if it could not write.
        """
        return self._threads.submit(self._call, task)

    def _call(self, task: Task) -> Answer:
        worker = self._idle.get()
        try:
            return worker.call(task)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process, and the pipes to it."""

    def __init__(self) -> None:
        package_root = str(Path(__file__).resolve().parents[2])
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in stop()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "varcli.data.worker"],  # -P: a PIL.py in the current folder is not imported
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is the parent's to handle; the worker ends with its stdin
        )
        _widen(_pipe(self.process.stdin))
        _widen(_pipe(self.process.stdout))

    def call(self, task: Task) -> Answer:
        """Have one task done. Raises as `WorkerPool.submit` says."""
        answer = None
        with suppress(OSError, ValueError):  # a broken or closed pipe
            send(_pipe(self.process.stdin), task.header, task.raw)
            answer = receive(_pipe(self.process.stdout))
        if answer is None:
            raise self._death(task)
        header, raw = answer
        if "refused" in header:
            raise ArtifactError(header["refused"], header["hint"])
        if "error" in header:
            raise RuntimeError(f"an image worker failed:\n{header['error']}")
        return header, raw

    def _death(self, task: Task) -> DataError:
        code = self.process.wait()
        self.stderr.seek(0)
        last_line = self.stderr.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
        how, hint = f"exit code {code}: {last_line}", None
        if code < 0:
            how, hint = signal.Signals(-code).name, task.advice
        first, last = escape_path(task.paths[0]), escape_path(task.paths[-1])
        return DataError(f"an image worker died ({how}) between `{first}` and `{last}`", hint)

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                _pipe(pipe).close()
        self.stderr.close()


def _widen(pipe: BinaryIO) -> None:
    """Let a pipe hold more than the usual 64 KB, where the system can: each read of it takes Python's lock once."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux
        with suppress(OSError):  # more than this user may have
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _pipe(pipe: Any) -> BinaryIO:
    return pipe
