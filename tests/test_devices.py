"""What is left out because it does not work here, and what is an error all the same."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InductorError

from varcli.devices import try_compiled
from varcli.errors import ConfigError, is_out_of_memory


class CompilationError(Exception):
    """As Triton's, which are no RuntimeErrors: the place, the program, and at last what is wrong with it."""

    def __str__(self) -> str:
        return "at 3:14:\n    x = tl.load(pointer + offsets)\n              ^\ntype expected"


class OutOfResources(Exception):
    """As Triton's for a kernel that wants more than a GPU's processor has."""


def fail_compiled(error: BaseException, *, is_optional: bool = True) -> tuple[bool, list[str]]:
    """Whether what was compiled works, which raises `error`, and what was told and done."""
    done: list[str] = []

    def work() -> None:
        if "uncompile" not in done:
            raise error
        done.append("plain")

    return try_compiled(work, lambda: done.append("uncompile"), done.append, is_optional=is_optional), done


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("no compiler here\nmore"), "no compiler here"),
        (CompilationError(), "CompilationError: type expected"),
        (OutOfResources("out of resource: shared memory"), "OutOfResources: out of resource: shared memory"),
        (InductorError(CompilationError(), None), "CompilationError: type expected"),
        (BackendCompilerFailed("inductor", KeyError("x"), None), "KeyError: 'x'"),
        (NotImplementedError(), "NotImplementedError: NotImplementedError"),
    ],
)
def test_what_a_compiler_cannot_do_is_told_and_done_without_it(error, reason):
    assert fail_compiled(error) == (False, ["uncompile", f"going without torch.compile: {reason}", "plain"])
    with pytest.raises(type(error)):
        fail_compiled(error, is_optional=False)


FULL = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("MPS backend out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    InductorError(torch.OutOfMemoryError("CUDA out of memory"), None),
]


@pytest.mark.parametrize("error", [*FULL, ConfigError("no such class"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
def test_what_no_compiler_is_to_blame_for_is_raised(error):
    with pytest.raises(type(error)) as caught:
        fail_compiled(error)
    assert caught.value is error


@pytest.mark.parametrize("error", FULL, ids=repr)
def test_memory_that_ran_out_is_known_by_class_text_or_cause(error):
    assert is_out_of_memory(error)
    wrapper = RuntimeError("a step failed")
    wrapper.__cause__ = error
    assert is_out_of_memory(wrapper)
    assert not is_out_of_memory(OutOfResources("out of resource: shared memory"))


def test_a_fault_of_the_work_itself_comes_again():
    def work() -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        try_compiled(work, lambda: None, lambda text: None, is_optional=True)


def test_what_failed_is_no_longer_in_memory_when_it_is_done_again():
    held: list[weakref.ref] = []

    def work() -> None:
        if not held:
            activations = torch.zeros(1)
            held.append(weakref.ref(activations))
            raise CompilationError
        assert held[0]() is None

    assert not try_compiled(work, lambda: None, lambda text: None, is_optional=True)
