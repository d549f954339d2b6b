"""A model on P simulated ranks: torch.compile's graph, transformed by passes, run by one thread a
rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lmoe_compiler.runtime.local_world import run_ranks
from lmoe_compiler.runtime.mesh import Axis

Transform = Callable[[fx.GraphModule, Axis], None]


@dataclass
class Run:
    """Outputs and gradients of one rank: by position among the graph's inputs, None for those
    without.
    """

    outputs: list[Tensor]
    grads: list[Tensor | None]


class Captured:
    """The Dynamo graph of a call `function(*args)`, with T (dimension 1) symbolic."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.graph: fx.GraphModule | None = None
        for x in args:
            if isinstance(x, Tensor) and x.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(x, 1)
        torch._dynamo.reset()
        self.places: list[Any] = []
        self.args = args
        torch.compile(function, backend=self._backend, fullgraph=True)(*args)

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graph = gm

        def record(*inputs: Any) -> Any:
            for x in inputs:
                same = (i for i, arg in enumerate(self.args) if arg is x)
                self.places.append(next(same, "T" if isinstance(x, int) else x))
            return gm(*inputs)

        return record

    def flat_inputs(self, *args: Any) -> list[Any]:
        """What the graph gets for these arguments."""
        length = next(x.shape[1] for x in args if isinstance(x, Tensor) and x.dim() > 1)
        return [
            length if isinstance(place, str) else args[place] if isinstance(place, int) else place
            for place in self.places
        ]


def run_graph(gm: Callable[..., Any], inputs: Sequence[Any], weights: Sequence[Tensor]) -> Run:
    """Run on copies; backward of sum <output, weight> over the outputs that have a weight."""
    own = [
        x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for x in inputs
    ]
    outputs = list(gm(*own))
    total = sum((o * w).sum() for o, w in zip(outputs, weights, strict=False))
    if isinstance(total, Tensor) and total.requires_grad:
        total.backward()
    return Run(
        [o.detach() for o in outputs], [x.grad if isinstance(x, Tensor) else None for x in own]
    )


def on_ranks(
    captured: Captured,
    transform: Transform,
    inputs: Sequence[Sequence[Any]],
    weights: Sequence[Sequence[Tensor]],
) -> list[Run]:
    """`inputs[r]`, `weights[r]`: rank r's flat inputs and cotangents. One transformed copy of the
    graph a rank.
    """
    size = len(inputs)

    def one(rank: int, group: str) -> Run:
        gm = graphs[rank]
        return run_graph(gm, inputs[rank], weights[rank])

    # The group of all of the next simulated world has this name; passes only write it down.
    graphs = []
    for rank in range(size):
        gm = copy.deepcopy(captured.graph)
        assert gm is not None
        transform(gm, Axis.on_one_group("sp", size, rank, "0"))
        graphs.append(gm)

    return run_ranks(size, one)
