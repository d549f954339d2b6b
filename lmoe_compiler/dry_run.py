"""`lmoe explain MODEL --ranks 1024 --topology h100`: what a model would send over its ranks, on a laptop.

The model is built without memory for its weights, torch.compile's graph is taken, and the passes of sequence and expert
parallelism transform it for the rank in the middle of an axis of that size. Nothing runs and nobody is asked. Volumes
are what the graph's operands have; times are those of the stated topology (runtime/topology.py) at the stated rate of
matrix products; what runs between a start and its wait hides it. Elementwise work is not counted as hiding anything.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM
from lmoe_compiler.passes.base import GraphPass
from lmoe_compiler.passes.expert_parallel import ExpertParallel
from lmoe_compiler.passes.halo import Halo
from lmoe_compiler.passes.losses import GlobalNumbers
from lmoe_compiler.passes.overlap import Overlap
from lmoe_compiler.passes.planner import size
from lmoe_compiler.passes.sequence_parallel import SequenceParallel
from lmoe_compiler.passes.softmax_parallel import SoftmaxParallel
from lmoe_compiler.passes.splice import fake_mode_of, layer_of, run
from lmoe_compiler.passes.verifier import verify
from lmoe_compiler.runtime import dispatch, exchange, sequence
from lmoe_compiler.runtime.mesh import Axis
from lmoe_compiler.runtime.topology import TOPOLOGIES, Topology

# Sizes of Linear-MoE (arXiv 2503.05447, table 2): no shared expert, 64 experts, 8 chosen.
PRESETS = {
    "A0.3B-2B": ModelConfig(
        vocab_size=151936, hidden_size=1024, num_layers=12, layer_pattern="LLLN", num_heads=8,
        num_kv_heads=8, head_dim=128, linear_heads=8, key_dim=128, value_dim=128, num_experts=64,
        top_k=8, expert_size=896, shared_expert_size=0,
    ),
    "A1B-7B": ModelConfig(
        vocab_size=151936, hidden_size=2048, num_layers=16, layer_pattern="LLLN", num_heads=16,
        num_kv_heads=16, head_dim=128, linear_heads=16, key_dim=128, value_dim=128, num_experts=64,
        top_k=8, expert_size=1024, shared_expert_size=0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Transfer:
    """One exchange of the forward pass: bytes that this rank receives, its time, and how much of it is hidden."""

    layer: str
    what: str
    volume: float
    seconds: float
    hidden: float

    @property
    def exposed(self) -> float:
        return max(0.0, self.seconds - self.hidden)


def dry_run(
    config: ModelConfig, ranks: int, tokens: int, topology: Topology, schedule: str = "auto"
) -> list[Transfer]:
    """Exchanges of one forward pass with `tokens` tokens on each of `ranks` ranks, in the graph's order."""
    axis = Axis.on_one_group("sp", ranks, ranks // 2, "dry run")
    gm = capture(config, tokens, ranks)
    spread = config.num_experts > 0 and config.num_experts % ranks == 0
    passes: list[GraphPass] = [
        SequenceParallel(axis, schedule=schedule, topology=topology),
        Halo(axis),
        SoftmaxParallel(axis),
        GlobalNumbers(axis),
        *([ExpertParallel(axis)] if spread else []),
        Overlap(),
    ]
    for graph_pass in passes:
        graph_pass(gm)
    verify(gm)
    return list(_transfers(gm, axis, topology))


def capture(config: ModelConfig, tokens: int, ranks: int) -> fx.GraphModule:
    """The Dynamo graph of a bfloat16 model with its loss, on one row of `tokens` tokens; weights take no memory."""
    with torch.device("meta"):
        model = LinearMoEForCausalLM(config).to(torch.bfloat16)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            shape = list(parameter.shape)
            if hasattr(module, "router") and config.num_experts % ranks == 0:
                shape[0] //= ranks
            one = torch.zeros(1, dtype=parameter.dtype).expand(shape)
            setattr(module, name, torch.nn.Parameter(one))
    ids = torch.zeros((1, tokens), dtype=torch.int64)
    found: list[fx.GraphModule] = []

    def take(gm: fx.GraphModule, _: Sequence[Any]) -> Any:
        found.append(gm)
        output = next(n for n in gm.graph.nodes if n.op == "output")
        return lambda *_: tuple(torch.zeros(()) for _ in output.args[0])

    torch._dynamo.maybe_mark_dynamic(ids, 1)
    torch.compile(lambda x: model(x, x).loss, backend=take, fullgraph=True)(ids)
    (gm,) = found
    return gm


def _transfers(gm: fx.GraphModule, axis: Axis, topology: Topology) -> Any:
    started: dict[fx.Node, float] = {}
    work = 0.0
    for node in gm.graph.nodes:
        if node.target is exchange.start:
            started[node] = work
        elif node.target is exchange.finish:
            begin = next(started[n] for n in node.all_input_nodes if n in started)
            choice = node.meta["lmoe_choice"]
            volume, seconds = choice.costs[choice.schedule]
            yield Transfer(
                layer_of(node), choice.schedule, volume, seconds, (work - begin) / topology.flops
            )
        elif node.target in _VOLUMES:
            what, volume_of = _VOLUMES[node.target]
            volume = volume_of(node, axis.size)
            yield Transfer(layer_of(node), what, volume, _time(volume, axis.size, topology), 0.0)
        work += _flops(gm, node)


def _time(volume: float, ranks: int, topology: Topology) -> float:
    latency, speed = topology.inside if ranks <= topology.ranks_per_node else topology.across
    return latency + volume / speed


def _bytes(value: Tensor) -> float:
    """With the sizes of this compilation in place of symbols."""
    count = 1
    for length in value.shape:
        count *= getattr(getattr(length, "node", None), "hint", None) or int(length)
    return float(count * value.element_size())


def _result(node: fx.Node, ranks: int) -> float:
    return _bytes(node.meta["example_value"])


def _keys_values(node: fx.Node, ranks: int) -> float:
    return sum(_bytes(x) for x in node.meta["example_value"]) * (ranks - 1) / ranks


def _share(node: fx.Node, ranks: int) -> float:
    """An even all-to-all: all but what stays here."""
    return _bytes(node.meta["example_value"]) * (ranks - 1) / ranks


def _rows(node: fx.Node, ranks: int) -> float:
    """Rows to and from experts, balanced: each of N tokens k times, but for those that stay."""
    x, ids = (a.meta["example_value"] for a in node.args[:2])  # type: ignore[union-attr]
    return 2 * _bytes(x) * ids.shape[-1] * (ranks - 1) / ranks


_VOLUMES = {
    sequence.halo: ("halo", _result),
    sequence.gather_keys_values: ("keys, values", _keys_values),
    sequence.tokens_to_heads: ("to heads", _share),
    sequence.heads_to_tokens: ("from heads", _share),
    dispatch.send: ("experts, both ways", _rows),
}


def _flops(gm: fx.GraphModule, node: fx.Node) -> float:
    if node.op not in ("call_function", "call_method") or node.meta.get("lmoe"):
        return 0.0
    if any("example_value" not in operand.meta for operand in node.all_input_nodes):
        return 0.0
    counter = FlopCounterMode(display=False)
    with fake_mode_of(gm) or contextlib.nullcontext(), torch.no_grad(), counter:
        run(node)
    total = counter.get_total_flops()
    return float(getattr(getattr(total, "node", None), "hint", None) or total)


def table(transfers: Sequence[Transfer]) -> str:
    """A line for each exchange and their sum."""
    rows: list[tuple[str, ...]] = [
        ("layer", "exchange", "received", "time us", "hidden us", "exposed us")
    ]
    total = Transfer(
        "all", "", *(sum(getattr(t, f) for t in transfers) for f in ("volume", "seconds", "hidden"))
    )
    for t in transfers:
        hidden = min(t.hidden, t.seconds)
        times = (f"{x * 1e6:.0f}" for x in (t.seconds, hidden, t.exposed))
        rows.append((t.layer, t.what, size(t.volume), *times))
    exposed = sum(t.exposed for t in transfers)
    times = (f"{x * 1e6:.0f}" for x in (total.seconds, total.seconds - exposed, exposed))
    rows.append((total.layer, "", size(total.volume), *times))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def main(argv: Sequence[str]) -> int:
    """`lmoe explain A0.3B-2B --ranks 64`."""
    parser = argparse.ArgumentParser(prog="lmoe explain", description=__doc__)
    parser.add_argument("name", choices=sorted(PRESETS))
    parser.add_argument(
        "--ranks", type=int, required=True, help="ranks of the sequence axis; experts share it"
    )
    parser.add_argument("--topology", default="h100", choices=sorted(TOPOLOGIES))
    parser.add_argument(
        "--tokens", type=int, default=8192, help="tokens on each rank (default: 8192)"
    )
    parser.add_argument("--schedule", default="auto", help="auto, all_gather or transpose")
    given = parser.parse_args(argv)
    topology = TOPOLOGIES[given.topology]
    transfers = dry_run(PRESETS[given.name], given.ranks, given.tokens, topology, given.schedule)
    print(
        f"{given.name}, {given.ranks} ranks, {given.tokens} tokens each, forward pass, {topology}\n"
    )
    print(table(transfers))
    return 0
