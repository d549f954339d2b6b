"""What `lmoe bench tune` does on a device, in Triton's interpreter: candidates run as forced, and are judged."""

from __future__ import annotations

import pytest

from lmoe_compiler.bench import trial, tune
from lmoe_compiler.bench.plans import request_of
from lmoe_compiler.bench.workloads import WORKLOADS
from lmoe_compiler.codegen import compiled, run, tuned
from lmoe_compiler.models import RECURRENCES


class Off(trial.Trial):
    """Expects something else in the last tensor."""

    def expected(self):
        *others, last = super().expected()
        return [*others, 1.1 * last]


@pytest.mark.parametrize("direction", tune.DIRECTIONS)
def test_candidates_are_run_and_judged(direction):
    workload = WORKLOADS["gated_delta_rule"]
    shape = (2, 1 if direction in trial.STEPS else 128, 2, 16)
    request = request_of(RECURRENCES[workload.name].program(), direction, shape)
    for choice in list(tune.candidates(request))[:2]:
        run.forget()
        small = trial.check_shape(shape, direction, choice)
        with tuned.forced(direction, choice):
            assert compiled.executable_of(request).plan.choice == choice
            error = trial.Trial.of(workload, small, direction, "cpu").worst_error()
            assert error < tune.TOLERANCE < Off.of(workload, small, direction, "cpu").worst_error()
