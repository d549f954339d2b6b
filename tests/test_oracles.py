"""Every recurrence against independent implementations: outputs, final states, all gradients."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case
from oracle_answers import from_library, from_numpy, request

# All in float64. Central differences with step 1e-6 are good to about 1e-8 for values of order one.
CLOSE = {
    "fla": {"rtol": 1e-10, "atol": 1e-11},
    "transformers": {"rtol": 1e-10, "atol": 1e-11},
    "numpy": {"rtol": 1e-7, "atol": 1e-7},
}
PAIRS = [(case, oracle) for case in CASES for oracle in case.oracles]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory, worker_id):
    """One folder for all xdist workers of this session."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.mark.parametrize(("case", "oracle"), PAIRS, ids=lambda value: str(value))
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_agrees_with_oracle(case: Case, oracle: str, implementation: str, shared_folder):
    expected = (
        from_numpy(case) if oracle == "numpy" else from_library(oracle, shared_folder)[case.name]
    )
    inputs, states, d_output, d_states = request(case)
    leaves = [x.requires_grad_() for x in (*inputs.values(), *states)]

    recurrence = case.recurrence.with_options(implementation=implementation)
    start = states[0] if len(states) == 1 else tuple(states)
    output, finals = recurrence(*inputs.values(), initial_state=start, return_state=True)
    finals = [finals] if len(states) == 1 else list(finals)
    grads = torch.autograd.grad([output, *finals], leaves, [d_output, *d_states])

    actual = (
        output,
        finals,
        dict(zip(inputs, grads, strict=False)),
        list(grads[len(inputs) :]),
    )
    torch.testing.assert_close(actual, expected, **CLOSE[oracle])
