"""What was proved of a recurrence, in words: kind, form, ranges of its decays, and what prevents a better form."""

from __future__ import annotations

import linecache
import math
from collections.abc import Iterator
from dataclasses import dataclass

from lmoe_compiler.analysis import interval
from lmoe_compiler.ir.nodes import (
    Decay,
    Loc,
    Next,
    Node,
    Program,
    Read,
    Step,
    const,
    topological,
)
from lmoe_compiler.ir.text import print_expression

# What each kind admits; whether a program gets it, its chunk program says (lower/chunk.py).
FORMS = {
    "identity": "matrix products of one chunk",
    "scalar": "matrix products of one chunk under a decay mask",
    "diagonal": "matrix products of one chunk, decayed by local sums",
    "rank_one": "one unit-triangular solve per chunk",
    "product": "one unit-triangular solve per chunk, a row per micro-step",
    "coupled": "a step per token",
    "elementwise": "a step per token",
    "nonlinear": "a step per token, recomputed from checkpoints in the backward",
}
# Below this a decay's running product over a block of 16 tokens leaves fp32's range (reference in the middle).
SINGLE_REFERENCE = -5.0


@dataclass(frozen=True)
class Proved:
    """What the analysis proved of a program. `str()` is the report."""

    program: Program

    @property
    def kind(self) -> str:
        """The lowest row of the transition table among the states."""
        return self.program.transition.kind

    @property
    def states(self) -> dict[str, str]:
        """The kind of each state."""
        return dict(self.program.transition.states)

    @property
    def form(self) -> str:
        """How this kind lets tokens be computed."""
        return FORMS[self.kind]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.program.name}: {self.kind}, which admits {self.form}"
        for bound in self.program.bounds:
            yield f"  declared: {bound.name} in [{bound.low:g}, {bound.high:g}]"
        unused = [var.name for var in self.program.inputs if var.node not in _used(self.program)]
        if unused:
            yield f"  not used: {', '.join(unused)}"
        for state, kind in self.states.items():
            yield f"  {state}: {kind}"
            for item in self.program.body:
                if isinstance(item, Step) and item.state == state:
                    yield from (f"    {text}" for text in _step(self.program, item))
                elif isinstance(item, Next) and state in item.states:
                    yield from (f"    {text}" for text in _prevented(item))


def _used(program: Program) -> set[Node]:
    """Every node of the program's expressions."""
    roots = [program.output]
    for item in program.body:
        if isinstance(item, Read):
            roots += [item.vector] if item.vector is not None else []
        elif isinstance(item, Next):
            roots += item.values
        else:
            roots += (decay.factor for decay in item.decays)
            roots += (x for f in item.feedbacks for x in (f.key, f.scale, f.read))
            roots += (x for write in item.writes for x in (write.key, write.value))
    return set(topological(roots))


def _step(program: Program, step: Step) -> Iterator[str]:
    for decay in step.decays:
        yield _decay(program, decay)
    for feedback in step.feedbacks:
        merged = len(step.feedbacks) == 1 and [w.key for w in step.writes] == [feedback.key]
        solve = "its key is the write's, so the solve is merged" if merged else "a key of its own"
        when = "" if not step.decays else f", reads {feedback.point} the decay"
        yield f"feedback along {feedback.key.axes[0]}{when}; {solve}"
    if len(step.writes) > 1:
        yield f"{len(step.writes)} writes"


def _decay(program: Program, decay: Decay) -> str:
    names = {v.node: v.name for v in program.inputs}
    axes = ", ".join(decay.factor.axes)
    over = f"decay over [{axes}]" if axes else "decay per token"
    if decay.log is None:
        low, high = interval(decay.factor, program.bounds, dict(program.static))
        text = print_expression(decay.factor, names)
        return (
            f"{over}: {text} in [{low:g}, {high:g}], not proved positive, so it has no logarithm;"
            " declare bounds=, or write it as sigmoid(...) or exp(...)"
        )
    if decay.log == const(-math.inf):
        return f"{over}: 0, so nothing is kept from one token to the next"
    low, high = interval(decay.log, program.bounds, dict(program.static))
    safe = "bounded" if low >= SINGLE_REFERENCE else "unbounded below, so exact local sums"
    grows = "" if high <= 0 else "; may grow: declare a bound <= 0 if it never does"
    return f"{over}: log decay {print_expression(decay.log, names)} in [{low:g}, {high:g}], {safe}{grows}"


def _prevented(item: Next) -> Iterator[str]:
    if item.reason:
        yield f"no better form: {item.reason}"
    if item.loc is not None:
        yield f"  at {item.loc}  {line_text(item.loc)}"


def line_text(loc: Loc) -> str:
    return loc.text or linecache.getline(loc.file, loc.line).strip()
