"""The bodies of the ops in library.py: real kernels, which call an implementation, and fake ones.

A fake kernel checks the call and gives the shapes, dtypes and strides of the results; everything is contiguous.
Arguments are those of the schemas: program text, tensors as lists, options as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lmoe_compiler import layout
from lmoe_compiler.checks import check, check_values, verify
from lmoe_compiler.config import Options, environment
from lmoe_compiler.implementation import choose, keeper
from lmoe_compiler.ir.nodes import Program
from lmoe_compiler.ir.parse import parse as parse_text
from lmoe_compiler.layout import Tensors


@cache
def parse(text: str) -> Program:
    """The program of an op's first argument."""
    return parse_text(text)


def scan(
    text: str, inputs: Tensors, states: Tensors, cu_seqlens: Tensor | None, options: str
) -> list[Tensor]:
    program, chosen = parse(text), Options.parse(options)
    if chosen.debug or inputs[0].device.type == "cpu":
        check_values(program, inputs, cu_seqlens, debug=chosen.debug)
    run = choose("scan", program, inputs, chosen)
    output, finals, saved = run(program, inputs, states or None, cu_seqlens, chosen)
    if environment().verify:
        verify(program, inputs, states, cu_seqlens, [output, *finals])
    return [output, *finals, *saved]


def scan_backward(
    text: str,
    inputs: Tensors,
    states: Tensors,
    cu_seqlens: Tensor | None,
    saved: Tensors,
    d_output: Tensor,
    d_states: Tensors,
    options: str,
) -> list[Tensor]:
    program, chosen = parse(text), Options.parse(options)
    run = choose("scan_backward", program, inputs, chosen)
    ends: Sequence[Tensor | None] = d_states or [None] * len(program.states)
    d_inputs, d_initial = run(
        program, inputs, states or None, cu_seqlens, saved, d_output, ends, chosen
    )
    return [*d_inputs, *(d_initial or ())]


def span_map(text: str, inputs: Tensors, cu_seqlens: Tensor | None, options: str) -> list[Tensor]:
    program, chosen = parse(text), Options.parse(options)
    maps, ends = choose("span_map", program, inputs, chosen)(program, inputs, cu_seqlens, chosen)
    return [*(m for m in maps if m is not None), *ends]


def span_map_backward(
    text: str, inputs: Tensors, cu_seqlens: Tensor | None, d_results: Tensors, options: str
) -> list[Tensor]:
    program, chosen = parse(text), Options.parse(options)
    d_maps, d_ends = layout.split_maps(program, d_results)
    run = choose("span_map_backward", program, inputs, chosen)
    return run(program, inputs, cu_seqlens, d_maps, d_ends, chosen)


def step(text: str, inputs: Tensors, states: Tensors, options: str) -> list[Tensor]:
    program, chosen = parse(text), Options.parse(options)
    output, following = choose("step", program, inputs, chosen)(
        program, inputs, states or None, chosen
    )
    return [output, *following]


def step_(text: str, inputs: Tensors, states: Tensors, options: str) -> Tensor:
    program, chosen = parse(text), Options.parse(options)
    output: Tensor = choose("step_", program, inputs, chosen)(program, inputs, states, chosen)
    torch.autograd.graph.increment_version(states)
    return output


def fake_scan(
    text: str, inputs: Tensors, states: Tensors, cu_seqlens: Tensor | None, options: str
) -> list[Tensor]:
    program, chosen = parse(text), Options.parse(options)
    check(program, inputs, states, cu_seqlens)
    sizes = layout.measure(program, inputs, states, cu_seqlens)
    kept = keeper(program, inputs, chosen)(program, inputs, states or None, cu_seqlens, chosen)
    return [*fake_results(program, sizes, inputs), *kept]


def fake_step(text: str, inputs: Tensors, states: Tensors, options: str) -> list[Tensor]:
    program = parse(text)
    check(program, inputs, states, None, step=True)
    return fake_results(program, layout.measure(program, inputs, states, None, step=True), inputs)


def fake_step_(text: str, inputs: Tensors, states: Tensors, options: str) -> Tensor:
    return fake_step(text, inputs, states, options)[0]


def fake_results(program: Program, sizes: layout.Sizes, inputs: Tensors) -> list[Tensor]:
    token = inputs[layout.first_token(program)]
    finals = [token.new_empty(sizes.state(var), dtype=sizes.accumulate) for var in program.states]
    return [token.new_empty(sizes.output(program)), *finals]


def fake_scan_backward(text: str, inputs: Tensors, states: Tensors, *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (*inputs, *states)]


def fake_span_map(
    text: str, inputs: Tensors, cu_seqlens: Tensor | None, options: str
) -> list[Tensor]:
    program = parse(text)
    check(program, inputs, (), cu_seqlens)
    sizes = layout.measure(program, inputs, (), cu_seqlens)
    shapes = [sizes.map(axes) for axes in layout.map_axes(program) if axes is not None]
    shapes += [sizes.map(var.axes) for var in program.states]
    return [inputs[0].new_empty(shape, dtype=sizes.accumulate) for shape in shapes]


def fake_span_map_backward(text: str, inputs: Tensors, *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs]
