"""Compiling a model block by block, each block one graph: what FSDP2 and DDP wrap, and what a pipeline stage holds.

    lmoe.compile_blocks(model, mesh=mesh, sequence_parallel="sp", data_parallel="dp", sum_gradients="sp")
    model = lmoe.data_parallel(model, mesh, "dp")      # FSDP2 round every block, or DDP

FSDP2 gathers a block's weights before its forward and frees them after it, in hooks, which torch cannot trace into one
graph of a whole model (torch 2.13). So the blocks' own `forward`s are compiled, in place: hooks run around them, names
of parameters and checkpoints stay. The blocks are the model's children, a ModuleList's entries one by one: embedding,
norm, head and losses are blocks as layers are, and each graph finds the global offset and counts by itself.

Passes see one block at a time. What a model computes *between* its blocks no pass sees, and on a shard of the sequence
it would be this rank's numbers in silence; so where ranks hold different tokens, a forward that does more than hand
values from block to block is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh

from lmoe_compiler.backend import compile
from lmoe_compiler.config import CompileOptions
from lmoe_compiler.cuts import cuts_of
from lmoe_compiler.errors import InvalidOption, MixesTokens

M = TypeVar("M", bound=nn.Module)


def compile_blocks(model: M, /, *, dynamic: bool | None = None, **options: Any) -> M:
    """Compile every block of `model` in place, with the options of `lmoe.compile`; gives the model back.

    Call it after `lmoe.parallelize` and before DDP or fully_shard, which wrap what is compiled here. Raises MixesTokens
    if ranks hold different tokens and the model computes anything outside of its blocks.
    """
    blocks = dict(_blocks(model))
    if CompileOptions.of(options).token_axes:
        _refuse_work_between(model, blocks)
    for block in blocks.values():
        forward = block.forward
        if type(block).__module__.startswith("torch."):
            forward = _with_own_code(block)
        compiled = compile(forward, fullgraph=True, dynamic=dynamic, cuts=cuts_of(block), **options)
        block.forward = _in_one_piece(compiled)
    return model


def _with_own_code(block: nn.Module) -> Callable[..., Any]:
    """torch keeps what it compiled at a function's code, and reaches all of its own modules by one function, which
    would soon hold more graphs than it allows; layers of a model share theirs on purpose.
    """
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    forward.__code__ = forward.__code__.replace(co_name=f"forward_of_{type(block).__name__}")
    return forward


def _in_one_piece(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Inside of DDP, torch cuts graphs at its buckets of gradients; blocks are cut small enough already."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(optimize_ddp=False):
            return compiled(*args, **kwargs)

    return forward


def data_parallel(
    model: nn.Module, mesh: DeviceMesh, axis: str, *, wrapper: str = "fsdp2", **options: Any
) -> nn.Module:
    """FSDP2 (fully_shard, in place) round every block and the rest, or DDP: sums of gradients over `axis` of the mesh,
    whose ranks hold other rows (or other tokens).

    Sums, because the loss of a model compiled with data_parallel=axis is that of all rows already; compile with
    sum_gradients= naming the other axes only. Experts that are cut over the axis stay as they are: the rows of all its
    ranks came to them. With FSDP2 an optimiser on GPUs then needs foreach=False, or the experts in a group of their
    own: torch's fused steps take no mixture of DTensors and tensors.
    options: of fully_shard or DistributedDataParallel.
    """
    if wrapper not in ("fsdp2", "ddp"):
        raise InvalidOption(
            f"wrapper={wrapper!r} is not known", why="it is fsdp2 or ddp",
            try_=f'lmoe.data_parallel(model, mesh, {axis!r}, wrapper="fsdp2")',
        )  # fmt: skip
    cuts = cuts_of(model)
    own = [name for name, made in cuts.items() if any(axis in cut.axes for cut in made)]
    if wrapper == "ddp":
        return _ddp(model, mesh.get_group(axis), own, options)
    from torch.distributed.fsdp import fully_shard

    options |= {"mesh": mesh[axis], "ignored_params": {model.get_parameter(name) for name in own}}
    listed = [block for name, block in _blocks(model) if "." in name]
    for module in (*listed, model):
        sharded = fully_shard(module, **options)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums
    return model


def _ddp(
    model: nn.Module, group: dist.ProcessGroup, own: list[str], options: dict[str, Any]
) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, own)
    wrapped = DistributedDataParallel(model, process_group=group, **options)
    # A lambda: torch compares a hook's annotations, and these here are text.
    wrapped.register_comm_hook(group, lambda group, bucket: _add(group, bucket))
    return wrapped


def _add(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


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
            why="with some of the tokens it would compute this rank's numbers, unseen by any pass",
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
