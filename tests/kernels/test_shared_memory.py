"""Programs of kernels with large tiles fit the shared memory of consumer GPUs, 99 KiB. Triton compiles for them anywhere."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
MOST = 99 * 1024  # bytes on capability 8.6, 8.9 and 12.0
HALF = ("q_ptr", "k_ptr", "v_ptr", "qkv_ptr", "out_ptr", "grad_out_ptr", "grad_qkv_ptr")


def shared_memory(
    function: Any, constants: dict[str, Any], half: tuple[str, ...] = HALF, capability: int = 86, **options: Any
) -> int:
    """Bytes of a program of a kernel, whose pointers are to float32 numbers but those named by `half`, all well aligned."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    types = {name: "*bf16" if name in half else "*fp32" if name.endswith("_ptr") else "i32" for name in names}
    types |= {"cap": "fp32"} | {name: "constexpr" for name in constants if name in names}
    places = {(names.index(name),): value for name, value in constants.items() if name in names}
    divisible = {
        (names.index(name),): [["tt.divisibility", 16]] for name in names if name.endswith(("_ptr", "_stride", "width"))
    }
    source = ASTSource(fn=function, signature={name: types[name] for name in names}, constexprs=places, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


@pytest.mark.parametrize("kernel", ["forward", "queries", "keys", "step"])
def test_attention(kernel):
    from varcli.kernels import attention_backward_triton, attention_step_triton, attention_triton

    step = attention_triton.Tiling(attention_step_triton._QUERIES, attention_step_triton._KEYS, 4, 3)
    function, tiling = {
        "forward": (attention_triton._varcli_attend, attention_triton.FORWARD),
        "queries": (attention_backward_triton._varcli_attend_backward_queries, attention_backward_triton.QUERY_TILES),
        "keys": (attention_backward_triton._varcli_attend_backward_keys, attention_backward_triton.KEY_TILES),
        "step": (attention_step_triton._varcli_attend_step, step),
    }[kernel]
    constants = attention_triton.sizes_of((1, 4, 64), 1.0, 4, 64)
    constants |= {"FIRSTS": attention_triton.cut_tiles((1, 4, 64), tiling.tile)}
    constants |= {"QUERIES": tiling.tile, "KEYS": tiling.piece, "KEEPS": True, "IS_EARLY": False}
    if kernel == "keys":
        constants |= {"QUERIES": tiling.piece, "KEYS": tiling.tile}
    assert 0 < shared_memory(function, constants, **tiling.options()) <= MOST


@pytest.mark.parametrize("depth", [1024, 4096, 7680])
def test_products_of_few_rows(depth):
    from varcli.kernels import few_rows_triton as kernels

    constants = {"ACTIVATES": True, "IS_EARLY": True, "DEPTH": depth, "ROWS": kernels.MOST_ROWS}
    constants |= {"COLUMNS": kernels._COLUMNS, "GROUPS": kernels._GROUPS, "PIECE": kernels._PIECE}
    half = ("x_ptr", "weight_ptr", "bias_ptr", "out_ptr")
    taken = shared_memory(
        kernels._varcli_few_rows_product, constants, half, capability=120, num_stages=kernels._NUM_STAGES
    )
    assert 0 < taken <= MOST


@pytest.mark.parametrize("channels", [32, 64, 256])
def test_embedding(channels):
    from varcli.kernels import small_maps_triton as kernels

    tokens, columns = kernels.embedded_at_once(10**6, channels)
    constants = {
        "COPIES": 2,
        "CHANNELS": channels,
        "BLOCK": channels,
        "WIDTH": 1024,
        "TOKENS": tokens,
        "COLUMNS": columns,
    }
    assert 0 < shared_memory(kernels._varcli_embed, constants, ("out_ptr",)) <= MOST
