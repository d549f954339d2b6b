"""Compiles a model for ranks that do not exist: passes, autograd and partition as on real ones, by the rank in the
middle of a fake process group.

Weights take no memory, nothing runs. Of equal layers one is compiled, and stands for all of them (unroll.py), before
collectives are moved as they are on real ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import fx
from torch.distributed.device_mesh import init_device_mesh

from lmoe_compiler.dry_run.presets import Setting
from lmoe_compiler.dry_run.unroll import Step, unroll
from lmoe_compiler.errors import InvalidOption
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM
from lmoe_compiler.passes import joint_passes
from lmoe_compiler.passes.axes import Axes
from lmoe_compiler.passes.base import GraphPass
from lmoe_compiler.passes.canonicalize import Canonicalize
from lmoe_compiler.passes.expert_parallel import ExpertParallel
from lmoe_compiler.passes.experts import LowerExperts
from lmoe_compiler.passes.halo import Halo
from lmoe_compiler.passes.losses import GlobalNumbers
from lmoe_compiler.passes.overlap import Overlap
from lmoe_compiler.passes.planner import Choice
from lmoe_compiler.passes.sequence_parallel import SequenceParallel
from lmoe_compiler.passes.softmax_parallel import SoftmaxParallel
from lmoe_compiler.passes.splice import layer_of
from lmoe_compiler.passes.verifier import Verifier
from lmoe_compiler.runtime import exchange
from lmoe_compiler.runtime.mesh import Axis, axis_of


@dataclass(frozen=True)
class Compiled:
    """One rank's graphs. `lanes`: name of a process group -> (traffic, ranks of its axis).

    `notes`: what the passes chose and why. `choices`: layer -> plan of its state exchange. `token`: the size symbol T.
    """

    setting: Setting
    forward: fx.GraphModule
    backward: fx.GraphModule
    num_outputs: int
    lanes: dict[str, tuple[str, int]]
    notes: list[str]
    choices: dict[str, Choice]
    parameters: dict[str, torch.Tensor]
    token: Any

    def steps(self, backward: bool) -> list[Step]:
        """The whole model's graph."""
        return self._backward_steps if backward else self._forward_steps

    @cached_property
    def _forward_steps(self) -> list[Step]:
        return self._unrolled(self.forward, backward=False)

    @cached_property
    def _backward_steps(self) -> list[Step]:
        return self._unrolled(self.backward, backward=True)

    def _unrolled(self, gm: fx.GraphModule, backward: bool) -> list[Step]:
        setting = self.setting
        return unroll(gm.graph, setting.config.letters, setting.kinds, self.token, backward)


@contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
    """A process group of that size, of which this process is the rank in the middle. Nobody else is there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise InvalidOption(
            "a dry run inside of a job of real ranks",
            why="it makes process groups of ranks that do not exist",
            try_="lmoe explain A0.3B-2B --ranks 64, in a process of its own",
        )
    dist.init_process_group("fake", store=FakeStore(), rank=ranks // 2, world_size=ranks)
    try:
        yield
    finally:
        axis_of.cache_clear()
        dist.destroy_process_group()


def axes(setting: Setting) -> tuple[Axis, Axis | None]:
    """The axis of tokens, and the same or a part of it, of neighbours, for experts."""
    ranks, share = setting.sequence, setting.expert_ranks
    mesh = init_device_mesh("cpu", (setting.data, ranks), mesh_dim_names=("dp", "sp"))
    tokens = axis_of(mesh, "sp")
    if share in (1, ranks):
        return tokens, tokens if share > 1 else None
    shape, names = (setting.ranks // share, share), ("replicas", "ep")
    return tokens, axis_of(init_device_mesh("cpu", shape, mesh_dim_names=names), "ep")


def compile_ranks(setting: Setting) -> Compiled:
    """Forward and backward of one rank, verified; raises what compiling on real ranks would."""
    config = replace(setting.config, layer_pattern=setting.kinds, num_layers=len(setting.kinds))
    with fake_ranks(setting.ranks):
        return _compile(config, setting, *axes(setting))


def _compile(config: ModelConfig, setting: Setting, tokens: Axis, experts: Axis | None) -> Compiled:
    found: dict[str, Any] = {}

    def take(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        found["notes"] = _spread(gm, setting, tokens, experts)
        found["choices"] = {
            layer_of(n): n.meta["lmoe_choice"]
            for n in gm.graph.nodes
            if n.target is exchange.finish
        }
        found["token"] = gm.meta["lmoe_shard"].tokens.symbol
        found["joint"] = _differentiate(gm, example_inputs, tokens)
        return _nothing(gm)

    model = weightless(config, setting.expert_ranks)
    trace(model, setting.tokens, take)
    forward, backward, num_outputs = found["joint"]
    lanes = {
        name: (traffic, axis.size)
        for axis in (tokens, experts)
        if axis
        for traffic, name in axis.groups.items()
    }
    return Compiled(
        setting, forward, backward, num_outputs, lanes, found["notes"], found["choices"],
        dict(model.named_parameters()), found["token"],
    )  # fmt: skip


def _spread(gm: fx.GraphModule, setting: Setting, tokens: Axis, experts: Axis | None) -> list[str]:
    """The pipeline of lmoe.compile, but for gradients of replicated weights: see replay.py."""
    passes: list[GraphPass] = [
        Canonicalize(),
        SequenceParallel(
            tokens,
            schedule=setting.schedule,
            even=True,
            topology=setting.topology,
            span=setting.span,
        ),
        Halo(tokens),
        SoftmaxParallel(tokens, even=True),
        GlobalNumbers(tokens),
        *([ExpertParallel(experts)] if experts else []),
        Overlap(),
        Verifier(Axes(tokens, tokens, experts)),
        LowerExperts(),
    ]
    told = ("sequence_parallel", "halo", "softmax_parallel", "expert_parallel")
    reports = [graph_pass(gm) for graph_pass in passes]
    return [note for report in reports if report.name in told for note in report.notes]


def _differentiate(
    gm: fx.GraphModule, example_inputs: Sequence[Any], axis: Axis
) -> tuple[fx.GraphModule, fx.GraphModule, int]:
    """(forward, backward, number of the model's outputs), as AOTAutograd and its partitioner make them."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    parts: list[Any] = []

    def partition(joint: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        for graph_pass in joint_passes(axis):
            graph_pass(joint)
        cut = min_cut_rematerialization_partition(joint, *args, **kwargs)
        parts.extend((*cut, kwargs["num_fwd_outputs"]))
        return cut

    def keep(aten: fx.GraphModule, _: Sequence[Any]) -> Any:
        return make_boxed_func(_nothing(aten))

    aot_autograd(
        fw_compiler=keep,
        bw_compiler=keep,
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )(gm, example_inputs)
    forward, backward, num_outputs = parts
    return forward, backward, num_outputs


def _nothing(gm: fx.GraphModule) -> Any:
    """A function with as many results, none of them computed."""
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    return lambda *_: tuple(torch.zeros(()) for _ in output.args[0])


def weightless(config: ModelConfig, expert_ranks: int = 1) -> LinearMoEForCausalLM:
    """A bfloat16 model with this rank's share of the experts, whose weights take no memory."""
    with torch.device("meta"):
        model = LinearMoEForCausalLM(config).to(torch.bfloat16)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            shape = list(parameter.shape)
            if hasattr(module, "router") and parameter.dim() == 3:
                shape[0] //= expert_ranks
            one = torch.zeros(1, dtype=parameter.dtype).expand(shape)
            setattr(module, name, torch.nn.Parameter(one))
    return model


def trace(model: LinearMoEForCausalLM, tokens: int, backend: Any) -> None:
    """Give `backend` Dynamo's graph of the model with its loss, on one row of `tokens` tokens."""
    ids = torch.zeros((1, tokens), dtype=torch.int64)
    torch._dynamo.reset()
    torch._dynamo.maybe_mark_dynamic(ids, 1)
    torch.compile(lambda x: model(x, x).loss, backend=backend, fullgraph=True)(ids)


def capture(config: ModelConfig, tokens: int, expert_ranks: int = 1) -> fx.GraphModule:
    """Dynamo's graph alone, before any pass."""
    found: list[fx.GraphModule] = []

    def take(gm: fx.GraphModule, _: Sequence[Any]) -> Any:
        found.append(gm)
        return _nothing(gm)

    trace(weightless(config, expert_ranks), tokens, take)
    (gm,) = found
    return gm
