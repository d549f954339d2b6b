"""`lmoe.explain(model, *args)`: every stage of a compiled model, from IR to ATen graphs.

The model is compiled once more, with the same passes and without Inductor, and run once forward and
backward; nothing about it changes.
The command `lmoe explain` is in report.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lmoe_compiler.backend import lmoe_backend
from lmoe_compiler.config import CompileOptions
from lmoe_compiler.definition import Recurrence, parse
from lmoe_compiler.errors import InvalidOption
from lmoe_compiler.passes.base import GraphRecord, Record
from lmoe_compiler.stages import Stage, of_program, render


@dataclass(frozen=True)
class Explanation:
    """Stages in their order. `str()` is the page for a terminal; `explanation["pass lower_experts"]` is one stage."""

    stages: tuple[Stage, ...]

    def __str__(self) -> str:
        return render(self.stages)

    def __getitem__(self, title: str) -> str:
        for name, text in self.stages:
            if name == title:
                return text
        raise KeyError(f"{title!r}; there is {', '.join(name for name, _ in self.stages)}")


def explain(model: Callable[..., Any], *args: Any, **options: Any) -> Explanation:
    """Stages of `model(*args)` compiled with these options (those of `lmoe.compile`), or of a recurrence."""
    if isinstance(model, Recurrence):
        return Explanation(tuple(of_program(model.ir)))
    record = Record(texts=True)
    settings = {"inner": "aot_eager", **options, "record": record}
    chosen = CompileOptions.of(settings)
    if chosen.inner == "inductor":
        raise InvalidOption(
            "explain does not run Inductor",
            why="its own output is in TORCH_LOGS=output_code",
            try_='lmoe.explain(model, x, inner="aot_eager")',
        )
    original = getattr(model, "_orig_mod", model)
    compiled = torch.compile(original, backend=lmoe_backend, options=settings, dynamic=False)
    _backward(compiled(*args), [*getattr(original, "parameters", list)(), *args])
    return Explanation(tuple(_stages(record)))


def _backward(output: Any, leaves: Sequence[Any]) -> None:
    """Run the backward, which is compiled when it first runs; no gradient is kept."""
    results = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
    wanted = [x for x in tree_leaves(leaves) if isinstance(x, Tensor) and x.requires_grad]
    if results and wanted:
        ones = [torch.ones_like(x) for x in results]
        torch.autograd.grad(results, wanted, ones, allow_unused=True)


def _stages(record: Record) -> Iterator[Stage]:
    programs = dict.fromkeys(text for graph in record.graphs for text, _ in graph.programs)
    for text in programs:
        program = parse(text).ir
        for title, page in of_program(program):
            yield f"{program.name}: {title}", page
    for number, graph in enumerate(record.graphs):
        prefix = f"graph {number}: " if len(record.graphs) > 1 else ""
        for title, page in _graph_stages(graph):
            yield prefix + title, page


def _graph_stages(graph: GraphRecord) -> Iterator[Stage]:
    yield "model graph", graph.before
    for done in graph.passes:
        yield f"pass {done.report.name}", "\n".join(filter(None, [str(done), done.after]))
    for direction, text in graph.lowered:
        yield f"{direction} after AOTAutograd", text
