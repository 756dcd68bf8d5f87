"""The draw kernel draws what torch draws: on a GPU, and without one in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

LAWS = Path(__file__).with_name("draw_laws.py")

pytest.importorskip("triton")


def test_the_laws_hold_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(LAWS)], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_the_laws_hold_on_a_gpu():
    from kernels import draw_laws

    for law in draw_laws.LAWS:
        law(torch.device("cuda"))


def test_the_kernel_compiles_for_an_h100_without_one():
    """Triton needs no device to compile for one."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from varcli.kernels.draw_triton import _draw_row

    constants = {"HAS_TOP_K": True, "HAS_TOP_P": True, "BLOCK": 4096, "SECOND": 2**16, "MARGIN": 0.1, "CUTS": 7}
    types = {"wanted": "*bf16", "unwanted": "*bf16", "keys": "*i64", "codes": "*i64", "is_bad": "*i32", "salt": "i64"}
    types |= {"strength": "fp32", "quantile": "fp32", "top_p": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in _draw_row.arg_names}
    places = {(_draw_row.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=_draw_row, signature=signature, constexprs=places)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert "cubin" in compiled.asm
