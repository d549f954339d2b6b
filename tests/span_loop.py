"""Span maps for the token loop: the map is read off what a span does to unit states.

With it the token loop is a whole implementation, so passes over sequences are tested on any
recurrence, and against something that shares no code with the compiled span maps.
"""

from __future__ import annotations

import torch
from token_loop import TokenLoop, _AutogradOn, _grad, _run

from lmoe_compiler import layout


def _units(axes, map_axes, sizes):
    """States that show the map: one for each column of a dense M, otherwise one of ones."""
    dense = [a.rstrip("'") for a in map_axes if a.endswith("'")]
    if not dense:
        yield torch.ones([sizes.dims[a] for a in axes], dtype=torch.float64)
        return
    for i in range(sizes.dims[dense[0]]):
        unit = torch.zeros([sizes.dims[a] for a in axes], dtype=torch.float64)
        unit.select(axes.index(dense[0]), i).fill_(1)
        yield unit


def _span(program, inputs, cu_seqlens):
    """Differentiable (M or None, E) of each state, for the part of the last document."""
    start = 0 if cu_seqlens is None else int(cu_seqlens[-2])
    tokens = [
        x[:, start:] if v.kind == "token" else x
        for v, x in zip(program.inputs, inputs, strict=True)
    ]
    sizes = layout.measure(program, tokens, (), None)
    shapes = [sizes.state(var) for var in program.states]
    zeros = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    ends = _run(program, tokens, zeros, None)[1]
    maps = []
    for i, (var, axes) in enumerate(zip(program.states, layout.map_axes(program), strict=True)):
        if axes is None:
            maps.append(None)
            continue
        columns = []
        for unit in _units(var.axes, axes, sizes):
            states = [unit.expand(shapes[i]) if j == i else z for j, z in enumerate(zeros)]
            moved = _run(program, tokens, states, None)[1][i] - ends[i]
            kept = [a for a in var.axes if a in axes]
            for position, axis in reversed(list(enumerate(var.axes))):
                if axis not in kept:
                    moved = moved.select(2 + position, 0)
            columns.append(moved)
        dense = any(a.endswith("'") for a in axes)
        m = torch.stack(columns, -1) if dense else columns[0]
        maps.append(m * 0 if start > 0 else m)
    return maps, ends


class SpanLoop(TokenLoop):
    def span_map(self, program, inputs, cu_seqlens, options):
        with torch.no_grad():
            maps, ends = _span(program, inputs, cu_seqlens)
        copy = [None if m is None else m.clone(memory_format=torch.contiguous_format) for m in maps]
        return copy, [e.clone(memory_format=torch.contiguous_format) for e in ends]

    def span_map_backward(self, program, inputs, cu_seqlens, d_maps, d_ends, options):
        with _AutogradOn():
            leaves = [x.detach().contiguous().requires_grad_() for x in inputs]
            maps, ends = _span(program, leaves, cu_seqlens)
            pairs = [(m, d) for m, d in zip((*maps, *ends), (*d_maps, *d_ends), strict=True)]
            pairs = [(m, d) for m, d in pairs if m is not None]
            return _grad([m for m, _ in pairs], [d for _, d in pairs], leaves)
