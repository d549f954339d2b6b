"""Every recurrence against independent implementations: outputs, final states, all gradients."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case
from differentiated import differentiated
from oracle_answers import from_library, from_numpy, request

# All in float64. Central differences with step 1e-6 are good to about 1e-8 for values of order one.
EXACT = {"rtol": 1e-10, "atol": 1e-11}
GRADIENTS = {"fla": EXACT, "transformers": EXACT, "numpy": {"rtol": 1e-7, "atol": 1e-7}}
PAIRS = [(case, oracle) for case in CASES for oracle in case.oracles]


@pytest.mark.parametrize(("case", "oracle"), PAIRS, ids=lambda value: str(value))
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_agrees_with_oracle(case: Case, oracle: str, implementation: str, shared_folder):
    output, finals, of_inputs, of_states = (
        from_numpy(case) if oracle == "numpy" else from_library(oracle, shared_folder)[case.name]
    )
    call = case.recurrence.with_options(implementation=implementation)
    actual = differentiated(call, *request(case))
    torch.testing.assert_close(actual.output, output, **EXACT)
    torch.testing.assert_close(actual.finals, finals, **EXACT)
    torch.testing.assert_close(actual.input_grads, of_inputs, **GRADIENTS[oracle])
    torch.testing.assert_close(actual.state_grads, of_states, **GRADIENTS[oracle])
