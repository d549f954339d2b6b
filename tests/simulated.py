"""A model on P simulated ranks: torch.compile's graph, transformed by passes, run by one thread a
rank.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lmoe_compiler.config import CompileOptions
from lmoe_compiler.passes import pipeline
from lmoe_compiler.passes.base import GraphRecord, PassPipeline
from lmoe_compiler.runtime.local_world import run_ranks
from lmoe_compiler.runtime.mesh import Axis, axis_of

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


class Meshed:
    """Ranks of a mesh with these axes, and the passes of `lmoe.compile(mesh=..., **options)` on each."""

    def __init__(self, shape: Mapping[str, int], **options: Any) -> None:
        self.shape, self.options, self.size = shape, options, math.prod(shape.values())
        self.pipelines = run_ranks(self.size, lambda rank, _: self._passes())

    def _passes(self) -> PassPipeline:
        """Makes the groups, which have the same names in every simulated world of this mesh."""
        axis_of.cache_clear()
        return pipeline(CompileOptions(mesh=self._mesh(), **self.options))

    def _mesh(self) -> DeviceMesh:
        names = tuple(self.shape)
        return init_device_mesh("cpu", tuple(self.shape.values()), mesh_dim_names=names)

    def place(self, rank: int, *axes: str) -> int:
        """A rank's place on some axes taken as one."""
        index = 0
        for name in axes:
            behind = math.prod(list(self.shape.values())[list(self.shape).index(name) + 1 :])
            index = index * self.shape[name] + rank // behind % self.shape[name]
        return index

    def transformed(self, captured: Captured) -> list[fx.GraphModule]:
        """The graph of each rank."""
        assert captured.graph is not None
        graphs = [copy.deepcopy(captured.graph) for _ in range(self.size)]
        for passes, gm in zip(self.pipelines, graphs, strict=True):
            passes.run(gm, GraphRecord())
        return graphs

    def run(
        self,
        graphs: Sequence[fx.GraphModule],
        inputs: Sequence[Sequence[Any]],
        weights: Sequence[Tensor],
    ) -> list[Run]:
        """`inputs[r]`: rank r's flat inputs; the same cotangents for all."""

        def one(rank: int, _: str) -> Run:
            self._passes()
            return run_graph(graphs[rank], inputs[rank], weights)

        return run_ranks(self.size, one)
