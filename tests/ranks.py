"""Processes that work together through gloo as torchrun would start them, but forked from one that has imported everything.

Importing torch takes a process longer than all that these tests let it do.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import varcli

ROOT = Path(varcli.__file__).parents[1]


class Ended(NamedTuple):
    """What became of one process."""

    code: int  # exit status, or minus the signal that killed it
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_ranks(code: str, *arguments: str, size: int = 2, local_size: int | None = None) -> list[Ended]:
    """Run a program in `size` processes, `local_size` a host; returns what became of each.

    Each computes in one thread, as the tests do: another number of threads adds up in another order.
    """
    return run_launches(code, [(size, local_size or size, arguments)])[0]


def run_launches(code: str, launches: Sequence[tuple[int, int, Sequence[str]]]) -> list[list[Ended]]:
    """Run a program several times: in how many processes, how many a host, with which arguments."""
    described = [(size, local_size, free_port(), list(arguments)) for size, local_size, arguments in launches]
    command = [sys.executable, __file__, textwrap.dedent(code), json.dumps(described)]
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=shared, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        try:
            out, err = parent.communicate(timeout=240)
        finally:
            if parent.poll() is None:
                os.killpg(parent.pid, signal.SIGKILL)  # the processes it started too
    assert parent.returncode == 0, err
    return [[Ended(*one) for one in launch] for launch in json.loads(out)]


def _start(code: str, rank: int, launch: tuple[int, int, int, list[str]], files: list[int]) -> int:
    """Fork one process; its output goes to `files`."""
    size, local_size, port, arguments = launch
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(files[0], 1), os.dup2(files[1], 2)
        os.environ |= {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_WORLD_SIZE": str(local_size)}
        os.environ |= {"LOCAL_RANK": str(rank % local_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.argv[1:] = arguments
        exec(compile(code, "rank", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 99
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def _wait(children: list[int]) -> list[int]:
    """Exit codes of all; who is still there 10 seconds after the first one has ended is killed."""
    codes: dict[int, int] = {}
    killed_at = math.inf
    while len(codes) < len(children):
        time.sleep(0.05)
        for child in [child for child in children if child not in codes]:
            if time.monotonic() > killed_at:
                os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
                killed_at = min(killed_at, time.monotonic() + 10)
    return [codes[child] for child in children]


def _main(code: str, launches: list[tuple[int, int, int, list[str]]]) -> None:
    for module in ("torch.distributed.fsdp", "torch.distributed.tensor", "varcli.cli.app", "varcli.training.tokenizer"):
        importlib.import_module(module)
    ended = []
    for launch in launches:
        with ExitStack() as stack:
            files = [[stack.enter_context(TemporaryFile("w+")) for _ in range(2)] for _ in range(launch[0])]
            children = [_start(code, rank, launch, [file.fileno() for file in pair]) for rank, pair in enumerate(files)]
            codes = _wait(children)
            outputs = [[(file.seek(0), file.read())[1] for file in pair] for pair in files]
        ended.append([(status, *output) for status, output in zip(codes, outputs, strict=True)])
    print(json.dumps(ended))


if __name__ == "__main__":
    _main(sys.argv[1], json.loads(sys.argv[2]))
