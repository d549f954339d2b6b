"""The op family: what torch asks of an operator, and that every way into it computes the same.

The oracle is `r.reference`, the definition in plain PyTorch.
"""

from __future__ import annotations

import timeit
from dataclasses import replace
from functools import partial

import pytest
import torch
from calls import arguments, gated, state
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lmoe_compiler import layout, library
from lmoe_compiler.config import Options
from lmoe_compiler.errors import NoSpanMap, UnsupportedTransform
from lmoe_compiler.models import RECURRENCES

TEXT = gated.text()
OPTIONS = Options(implementation="torch", chunk_size=4).text
scan = torch.ops.lmoe.scan.default
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])


def run(*inputs, **named):
    return gated.with_options(implementation="torch", chunk_size=4)(*inputs, **named)


def loss(function, inputs, **named):
    output, final = function(*inputs, return_state=True, **named)
    return output.double().pow(2).sum() + final.double().sin().sum()


def same(actual, expected):
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_output_states_and_gradients_are_the_reference():
    inputs, S = arguments(grad=True), state().requires_grad_()
    actual = run(*inputs, initial_state=S, return_state=True)
    same(actual, gated.reference(*inputs, initial_state=S, return_state=True))
    wanted = torch.autograd.grad(loss(gated.reference, inputs, initial_state=S), [*inputs, S])
    same(torch.autograd.grad(loss(run, inputs, initial_state=S), [*inputs, S]), wanted)


def test_op_and_direct_call_are_one():
    inputs, S = arguments(grad=True), state().requires_grad_()
    direct = library.scan(TEXT, inputs, [S], None, Options.parse(OPTIONS))
    through = scan(TEXT, inputs, [S], None, OPTIONS)
    for a, b in zip(direct, through, strict=True):
        assert torch.equal(a, b)
    grads = [
        torch.autograd.grad(r[0].pow(2).sum() + r[1].sum(), [*inputs, S]) for r in (direct, through)
    ]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@every_dtype
@pytest.mark.parametrize("given_state", [False, True])
def test_opcheck_of_scan(dtype, given_state):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [x.requires_grad_() for x in arguments(dtype=dtype)]
    states = [state(dtype=wide).requires_grad_()] if given_state else []
    torch.library.opcheck(scan, (TEXT, inputs, states, None, OPTIONS))


def test_opcheck_of_strided_and_packed():
    inputs = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in arguments(B=1, T=7)]
    offsets = torch.tensor([0, 3, 7], dtype=torch.int32)
    torch.library.opcheck(scan, (TEXT, inputs, [state(2)], offsets, OPTIONS))


def test_opcheck_of_the_rest():
    inputs, S = arguments(), state()
    output, final = scan(TEXT, inputs, [S], None, OPTIONS)[:2]
    torch.library.opcheck(
        torch.ops.lmoe.scan_backward.default,
        (TEXT, inputs, [S], None, [], output, [final], OPTIONS),
    )
    one = [x[:, 0] if x.dim() > 2 else x for x in inputs]
    torch.library.opcheck(torch.ops.lmoe.step.default, (TEXT, one, [S], OPTIONS))
    span = torch.ops.lmoe.span_map.default
    torch.library.opcheck(span, (TEXT, inputs, None, OPTIONS))
    ends = span(TEXT, inputs, None, OPTIONS)
    torch.library.opcheck(
        torch.ops.lmoe.span_map_backward.default, (TEXT, inputs, None, ends, OPTIONS)
    )


@pytest.mark.parametrize("T", [0, 1])
def test_results_are_no_views_of_arguments(T):
    inputs, S = arguments(T=T), state()
    given = {x.untyped_storage().data_ptr() for x in (*inputs, S) if x.numel()}
    for x in scan(TEXT, inputs, [S], None, OPTIONS):
        assert x.is_contiguous()
        assert not x.numel() or x.untyped_storage().data_ptr() not in given


def test_step_is_a_scan_of_one_token_with_its_gradients():
    inputs, S = arguments(T=1, grad=True), state().requires_grad_()
    one = [x.squeeze(1) if i < 4 else x for i, x in enumerate(inputs)]
    output, final = run(*inputs, initial_state=S, return_state=True)
    stepped, following = gated.with_options(implementation="torch").step(*one, state=S)
    same((stepped, following), (output.squeeze(1), final))
    wanted = torch.autograd.grad(output.pow(2).sum() + final.sin().sum(), [*inputs, S])
    same(torch.autograd.grad(stepped.pow(2).sum() + following.sin().sum(), [*inputs, S]), wanted)


@pytest.mark.parametrize("cut", [0, 2, 5])
def test_span_maps_compose_to_the_scan(cut):
    """S_out = M S_in + E of two spans, one after the other, is the final state of the whole."""
    inputs, S = arguments(grad=True), state()
    whole = run(*inputs, initial_state=S, return_state=True)[1]
    for part in (slice(0, cut), slice(cut, None)):
        piece = [x[:, part] if i < 4 else x for i, x in enumerate(inputs)]
        m, e = torch.ops.lmoe.span_map(TEXT, piece, None, OPTIONS)
        S = m @ S + e
    same([S], [whole])
    wanted = torch.autograd.grad(whole.sin().sum(), inputs, allow_unused=True)
    found = torch.autograd.grad(S.sin().sum(), inputs, allow_unused=True)
    for got, want in zip(found, wanted, strict=True):
        if want is not None:
            same([torch.zeros_like(want) if got is None else got], [want])


@pytest.mark.parametrize(
    ("name", "axes"),
    [("linear_attention", None), ("simple_gla", ()), ("gla", ("K",)), ("delta_rule", ("K", "K'"))],
)
def test_axes_of_span_maps(name, axes):
    assert layout.map_axes(RECURRENCES[name].ir) == [axes]


def test_what_has_no_span_map_says_so():
    nonlinear = next(r for r in RECURRENCES.values() if r.transition.kind == "nonlinear")
    with pytest.raises(NoSpanMap, match=nonlinear.name):
        layout.map_axes(nonlinear.ir)


def test_func_grad_and_per_sample_gradients():
    inputs = arguments()

    def one(*sample):
        return run(*(x.unsqueeze(0) for x in sample[:4]), sample[4]).pow(2).sum()

    each = torch.func.vmap(torch.func.grad(one, argnums=(0, 1, 2, 3, 4)), (0, 0, 0, 0, None))
    leaves = [x.clone().requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(gated.reference(*leaves).pow(2).sum(), leaves)
    actual = each(*inputs)
    same(actual[:4], wanted[:4])
    same([actual[4].sum(0)], [wanted[4]])


def test_vmap_over_any_axis_of_some_arguments():
    q, *rest = arguments()
    many = torch.stack([q, 2 * q, -q], 3)
    mapped = torch.func.vmap(lambda q: run(q, *rest), in_dims=3, out_dims=1)(many)
    same([mapped[:, i] for i in range(3)], [run(many[:, :, :, i], *rest) for i in range(3)])


def jvp():
    q, *rest = arguments()
    torch.func.jvp(lambda q: run(q, *rest), (q,), (q,))


def dual_numbers():
    q, *rest = arguments()
    with torch.autograd.forward_ad.dual_level():
        run(torch.autograd.forward_ad.make_dual(q, q), *rest)


def twice(function=run):
    inputs = arguments(grad=True)
    (d,) = torch.autograd.grad(function(*inputs).pow(2).sum(), inputs[:1], create_graph=True)
    torch.autograd.grad(d.sum(), inputs[0])


def twice_through_the_op():
    twice(lambda *inputs: scan(TEXT, inputs, [], None, OPTIONS)[0])


def grad_of_grad():
    q, *rest = arguments()
    inner = torch.func.grad(lambda q: run(q, *rest).pow(2).sum())
    torch.func.grad(lambda q: inner(q).sum())(q)


def hessian():
    q, *rest = arguments()
    torch.func.hessian(lambda q: run(q, *rest).pow(2).sum())(q)


@pytest.mark.parametrize(
    "transform", [jvp, dual_numbers, twice, twice_through_the_op, grad_of_grad, hessian]
)
def test_what_is_not_differentiable_raises_and_is_never_zero(transform):
    with pytest.raises(UnsupportedTransform, match=r"gated(.|\n)*gated\.reference"):
        transform()


def test_the_reference_is_differentiable_twice():
    twice(gated.reference)


def test_autocast_casts_vectors_and_keeps_gates():
    inputs = arguments(dtype=torch.float32, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(*inputs)
        through = scan(TEXT, inputs, [], None, OPTIONS)[0]
    cast = [x.to(torch.bfloat16) for x in inputs[:3]]
    assert output.dtype == torch.bfloat16
    same([output, through], [run(*cast, *inputs[3:])] * 2)
    output.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in inputs)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    inputs = arguments(grad=True)
    wanted = torch.autograd.grad(run(*inputs).pow(2).sum(), inputs)
    checkpoint(run, *inputs, use_reentrant=use_reentrant).pow(2).sum().backward()
    same([x.grad for x in inputs], wanted)


def test_flops_are_counted_per_token():
    def count(T):
        inputs = arguments(T=T, grad=True)
        with FlopCounterMode(display=False) as counter:
            run(*inputs).sum().backward()
        return counter.get_flop_counts()["Global"]

    once, twice_as_long = count(4), count(8)
    forward, backward = torch.ops.lmoe.scan, torch.ops.lmoe.scan_backward
    assert once[forward] > 0
    assert once[backward] == 2 * once[forward]
    assert twice_as_long[forward] == 2 * once[forward]


@torch.library.custom_op("lmoe_tests::nothing", mutates_args=())
def nothing(text: str, inputs: list[Tensor]) -> list[Tensor]:
    return [x.clone() for x in inputs[:2]]


nothing.register_fake(lambda text, inputs: [x.clone() for x in inputs[:2]])
nothing.register_autograd(
    lambda ctx, grads: (None, ctx.inputs),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "inputs", list(inputs[1])),
)


def test_eager_dispatch_is_cheap(monkeypatch, record_property):
    """All that a call costs beside its kernel, checks included: no more than an empty custom op of torch."""
    inputs = arguments(1, 1, 2, dtype=torch.float32)
    empty = replace(library.OPERATORS["scan"], kernel=lambda *_: [x.clone() for x in inputs[:2]])
    monkeypatch.setitem(library.OPERATORS, "scan", empty)
    leaves = [x.clone().requires_grad_() for x in inputs]
    for name, given in (("inference", inputs), ("training", leaves)):
        call, other = partial(gated, *given), partial(nothing, TEXT, given)
        # Alternating, because other work on the machine slows both.
        rounds = [
            (timeit.timeit(call, number=50), timeit.timeit(other, number=50)) for _ in range(30)
        ]
        direct, through_torch = (min(times) / 50 * 1e6 for times in zip(*rounds, strict=True))
        record_property(f"{name}_us", direct)
        print(f"eager {name}: {direct:.1f} us a call; an empty custom op {through_torch:.1f} us")
        assert direct < 1.5 * through_torch
