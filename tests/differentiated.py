"""One call of a recurrence with all that can be compared: output, final states, all gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cases import weights_like
from torch import Tensor


@dataclass
class Result:
    """The gradients are of <output, w0> + <final states, w1..> with w fixed noise."""

    output: Tensor
    finals: list[Tensor]
    input_grads: dict[str, Tensor]
    state_grads: list[Tensor]

    def tensors(self) -> dict[str, Tensor]:
        named = {"o": self.output} | {f"d{name}": x for name, x in self.input_grads.items()}
        named |= {f"S{n}": x for n, x in enumerate(self.finals)}
        return named | {f"dS{n}": x for n, x in enumerate(self.state_grads)}


def as_argument(states: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """A single state is passed as itself, several as a tuple."""
    return states[0] if len(states) == 1 else tuple(states)


def as_list(states: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [states] if isinstance(states, Tensor) else list(states)


def scan(
    call: Callable[..., Any], inputs: dict[str, Tensor], states: Sequence[Tensor], **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """Output and final states of one call, without a gradient of its own."""
    output, finals = call(
        *inputs.values(), initial_state=as_argument(states), return_state=True, **options
    )
    return output, as_list(finals)


def differentiated(
    call: Callable[..., Any], inputs: dict[str, Tensor], states: Sequence[Tensor], **options: Any
) -> Result:
    """`call` is a recurrence or anything called like one, such as its `reference`."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    starts = [x.detach().requires_grad_() for x in states]
    output, finals = scan(call, leaves, starts, **options)
    everything = [*leaves.values(), *starts]
    pairs = zip([output, *finals], weights_like(output, *finals), strict=True)
    reached = [(x, weight) for x, weight in pairs if x.requires_grad]
    grads = torch.autograd.grad(
        [x for x, _ in reached], everything, [w for _, w in reached], allow_unused=True
    )
    # An unused input (T = 0, or a state that nothing reads) has gradient zero, however it is said.
    grads = [
        torch.zeros_like(x) if g is None else g for x, g in zip(everything, grads, strict=True)
    ]
    of_inputs = dict(zip(leaves, grads, strict=False))
    return Result(
        output.detach(), [x.detach() for x in finals], of_inputs, list(grads[len(leaves) :])
    )


def assert_same(actual: Result, expected: Result, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    """Equal up to float64 rounding over some dozens of tokens; the message names the tensor."""
    expected_tensors = expected.tensors()
    for name, x in actual.tensors().items():
        torch.testing.assert_close(
            x, expected_tensors[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
