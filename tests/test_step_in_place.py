"""A decode step that overwrites its states: what it computes, how torch sees it, and what is refused."""

from __future__ import annotations

import pytest
import torch
from calls import arguments, gated, state

import lmoe_compiler as lmoe
from lmoe_compiler.errors import InvalidArgument, UnsupportedTransform
from lmoe_compiler.models import RECURRENCES

step_ = torch.ops.lmoe.step_.default


def token(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [x[:, 0] if i < 4 else x for i, x in enumerate(arguments(T=1, dtype=dtype))]


@pytest.mark.parametrize("implementation", ["torch", "reference", "auto"])
def test_it_is_the_step_with_the_state_overwritten(implementation):
    recurrence, one, S = gated.with_options(implementation=implementation), token(), state()
    wanted = recurrence.step(*one, state=S)
    held = S.clone()
    output, same = recurrence.step(*one, state=held, inplace=True)
    assert same is held
    torch.testing.assert_close((output, held), wanted)


def test_several_states():
    recurrence = RECURRENCES["normalised_linear_attention"]
    one = [torch.randn(2, 3, 4, dtype=torch.float64).abs() for _ in range(3)]
    states = (torch.zeros(2, 3, 4, 4).double(), torch.zeros(2, 3, 4).double())
    wanted = recurrence.step(*one, state=states)
    output, same = recurrence.step(*one, state=states, inplace=True)
    assert all(x is y for x, y in zip(same, states, strict=True))
    torch.testing.assert_close((output, same), wanted)


def test_opcheck():
    torch.library.opcheck(step_, (gated.text(), token(), [state()], "implementation=torch"))


def test_a_decode_loop_compiles_whole():
    """Functionalisation sees the write: the caller's state is advanced, graph or not."""

    def decode(S, *one):
        with torch.no_grad():
            first, _ = gated.step(*one, state=S, inplace=True)
            second, _ = gated.step(*one, state=S, inplace=True)
        return first + second

    one, S = token(), state()
    held, compiled = S.clone(), lmoe.compile(decode, inner="aot_eager", fullgraph=True)
    torch.testing.assert_close((compiled(held, *one), held), (decode(S, *one), S))


def test_a_saved_state_that_was_overwritten_is_noticed():
    """The version counter moves, as for torch's own in-place operations."""
    one, S = token(), state()
    x = torch.ones_like(S, requires_grad=True)
    product = (x * S).sum()
    gated.step(*one, state=S, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_refusals():
    one, S = token(), state()
    with pytest.raises(InvalidArgument, match=r"inplace=True without a state"):
        gated.step(*one, inplace=True)
    with pytest.raises(UnsupportedTransform, match=r"in-place step of gated(.|\n)*overwritten"):
        gated.step(one[0].requires_grad_(), *one[1:], state=S, inplace=True)
    with pytest.raises(UnsupportedTransform, match=r"vmap over an in-place step"):
        torch.func.vmap(lambda q: gated.step(q, *one[1:], state=S, inplace=True)[0])(
            torch.stack([one[0].detach()] * 2)
        )
