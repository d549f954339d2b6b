"""The op family: a recurrence in a graph is one node whose first argument is the program's text.

    lmoe::scan               o, final states, saved         whole sequences
    lmoe::scan_backward      gradients of inputs, states
    lmoe::span_map           M of each state that has one, E of each state: S_out = M S_in + E
    lmoe::span_map_backward  gradients of inputs
    lmoe::step               o, next states                 one decode step
    lmoe::step_              o                              the same, into the given states

Nothing is registered per recurrence. Each op has a fake kernel (which also checks the call), an autograd formula
whose backward is an op of the family, vmap and autocast rules (transforms.py) and a FLOP formula. `call` is how the
rest of the package runs an op: in plain eager it goes round the dispatcher; torch.compile, torch.func, dispatch modes,
profilers and tensor subclasses take the op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad

from lmoe_compiler import kernels, layout, transforms
from lmoe_compiler.checks import check
from lmoe_compiler.config import Options
from lmoe_compiler.errors import UnsupportedTransform
from lmoe_compiler.flops import flop_formula
from lmoe_compiler.kernels import parse
from lmoe_compiler.layout import Tensors

Run = Callable[..., list[Tensor]]
STEPS = ("step", "step_")

SCHEMAS = {
    "scan": "str program, Tensor[] inputs, Tensor[] states, Tensor? cu_seqlens, str options",
    "scan_backward": "str program, Tensor[] inputs, Tensor[] states, Tensor? cu_seqlens, "
    "Tensor[] saved, Tensor d_output, Tensor[] d_states, str options",
    "span_map": "str program, Tensor[] inputs, Tensor? cu_seqlens, str options",
    "span_map_backward": "str program, Tensor[] inputs, Tensor? cu_seqlens, Tensor[] d_results, "
    "str options",
    "step": "str program, Tensor[] inputs, Tensor[] states, str options",
    "step_": "str program, Tensor[] inputs, Tensor(a!)[] states, str options",
}


@dataclass(frozen=True)
class Derivative:
    """What the forward keeps and how the backward uses it; the op and the direct path share it."""

    setup: Callable[[Any, tuple[Any, ...], list[Tensor]], None]
    backward: Callable[[Any, Sequence[Any]], tuple[Any, ...]]


def _setup_scan(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    text, tokens, states, cu_seqlens, options = inputs
    saved = output[1 + len(parse(text).states) :]
    ctx.call = (text, options, len(tokens), len(states))
    ctx.save_for_backward(*tokens, *states, *saved, cu_seqlens)
    if saved:
        ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)


def _differentiate_scan(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    text, options, num_inputs, num_states = ctx.call
    *tensors, cu_seqlens = ctx.saved_tensors
    inputs, states = tensors[:num_inputs], tensors[num_inputs : num_inputs + num_states]
    saved = tensors[num_inputs + num_states :]
    program = parse(text)
    d_output, *d_states = grads[: 1 + len(program.states)]
    if all([d is None for d in d_states]):
        d_states = []
    if d_output is None or any([d is None for d in d_states]):
        sizes = layout.measure(program, inputs, states, cu_seqlens)
        zeros = [x.zero_() for x in kernels.fake_results(program, sizes, inputs)]
        d_output = zeros[0] if d_output is None else d_output
        d_states = [z if d is None else d for d, z in zip(d_states, zeros[1:], strict=False)]
    results = call(
        "scan_backward", text, inputs, states, cu_seqlens, saved, d_output, d_states, options
    )
    return None, results[:num_inputs], results[num_inputs:], None, None


def _setup_span_map(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    text, tokens, cu_seqlens, options = inputs
    ctx.call = (text, options)
    ctx.save_for_backward(*tokens, cu_seqlens)


def _differentiate_span_map(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    text, options = ctx.call
    *inputs, cu_seqlens = ctx.saved_tensors
    return (
        None,
        call("span_map_backward", text, inputs, cu_seqlens, list(grads), options),
        None,
        None,
    )


def _setup_step(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    text, tokens, states, options = inputs
    ctx.call = (text, options, len(tokens))
    ctx.save_for_backward(*tokens, *states)
    ctx.set_materialize_grads(False)


def _differentiate_step(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """A step is a scan of one token, and is differentiated as one."""
    text, options, num_inputs = ctx.call
    inputs, states = ctx.saved_tensors[:num_inputs], list(ctx.saved_tensors[num_inputs:])
    program = parse(text)
    rows = [
        x.unsqueeze(1) if var.kind == "token" else x
        for var, x in zip(program.inputs, inputs, strict=True)
    ]
    output, *rest = call("scan", text, rows, states, None, options)
    ends, saved = rest[: len(program.states)], rest[len(program.states) :]
    d_output = torch.zeros_like(output) if grads[0] is None else grads[0].unsqueeze(1)
    d_states = [
        torch.zeros_like(x) if d is None else d for d, x in zip(grads[1:], ends, strict=True)
    ]
    results = call("scan_backward", text, rows, states, None, saved, d_output, d_states, options)
    d_inputs = [d.reshape(x.shape) for d, x in zip(results, inputs, strict=False)]
    return None, d_inputs, results[num_inputs:], None


def _setup_refusal(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.call = inputs[0]


def _refuse_second(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    raise UnsupportedTransform(
        f"second derivative through {parse(ctx.call).name}",
        why="the backward of a compiled recurrence is not differentiable",
        try_=f"{parse(ctx.call).name}.reference(...), which is differentiable any number of times",
    )


def _in_place(text: str) -> UnsupportedTransform:
    name = parse(text).name
    return UnsupportedTransform(
        f"gradient through an in-place step of {name}",
        why="the states before the step, which a backward needs, are overwritten",
        try_=f"{name}.step(..., state=S), or torch.no_grad() around the loop",
    )


@dataclass(frozen=True)
class Operator:
    """`derivative` is None where there is none: the operator overwrites what a backward needs."""

    kernel: Callable[..., Any]
    fake: Callable[..., Any]
    derivative: Derivative | None
    # Operations per operation of the recurrence: a backward multiplies by both operands' adjoints.
    cost: int
    forward: bool = True


_REFUSE_SECOND = Derivative(_setup_refusal, _refuse_second)
OPERATORS = {
    "scan": Operator(
        kernels.scan, kernels.fake_scan, Derivative(_setup_scan, _differentiate_scan), 1
    ),
    "scan_backward": Operator(
        kernels.scan_backward, kernels.fake_scan_backward, _REFUSE_SECOND, 2, False
    ),
    "span_map": Operator(
        kernels.span_map,
        kernels.fake_span_map,
        Derivative(_setup_span_map, _differentiate_span_map),
        1,
    ),
    "span_map_backward": Operator(
        kernels.span_map_backward, kernels.fake_span_map_backward, _REFUSE_SECOND, 2, False
    ),
    "step": Operator(
        kernels.step, kernels.fake_step, Derivative(_setup_step, _differentiate_step), 1
    ),
    "step_": Operator(kernels.step_, kernels.fake_step_, None, 1),
}


def _register(name: str, operator: Operator) -> None:
    qualified = f"lmoe::{name}"
    # Functionalisation takes an operator that writes to arguments only if it returns no list.
    returns = "Tensor" if operator.derivative is None else "Tensor[]"
    schema = f"({SCHEMAS[name]}) -> {returns}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "CompositeExplicitAutograd")(operator.kernel)
    torch.library.register_fake(qualified, operator.fake)
    torch.library.impl(qualified, "Autograd")(partial(_autograd, name))
    torch.library.register_vmap(qualified, transforms.vmap_rule(name, SCHEMAS[name], parse))
    for device in transforms.DEVICES:
        kernel = transforms.autocast_kernel(_op(name), device, parse, cast=operator.forward)
        torch.library.impl(qualified, f"Autocast{device.upper()}")(kernel)

    def flops(text: str, inputs: Tensors, *rest: Any, **_: Any) -> int:
        program = parse(text)
        sizes = layout.measure(program, inputs, (), None, step=name in STEPS)
        return operator.cost * layout.multiply_adds(program, sizes)

    flop_formula(getattr(torch.ops.lmoe, name), get_raw=True)(flops)


def _op(name: str) -> Any:
    return getattr(torch.ops.lmoe, name).default


class _Differentiable(torch.autograd.Function):
    """An op and its derivative, as autograd and torch.func see it. `run` is the kernel, or the op below autograd."""

    @staticmethod
    def forward(run: Run, name: str, text: str, args: list[Any], *flat: Any) -> tuple[Any, ...]:
        return tuple(run(text, *_nest(args, flat)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _, name, text, args, *flat = inputs
        ctx.derivative, ctx.program = OPERATORS[name].derivative, text
        ctx.derivative.setup(ctx, (text, *_nest(args, flat)), output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        _, *results = ctx.derivative.backward(ctx, list(grads))
        return None, None, None, None, *_flatten(results)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        name = parse(ctx.program).name
        raise UnsupportedTransform(
            f"forward-mode derivative (jvp) through {name}",
            why="a compiled recurrence has a backward but no tangent rule",
            try_=f"{name}.reference(...), which supports jvp",
        )


class _Direct(_Differentiable):
    """The same where nothing wraps tensors: `args` are the flat ones already."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, run: Run, name: str, text: str, args: list[Any], *flat: Any
    ) -> tuple[Any, ...]:
        results = run(text, *args)
        ctx.derivative, ctx.program = OPERATORS[name].derivative, text
        ctx.derivative.setup(ctx, (text, *args), results)
        return tuple(results)

    # Autograd's own: the context comes to `forward`.
    setup_context = torch.autograd.Function.setup_context


# Function.apply without its check for torch.func: the dispatcher has already taken this op to one level of autograd.
_apply = super(torch.autograd.Function, _Differentiable).apply
_apply_direct = super(torch.autograd.Function, _Direct).apply


def _wants_derivative(flat: Sequence[Tensor | None]) -> bool:
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in flat)


def _autograd(name: str, text: str, *args: Any) -> Any:
    """The op's kernel at the autograd key."""

    grad_mode = torch.is_grad_enabled()

    def below(*arguments: Any) -> Any:
        # autograd.Function turns grad mode off; torch.func's outer levels, which run below here, need it as it was.
        with torch.set_grad_enabled(grad_mode), torch._C._AutoDispatchBelowAutograd():
            return _op(name)(*arguments)

    flat = _flatten(args)
    if not _wants_derivative(flat):
        return below(text, *args)
    if OPERATORS[name].derivative is None:
        raise _in_place(text)
    with enable_single_level_autograd_function():
        return list(_apply(below, name, text, args, *flat))


def _flatten(args: Sequence[Any]) -> list[Any]:
    """The tensors among arguments: lists are opened, text is dropped."""
    flat: list[Any] = []
    for arg in args:
        if isinstance(arg, list):
            flat += arg
        elif not isinstance(arg, str):
            flat.append(arg)
    return flat


def _nest(args: Sequence[Any], flat: Sequence[Any]) -> list[Any]:
    """`args` with its tensors taken from `flat` again."""
    rest = iter(flat)
    return [
        [next(rest) for _ in arg]
        if isinstance(arg, list)
        else arg
        if isinstance(arg, str)
        else next(rest)
        for arg in args
    ]


_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _direct(tensors: Sequence[Any]) -> bool:
    """Nothing stands between the call and the kernel."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and (device := tensors[0].device.type) in transforms.DEVICES
        and not torch.is_autocast_enabled(device)
        and not torch.autograd.profiler._is_profiler_enabled
        and all([x is None or type(x) in _PLAIN for x in tensors])
    )


@lru_cache(maxsize=4096)
def _check(text: str, specs: tuple[Any, ...], num_inputs: int, step: bool) -> None:
    """The checks of a plain call: for sizes that were seen before they cost a look-up."""
    *tensors, offsets = specs
    found = [layout.Spec(*given) for given in tensors]
    cu_seqlens = None if offsets is None else layout.Spec(*offsets)
    check(parse(text), found[:num_inputs], found[num_inputs:], cu_seqlens, step=step)


def call(name: str, text: str, *args: Any) -> list[Tensor]:
    """Run an op of the family on arguments that follow its schema and were checked."""
    flat = _flatten(args)
    if torch.compiler.is_compiling() or not _direct(flat):
        return _op(name)(text, *args)
    return _run(name, text, args, flat)


def _run(name: str, text: str, args: tuple[Any, ...], flat: list[Tensor | None]) -> Any:
    kernel = OPERATORS[name].kernel
    if _wants_derivative(flat):
        if OPERATORS[name].derivative is None:
            raise _in_place(text)
        return list(_apply_direct(kernel, name, text, args, *flat))
    return kernel(text, *args)


def _checked_call(
    name: str,
    text: str,
    inputs: list[Tensor],
    states: list[Tensor],
    cu_seqlens: Tensor | None,
    *rest: Any,
) -> Any:
    if torch.compiler.is_compiling():
        return _op(name)(text, inputs, states, *rest)
    program, step = parse(text), name in STEPS
    flat = [*inputs, *states, cu_seqlens]
    if not _direct(flat):
        inputs = transforms.autocast(program, inputs)
        # Symbolic sizes belong to whoever traces them; the fake kernel checks those.
        if all(type(n) is int for x in (*inputs, *states) for n in x.shape):
            check(program, inputs, states, cu_seqlens, step=step)
        return _op(name)(text, inputs, states, *rest)
    specs = tuple([None if x is None else (x.shape, x.dtype, x.device) for x in flat])
    _check(text, specs, len(inputs), step)
    args = (inputs, states, *rest)
    return _run(name, text, args, flat[:-1] if step else flat)


def scan(
    text: str,
    inputs: list[Tensor],
    states: list[Tensor],
    cu_seqlens: Tensor | None,
    options: Options,
) -> list[Tensor]:
    """o [B, T, H, *axes], the final states [N, H, *axes], then what the backward keeps. No `states` means zeros."""
    return _checked_call("scan", text, inputs, states, cu_seqlens, cu_seqlens, options.text)


def step(text: str, inputs: list[Tensor], states: list[Tensor], options: Options) -> list[Tensor]:
    """o [B, H, *axes] and the next states of one decode step; no `states` means zeros."""
    return _checked_call("step", text, inputs, states, None, options.text)


def step_(text: str, inputs: list[Tensor], states: list[Tensor], options: Options) -> Tensor:
    """o [B, H, *axes] of one decode step; `states` become the next states."""
    output: Tensor = _checked_call("step_", text, inputs, states, None, options.text)
    return output


for _name, _operator in OPERATORS.items():
    _register(_name, _operator)
