"""Compiling a model block by block, each block one graph: what FSDP2 and DDP wrap, and what a pipeline stage holds.

    lmoe.compile_blocks(model, mesh=mesh, sequence_parallel="sp")
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["dp"])

FSDP2 gathers a block's weights before its forward and frees them after it, in hooks, which torch cannot trace into one
graph of a whole model (torch 2.13). So the blocks' own `forward`s are compiled, in place: hooks run around them, names
of parameters and checkpoints stay. The blocks are the model's children, a ModuleList's entries one by one, so embedding,
norm, head and losses are blocks as layers are, and each graph finds the global offset and counts by itself.

Passes see one block at a time. What a model computes *between* its blocks no pass sees, and on a shard of the sequence
it would be this rank's numbers in silence; so with sequence_parallel a forward that does more than hand values from
block to block is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import fx, nn

from lmoe_compiler.backend import compile
from lmoe_compiler.config import CompileOptions
from lmoe_compiler.errors import MixesTokens

M = TypeVar("M", bound=nn.Module)


def compile_blocks(model: M, /, *, dynamic: bool | None = None, **options: Any) -> M:
    """Compile every block of `model` in place, with the options of `lmoe.compile`; gives the model back.

    Call it after `lmoe.parallelize` and before DDP or fully_shard, which wrap what is compiled here. Raises MixesTokens
    if the sequence is cut over ranks and the model computes anything outside of its blocks.
    """
    blocks = dict(_blocks(model))
    if CompileOptions.of(options).sequence_parallel is not None:
        _refuse_work_between(model, blocks)
    for block in blocks.values():
        block.forward = compile(block.forward, fullgraph=True, dynamic=dynamic, **options)
    return model


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from ((f"{name}.{key}", block) for key, block in child.named_children())
        else:
            yield name, child


class _Chain(fx.Tracer):
    """Records a forward in which blocks are opaque."""

    def __init__(self, blocks: dict[str, nn.Module]) -> None:
        super().__init__()
        self.blocks, self.record_stack_traces = set(blocks.values()), True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.blocks


def _refuse_work_between(model: nn.Module, blocks: dict[str, nn.Module]) -> None:
    try:
        graph = _Chain(blocks).trace(model)
    except Exception as error:
        raise MixesTokens(
            f"cannot see what {type(model).__name__} does between its blocks: {error}",
            why="on a shard of the sequence it would compute this rank's numbers, unseen by any pass",
            try_=_ADVICE,
        ) from error
    for node in graph.nodes:
        if node.op in ("placeholder", "call_module", "output"):
            continue
        if node.target not in (operator.getitem, getattr):
            raise MixesTokens(
                f"{type(model).__name__} computes {_name(node)} outside of its blocks",
                where=(node.stack_trace or "").strip().splitlines()[-1].strip()
                if node.stack_trace
                else "",
                why=f"passes see its blocks one by one, which are {', '.join(blocks)}",
                try_=_ADVICE,
            )


_ADVICE = (
    "put it into a module: class Losses(nn.Module): def forward(self, logits, labels): ...; a model's forward only "
    "hands values from one child module to the next"
)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
