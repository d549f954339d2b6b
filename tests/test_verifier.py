"""The verifier: for each property a pass is broken on purpose, and the layer is named. Unbroken, everything passes."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from simulated import Captured
from torch import Tensor, fx

from lmoe_compiler.dry_run import capture
from lmoe_compiler.dry_run.presets import Setting
from lmoe_compiler.errors import WrongOnRanks
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM
from lmoe_compiler.passes.adjoints import Adjoints
from lmoe_compiler.passes.axes import Axes
from lmoe_compiler.passes.expert_parallel import ExpertParallel
from lmoe_compiler.passes.gradients import SumGradients
from lmoe_compiler.passes.halo import Halo
from lmoe_compiler.passes.losses import GlobalNumbers
from lmoe_compiler.passes.sequence_parallel import SequenceParallel
from lmoe_compiler.passes.softmax_parallel import SoftmaxParallel
from lmoe_compiler.passes.splice import Editor
from lmoe_compiler.passes.traffic import collectives, depends_on
from lmoe_compiler.passes.verifier import Verifier, signature
from lmoe_compiler.runtime import agreement, attention, dispatch, exchange, sequence
from lmoe_compiler.runtime import collectives as run
from lmoe_compiler.runtime.mesh import TRAFFIC, Axis
from lmoe_compiler.runtime.topology import TOPOLOGIES

RANKS = 4
CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, num_layers=2, layer_pattern="LN", num_heads=4, num_kv_heads=4,
    head_dim=4, linear_heads=4, key_dim=4, value_dim=4, num_experts=4, top_k=2, expert_size=8,
    shared_expert_size=8,
)  # fmt: skip
PASSES = ("sequence", "halo", "softmax", "numbers", "experts", "gradients")
Break = Callable[[fx.GraphModule], None]


def axis(rank: int = 1) -> Axis:
    """Groups that nobody has made: passes write their names down."""
    return Axis("sp", RANKS, rank, {traffic: traffic for traffic in TRAFFIC})


@cache
def packed_model() -> fx.GraphModule:
    """The graph of a hybrid model on packed documents, with this rank's share of the experts."""
    torch.manual_seed(0)
    model = LinearMoEForCausalLM(CONFIG)
    for module in model.modules():
        if hasattr(module, "router"):
            for name in ("gate_up", "down"):
                own = getattr(module, name).detach()[: CONFIG.num_experts // RANKS].clone()
                setattr(module, name, torch.nn.Parameter(own))
    ids, labels = torch.randint(0, 32, (2, 1, 8))
    documents = torch.tensor([0, 5, 8], dtype=torch.int32)
    found: list[fx.GraphModule] = []

    def take(gm: fx.GraphModule, _: object) -> Callable[..., object]:
        found.append(gm)
        (output,) = (n for n in gm.graph.nodes if n.op == "output")
        return lambda *_: tuple(torch.zeros(()) for _ in output.args[0])

    torch._dynamo.reset()
    torch._dynamo.maybe_mark_dynamic(ids, 1)
    torch._dynamo.maybe_mark_dynamic(labels, 1)
    step = torch.compile(lambda *xs: model(*xs).loss, backend=take, fullgraph=True)
    step(ids, labels, documents)
    return found[0]


def parallelise(rank: int = 1, way: str = "keys", leave_out: str = "") -> fx.GraphModule:
    """The graph after the passes, in the pipeline's order, but for one."""
    gm, here = copy.deepcopy(packed_model()), axis(rank)
    passes = {
        "sequence": SequenceParallel(here),
        "halo": Halo(here),
        "softmax": SoftmaxParallel(here, way=way),
        "numbers": GlobalNumbers(here),
        "experts": ExpertParallel(here),
        "gradients": SumGradients(here, None),
    }
    for name in PASSES:
        if name != leave_out:
            passes[name](gm)
    return gm


def check(gm: fx.GraphModule) -> None:
    Verifier(Axes(axis(), axis(), axis(), summed=axis())).check(gm)


def node_of(gm: fx.GraphModule, target: object) -> fx.Node:
    """The first node that calls it."""
    packet = getattr(target, "default", None)
    return next(n for n in gm.graph.nodes if n.target in (target, packet) and n.target)


def skip(target: object, position: int = 0) -> Break:
    """Let the users of a pass's node have one of its operands instead."""

    def change(gm: fx.GraphModule) -> None:
        for node in [n for n in gm.graph.nodes if n.target is target]:
            node.replace_all_uses_with(node.args[position])

    return change


def argument(target: object, position: int, value: object) -> Break:
    """Give a node another argument."""

    def change(gm: fx.GraphModule) -> None:
        node_of(gm, target).update_arg(position, value)

    return change


def detach(target: object, position: int) -> Break:
    """Cut an operand off from its gradient."""

    def change(gm: fx.GraphModule) -> None:
        node = node_of(gm, target)
        edit = Editor(gm, "broken")
        edit.anchor = node
        node.update_arg(position, edit.call(Tensor.detach, node.args[position]))

    return change


@pytest.mark.parametrize("way", ["keys", "heads"])
def test_what_the_passes_make_is_right(way: str) -> None:
    check(parallelise(way=way))


@pytest.mark.parametrize(
    ("name", "layer", "what"),
    [
        ("sequence", "layers.0.mixer", "starts from zero on every rank"),
        ("halo", "layers.0.mixer", "lacks the last tokens"),
        ("softmax", "layers.1.mixer", "lacks keys and values"),
        ("numbers", "layers.0.mlp", "is a number of this rank's tokens"),
        ("gradients", "", "keeps a gradient of this rank's tokens"),
    ],
)
def test_a_missing_pass(name: str, layer: str, what: str) -> None:
    with pytest.raises(WrongOnRanks, match=what) as error:
        check(parallelise(leave_out=name))
    assert layer in error.value.where


@dataclass(frozen=True)
class Broken:
    """A pass that does one thing wrong, and what the verifier says of it."""

    change: Break
    layer: str
    what: str
    way: str = "keys"


LAYERS = "layers.0.mixer", "layers.1.mixer"
BROKEN = {
    "entry state": Broken(argument(torch.ops.lmoe.scan, 2, []), LAYERS[0], "starts from zero"),
    "halo": Broken(argument(torch.ops.lmoe.short_conv, 3, None), LAYERS[0], "lacks the last tokens"),
    "fewer tokens than the halo": Broken(
        argument(sequence.check_history, 1, 1), LAYERS[0], "may look further back"
    ),
    "keys": Broken(skip(attention.gather_keys_values), LAYERS[1], "lacks keys and values"),
    "place of queries": Broken(
        argument(torch.ops.lmoe.attention, 4, None), LAYERS[1], "lacks the place of its queries"
    ),
    "heads stay": Broken(skip(attention.heads_to_tokens), LAYERS[1], "gives tokens of other", "heads"),
    "documents of a recurrence": Broken(
        argument(torch.ops.lmoe.scan, 3, None), LAYERS[0], "has lost its documents"
    ),
    "documents of attention": Broken(
        argument(torch.ops.lmoe.attention, 3, None), LAYERS[1], "has lost its documents"
    ),
    "documents of all ranks": Broken(
        skip(sequence.local_documents), LAYERS[0], "has offsets of the whole sequence"
    ),
    "documents in a halo": Broken(
        skip(sequence.shifted_documents), LAYERS[0], "has offsets of the whole sequence"
    ),
    "no reset": Broken(skip(sequence.reset), LAYERS[0], "passes states over document boundaries"),
    "no place": Broken(skip(sequence.place), LAYERS[0], "gives every document the state"),
    "position": Broken(skip(operator.add, 0), "", "counts from this rank's first token"),
    "router": Broken(detach(dispatch.combine, 1), "layers.0.mlp", "gives no gradient|has a router"),
    "states": Broken(detach(sequence.place, 0), LAYERS[0], "gives no gradient to"),
    "keys' gradient": Broken(
        detach(attention.gather_keys_values, 0), LAYERS[1], "gives no gradient to"
    ),
    "a gradient summed twice": Broken(
        lambda gm: _sum_experts(gm), "", "has its gradient summed"
    ),
}  # fmt: skip


def _sum_experts(gm: fx.GraphModule) -> None:
    (weight,) = [n for n in gm.graph.nodes if n.meta.get("lmoe_experts") and n.op == "placeholder"][
        :1
    ]
    edit = Editor(gm, "broken")
    edit.anchor = next(iter(weight.users))
    summed = edit.call(run.sum_gradient, weight, "gradients")
    weight.replace_all_uses_with(summed, delete_user_cb=lambda user: user is not summed)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pass_is_caught_with_the_layer(name: str) -> None:
    broken = BROKEN[name]
    gm = parallelise(way=broken.way)
    broken.change(gm)
    with pytest.raises(WrongOnRanks, match=broken.what) as error:
        check(gm)
    assert broken.layer in error.value.where


def test_statistics_over_the_wrong_group_are_caught() -> None:
    gm = parallelise()
    argument(sequence.sum_over_tokens, 3, "dp:numbers")(gm)
    with pytest.raises(WrongOnRanks, match="'dp:numbers', and numbers travel over 'numbers'"):
        check(gm)


def test_a_shift_without_its_halo_is_caught() -> None:
    def layer(x: Tensor) -> tuple[Tensor]:
        return (torch.nn.functional.pad(x * 2, (0, 0, 1, -1)),)

    graph = Captured(layer, torch.randn(2, 8, 4)).graph
    assert graph is not None
    with pytest.raises(WrongOnRanks, match="lacks the last tokens of the rank before"):
        Verifier(Axes(axis(), axis())).check(graph)


# -- the same on every rank ---------------------------------------------------------------------------


@dataclass(frozen=True)
class HaloButOnTheFirst(Halo):
    """Wrong: the first rank has none before it, so it leaves the exchange out."""

    def __call__(self, gm: fx.GraphModule):
        return Halo.__call__(self, gm) if self.axis.index else None


def test_ranks_must_have_the_same_collectives_in_the_same_order() -> None:
    texts = {rank: signature(parallelise(rank)) for rank in (0, 1, RANKS - 1)}
    agreement.compare(texts, "sp")
    broken = {}
    for rank in (0, 1):
        gm = copy.deepcopy(packed_model())
        SequenceParallel(axis(rank))(gm)
        HaloButOnTheFirst(axis(rank))(gm)
        broken[rank] = signature(gm)
    with pytest.raises(WrongOnRanks, match=r"ranks 0 and 1 .* different collectives") as error:
        agreement.compare(broken, "sp")
    assert "layers.0.mixer halo" in error.value.where


def test_ranks_must_send_the_same_sizes() -> None:
    texts = {}
    for rank, schedule in enumerate(exchange.SCHEDULES):
        gm = copy.deepcopy(packed_model())
        SequenceParallel(axis(rank), schedule=schedule)(gm)
        texts[rank] = signature(gm)
    with pytest.raises(WrongOnRanks) as error:
        agreement.compare(texts, "sp")
    assert "layers.0.mixer start" in error.value.where


# -- adjoints, on the joint graph ---------------------------------------------------------------------


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """The same nodes again; what torch notes at them cannot be copied deeply."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in gm.graph.nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
    return fx.GraphModule(gm, graph)


@cache
def joint() -> tuple[fx.GraphModule, Adjoints]:
    """Forward and backward of a hybrid model, and the pass that checks them."""
    kept: list[tuple[fx.GraphModule, Adjoints]] = []

    @dataclass(frozen=True)
    class Keep(Adjoints):
        def __call__(self, gm: fx.GraphModule):
            kept.append((copied(gm), self))
            return Adjoints.__call__(self, gm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmoe_compiler.passes.Adjoints", Keep)
        capture.compile_ranks(Setting(CONFIG, RANKS, 8, TOPOLOGIES["h100"], "transpose"))
    return kept[0]


def backward_of(gm: fx.GraphModule, kind: str) -> fx.Node:
    behind = depends_on(gm.graph, "tangents")
    return next(c.node for c in collectives(gm.graph.nodes) if c.kind == kind and c.node in behind)


def test_every_collective_has_its_adjoint() -> None:
    gm, adjoints = joint()
    # Halo, two of the exchange, two of experts in each layer, four of attention by heads.
    assert adjoints(gm).counts == {"pairs": 1 + 2 + 2 * 2 + 4}


def test_labels_of_one_group_are_one_group() -> None:
    """On real ranks a collective's group has its layer's name (label.py), which the backward need not share."""
    original, adjoints = joint()
    gm = copied(original)
    for i, c in enumerate(list(collectives(gm.graph.nodes))):
        c.node.update_arg(len(c.node.args) - 1, f"label {i} @{c.group}")
    assert adjoints(gm).counts == adjoints(copied(original)).counts


def _leave_out(node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])
    node.graph.erase_node(node)


def _send_the_same_way(node: fx.Node) -> None:
    out, in_ = node.args[1:3]
    node.args = (node.args[0], in_, out, node.args[3])


def _send_twice(node: fx.Node) -> None:
    with node.graph.inserting_after(node):
        again = node.graph.node_copy(node)
    again.meta = dict(node.meta)


def _use_another_group(node: fx.Node) -> None:
    node.args = (*node.args[:-1], "elsewhere")


@pytest.mark.parametrize(
    ("kind", "change", "what"),
    [
        ("neighbour", _leave_out, "has no adjoint"),
        ("all_to_all", _leave_out, "has no adjoint"),
        ("neighbour", _send_the_same_way, "has another adjoint"),
        ("neighbour", _send_twice, "has no forward"),
        ("neighbour", _use_another_group, "has no adjoint"),
    ],
)
def test_a_broken_adjoint_is_caught_with_the_layer(
    kind: str, change: Callable[[fx.Node], None], what: str
) -> None:
    original, adjoints = joint()
    gm = copied(original)
    change(backward_of(gm, kind))
    with pytest.raises(WrongOnRanks, match=what) as error:
        adjoints(gm)
    assert "layers.0.mixer" in error.value.where or "layers.1" in error.value.where
