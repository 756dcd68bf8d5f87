"""The closed forms against the sizes and work counted on the reference implementation (VAR_SPEC 3.6)."""

from __future__ import annotations

import pytest

from varcli.scales import NAMED_SCHEDULES, PatchNums
from varcli.scaling.flops import forward_flops, num_parameters, sampling_flops, training_flops

COUNTED = [  # depth, schedule, shared AdaLN, parameters, GFLOP forward, forward + backward, sampling with guidance
    (12, "256", False, 133_186_960, 137, 411, 262),
    (16, "256", False, 310_283_520, 310, 930, 601),
    (20, "256", False, 600_917_136, 590, 1_769, 1_151),
    (24, "256", False, 1_033_399_360, 1_002, 3_005, 1_964),
    (30, "256", False, 2_010_020_356, 1_924, 5_770, 3_790),
    (36, "512", True, 2_353_893_904, 11_981, 35_943, 22_804),
]


@pytest.mark.parametrize(("depth", "schedule", "shared", "parameters", "forward", "training", "sampling"), COUNTED)
def test_closed_forms_match_the_counted_table(depth, schedule, shared, parameters, forward, training, sampling):
    lengths, width = PatchNums(NAMED_SCHEDULES[schedule]).step_lengths, 64 * depth
    assert num_parameters(depth, width, step_lengths=lengths, shared_adaln=shared) == parameters
    assert forward_flops(depth, width, lengths) / 1e9 == pytest.approx(forward, rel=0.01)
    assert training_flops(depth, width, lengths) / 1e9 == pytest.approx(training, rel=0.01)
    assert sampling_flops(depth, width, lengths) / 1e9 == pytest.approx(sampling, rel=0.01)
