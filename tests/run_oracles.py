"""`run_oracles.py fla REQUESTS ANSWERS`: one library's outputs and gradients for many variants.

A process of its own, because fla and transformers must not be importable together or beside us. The
requests map a variant's name to (inputs by name, initial states, d_output, d_states); an answer is
(output, final states, input gradients by name, initial states' gradients).
"""

import importlib
import sys
from contextlib import contextmanager
from unittest.mock import patch

import torch


@contextmanager
def float32_means_float64():
    """The libraries cast to float32 by name. Here that name means float64: ten digits agree."""
    double = torch.float64
    torch.set_default_dtype(double)
    with (
        patch.multiple(torch, float32=double, float=double),
        patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def answer(function, inputs, states, d_output, d_states):
    inputs = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    states = [x.clone().requires_grad_() for x in states]
    # Some of the functions update their arguments in place, which leaves cannot be.
    output, finals = function(
        **{name: x * 1 for name, x in inputs.items()}, states=[x * 1 for x in states]
    )
    grads = torch.autograd.grad(
        [output, *finals], [*inputs.values(), *states], [d_output, *d_states]
    )
    of_inputs = dict(zip(inputs, grads, strict=False))
    return output.detach(), [x.detach() for x in finals], of_inputs, list(grads[len(inputs) :])


def main(library, requests, answers):
    oracles = importlib.import_module(f"oracle_{library}")
    asked = torch.load(requests)
    with float32_means_float64():
        answered = {name: answer(getattr(oracles, name), *it) for name, it in asked.items()}
    torch.save(answered, answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
