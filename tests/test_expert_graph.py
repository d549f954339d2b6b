"""Expert parallelism as it stands in compiled graphs: what runs during an exchange, what is read on
the host, that ranks agree, which groups there are, and what is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from simulated import Captured
from test_expert_meshes import EXPERTS, LAYOUTS, graph
from torch import Tensor, fx, nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing._internal.distributed.fake_pg import FakeStore

import lmoe_compiler as lmoe
from lmoe_compiler.backend import INNER_COMPILERS, _aot_eager
from lmoe_compiler.config import CompileOptions
from lmoe_compiler.errors import InvalidOption, MixesTokens, NotShardable
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.moe import SparseMoE
from lmoe_compiler.passes import pipeline
from lmoe_compiler.passes.base import GraphRecord, Record, readable
from lmoe_compiler.passes.verifier import collectives_of, signature
from lmoe_compiler.runtime import capacity, dispatch
from lmoe_compiler.runtime.mesh import TRAFFIC, axis_of

RANKS, HIDDEN = 4, 8
BLOCK = ModelConfig(hidden_size=HIDDEN, num_experts=4, top_k=2, expert_size=6, shared_expert_size=6)


@contextmanager
def fake_ranks(rank: int, **shape: int) -> Iterator[DeviceMesh]:
    """This process as one rank of a mesh; the others do not exist."""
    size = int(torch.tensor(list(shape.values())).prod())
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    axis_of.cache_clear()
    try:
        yield init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
    finally:
        axis_of.cache_clear()
        dist.destroy_process_group()


class Block(nn.Module):
    """An expert block that says all it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = SparseMoE(BLOCK)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, routing = self.moe(x)
        return y, routing.aux_loss + routing.z_loss, routing.dropped


def compile_only(gm: fx.GraphModule, *args: object) -> Callable[..., object]:
    """Nothing runs: torch 2.11's ranks that do not exist send no counts, but whatever memory held."""
    _aot_eager(gm, *args)  # type: ignore[arg-type]
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    return lambda *_: tuple(torch.zeros(()) for _ in output.args[0])


@cache
def compiled(rank: int, factor: float | None, disable: tuple[str, ...] = ()) -> GraphRecord:
    """Forward and backward graph of the block on one of four ranks."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    record = Record(texts=True)
    inner = patch.dict(INNER_COMPILERS, aot_eager=compile_only)
    with fake_ranks(rank, ep=RANKS) as mesh, inner:
        model = lmoe.parallelize(Block(), mesh, expert_parallel="ep")
        function = lmoe.compile(
            model, mesh=mesh, expert_parallel="ep", expert_capacity=factor, inner="aot_eager",
            disable=disable, record=record,
        )  # fmt: skip
        groups = len(dist.distributed_c10d._world.pg_map)
        function(torch.randn(2, 6, HIDDEN, requires_grad=True))
        assert len(dist.distributed_c10d._world.pg_map) == groups, "a compilation made groups"
    return record.graphs[0]


def lowered(direction: str, *args: object) -> str:
    (text,) = [text for name, text in compiled(*args).lowered if name == direction]  # type: ignore[arg-type]
    return text


def windows(text: str, kind: str = "all_to_all_single") -> list[list[str]]:
    """Products that run between the start and the wait of each exchange, in the order of waits."""
    found: list[list[str]] = []
    during: dict[str, list[str]] = {}
    for name, op, first in re.findall(r"(\w+)[^=\n]*= torch\.ops\.(\S+?)\.\w+\((\w+)", text):
        if op == f"_c10d_functional.{kind}":
            during[name] = []
        elif op == "_c10d_functional.wait_tensor" and first in during:
            found.append(during.pop(first))
        elif op in ("aten.mm", "aten.bmm", "lmoe.grouped_mm", "lmoe.grouped_mm_weight"):
            for products in during.values():
                products.append(op)
    return found


@pytest.mark.parametrize("factor", [None, 1.25])
def test_half_of_the_shared_expert_runs_during_each_exchange(factor: float | None) -> None:
    """Without a capacity the first exchange is the one of counts, which rows wait for."""
    rows = windows(lowered("forward", 0, factor))[-2:]
    assert rows == [["aten.mm"], ["aten.mm"]]
    without = windows(lowered("forward", 0, factor, ("overlap", "starts")))[-2:]
    assert without == [[], []]


@pytest.mark.parametrize("factor", [None, 1.25])
def test_backward_exchanges_run_during_products_that_need_none(factor: float | None) -> None:
    """Two products of half the shared expert; then experts' weights, the other half, the router's."""
    there, back = windows(lowered("backward", 0, factor))
    weight = "aten.bmm" if factor else "lmoe.grouped_mm_weight"
    assert there == 2 * ["aten.mm"]
    assert back == 2 * [weight] + 4 * ["aten.mm"]
    assert windows(lowered("backward", 0, factor, ("starts",))) == [[], []]


def test_sums_of_gradients_run_during_the_rest_of_the_backward() -> None:
    """The router's is made last; those of the shared expert's two weights have time."""
    sums = windows(lowered("backward", 0, 1.25), "all_reduce")
    assert [len(products) for products in sums] == [0, 2, 8]
    without = lowered("backward", 0, 1.25, ("starts",))
    assert windows(without, "all_reduce") == [[], [], []]
    ops = [re.findall(r"torch\.ops\.(\S+?)\(", t) for t in (without, lowered("backward", 0, 1.25))]
    assert sorted(ops[0]) == sorted(ops[1])


@pytest.mark.slow
def test_inductor_keeps_the_order() -> None:
    """In the code it writes, products stand between the start and the wait of both exchanges."""
    with fake_ranks(0, ep=RANKS) as mesh:
        model = lmoe.parallelize(Block(), mesh, expert_parallel="ep")
        function = lmoe.compile(model, mesh=mesh, expert_parallel="ep", expert_capacity=1.25)

        def step() -> None:
            y, loss, _ = function(torch.randn(2, 6, HIDDEN, requires_grad=True))
            (y.sum() + loss).backward()

        _, codes = run_and_get_code(step)
    assert len(codes) == 2
    for code in codes:
        body = code[code.index("def call(") :]
        ops = re.findall(
            r"all_to_all_single\.default\(|wait_tensor\.default\(|kernels\.b?mm\(", body
        )
        starts = [i for i, op in enumerate(ops) if op.startswith("all_to_all")]
        assert len(starts) == 2
        assert all("mm(" in ops[i + 1] for i in starts)


def test_a_capacity_makes_all_sizes_static() -> None:
    for direction in ("forward", "backward"):
        fixed, exact = (lowered(direction, 0, factor) for factor in (1.25, None))
        assert "all_to_all_single" in fixed
        # Sizes that only the data knows are called u0, u1, ...
        assert not re.search(r"\bu\d+\b", fixed)
        assert re.search(r"\bu\d+\b", exact)
        assert "_local_scalar_dense" not in fixed


def reads(send: object) -> tuple[int, int]:
    """Nodes of a layer that move a value to the host, and that read one from the device."""
    mode = FakeTensorMode(
        shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True, allow_scalar_outputs=True)
    )
    with fake_ranks(1, ep=RANKS), mode:
        device = {"device": "cuda"}
        x, weights = torch.empty(6, HIDDEN, **device), torch.empty(6, 2, **device)
        ids = torch.empty(6, 2, dtype=torch.int64, **device)
        gate_up, down = torch.empty(1, 12, HIDDEN, **device), torch.empty(1, HIDDEN, 6, **device)
        assert dist.group.WORLD is not None
        function = partial(send, group=dist.group.WORLD.group_name)  # type: ignore[operator]
        gm = make_fx(function)(x, weights, ids, gate_up, down)
    moved = alone = 0
    for node in gm.graph.nodes:
        inputs = {n.meta["val"].device.type for n in node.all_input_nodes if _is_tensor(n)}
        if "_local_scalar_dense" in str(node.target):
            alone += inputs == {"cuda"}
        elif _is_tensor(node) and node.meta["val"].device.type == "cpu" and "cuda" in inputs:
            moved += 1
    return moved, alone


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def exact_layer(x, weights, ids, gate_up, down, group: str) -> Tensor:
    sent = dispatch.send(x, ids, 1, RANKS, group)
    back = dispatch.compute(sent.rows, sent.received, sent.out, sent.in_, gate_up, down, group)
    return dispatch.combine(back, weights, sent.order, sent.inverse, x)


def fixed_layer(x, weights, ids, gate_up, down, group: str) -> Tensor:
    rows, source, slot = capacity.send(x, ids, 1, RANKS, 1.25, group)
    back = capacity.compute(rows, gate_up, down, RANKS, group)
    return capacity.combine(back, weights, source, slot, x)


def test_one_host_read_a_layer_and_none_with_a_capacity() -> None:
    """On fake tensors of a GPU; the exact layer's split lists come over in one copy."""
    assert reads(exact_layer) == (1, 0)
    assert reads(fixed_layer) == (0, 0)


@pytest.mark.parametrize("factor", [None, 1.25])
def test_every_rank_compiles_the_same_text(factor: float | None) -> None:
    """Split lists are values of the graph and a rank's place is nowhere: not one character differs."""
    for direction in ("forward", "backward"):
        one, last = (lowered(direction, rank, factor) for rank in (0, RANKS - 1))
        assert one == last
        assert "all_to_all_single" in one


@pytest.mark.parametrize("name", ["dp, sp, ep", "folded over dp and sp"])
def test_every_rank_of_a_mesh_has_the_same_sequence(name: str) -> None:
    layout = LAYOUTS[name]
    graphs = layout.meshed().transformed(graph(layout.ranks(*layout.experts), 1).captured)
    first, *others = [[str(node.target) for node in gm.graph.nodes] for gm in graphs]
    assert all(other == first for other in others)
    assert len({signature(gm) for gm in graphs}) == 1
    assert len(list(collectives_of(graphs[0]))) > 20


@pytest.mark.parametrize(("factor", "agree"), [(None, True), (1.25, False)])
def test_a_capacity_needs_as_many_tokens_on_every_rank(factor: float | None, agree: bool) -> None:
    """Ranks compare signatures before the first exchange; exact splits may be uneven."""
    found = []
    for length in (6, 8):
        block = Block()
        for name in ("gate_up", "down"):
            setattr(block.moe, name, nn.Parameter(getattr(block.moe, name)[:1].clone()))
        gm = Captured(block, torch.randn(1, length, HIDDEN)).graph
        assert gm is not None
        with fake_ranks(0, ep=RANKS) as mesh:
            options = CompileOptions(mesh=mesh, expert_parallel="ep", expert_capacity=factor)
            pipeline(options).run(gm, GraphRecord())
        found.append(signature(gm))
    assert (found[0] == found[1]) is agree


def test_each_kind_of_traffic_has_a_group_and_ranks_make_them_in_one_order(monkeypatch) -> None:
    orders = []
    make = dist.new_subgroups_by_enumeration
    for rank in (0, 3, 6):
        made: list[tuple[object, str]] = []

        def note(rows, group_desc, timeout, made=made):
            made.append((rows, group_desc))
            return make(rows, group_desc=group_desc, timeout=timeout)

        monkeypatch.setattr(dist, "new_subgroups_by_enumeration", note)
        with fake_ranks(rank, dp=2, sp=2, ep=2) as mesh:
            options = CompileOptions(
                mesh=mesh, sequence_parallel="sp", data_parallel="dp", expert_parallel="ep"
            )
            pipeline(options)
            pipeline(options)
            groups = axis_of(mesh, "ep").groups
        assert len(set(groups.values())) == len(TRAFFIC)
        orders.append(made)
    assert orders[0] == orders[1] == orders[2]
    # Axes sp, all three, ep, and what experts are summed over; not once more for the second call.
    assert len(orders[0]) == 4 * len(TRAFFIC)


def test_a_compilation_makes_no_groups() -> None:
    with fake_ranks(0, ep=RANKS) as mesh:
        options = {"mesh": mesh, "expert_parallel": "ep", "inner": "eager"}
        function = torch.compile(Block(), backend="lmoe", options=options)
        with pytest.raises(Exception, match="axis ep has no process groups yet"):
            function(torch.randn(2, 6, HIDDEN))


def test_experts_that_do_not_divide_are_refused() -> None:
    with fake_ranks(0, ep=3) as mesh, pytest.raises(NotShardable, match="4 experts on 3 ranks"):
        lmoe.parallelize(Block(), mesh, expert_parallel="ep")


@pytest.mark.parametrize("factor", [None, 1.25])
@pytest.mark.parametrize(
    ("cut", "words"),
    [(False, "a router that chooses from 4"), (True, "'ep', and the compiler is not told")],
)
def test_cutting_and_compiling_have_to_agree(cut: bool, words: str, factor: float | None) -> None:
    with fake_ranks(0, ep=RANKS) as mesh:
        model = Block()
        options = {"inner": "eager", "expert_capacity": factor}
        if cut:
            lmoe.parallelize(model, mesh, expert_parallel="ep")
        else:
            options |= {"mesh": mesh, "expert_parallel": "ep"}
        with pytest.raises(Exception, match=words):
            lmoe.compile(model, **options)(torch.randn(2, 6, HIDDEN))


REFUSED = {
    "a mean of each row": (lambda x: x.mean(1), "keeps axis 0", {}),
    "a maximum": (lambda x: x.amax(), "makes one value of all tokens", {}),
    "the last token": (lambda x: x[:, -1], "makes one value of all tokens", {}),
    "a loss that is no mean": (
        lambda x: nn.functional.mse_loss(x, x), "makes one value of all tokens", {},
    ),
    "a length": (lambda x: (x / x.shape[1]).sum(), "may be the length of one sequence", {}),
    "a mean of each row of a sequence that is cut": (
        lambda x: x.mean(1), "keeps axis 0", {"sequence_parallel": "sp"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_numbers_that_are_not_of_all_rows_are_refused(name: str) -> None:
    function, message, options = REFUSED[name]
    one = Captured(lambda x: (function(x * 2),), torch.randn(1, 6, 3))
    assert one.graph is not None
    with fake_ranks(0, dp=2, sp=2) as mesh:
        passes = pipeline(CompileOptions(mesh=mesh, data_parallel="dp", **options))
        with pytest.raises((MixesTokens, NotShardable), match=message):
            passes.run(one.graph, GraphRecord())


def test_tokens_may_mix_where_only_rows_are_spread() -> None:
    def layer(x: Tensor) -> tuple[Tensor, ...]:
        scores = (x @ x.transpose(1, 2)).softmax(-1) @ x
        return (scores.cumsum(1).flip(1) + torch.arange(x.shape[1])[:, None]).sum(), x.mean()

    one = Captured(layer, torch.randn(2, 6, 3))
    assert one.graph is not None
    with fake_ranks(0, dp=2) as mesh:
        pipeline(CompileOptions(mesh=mesh, data_parallel="dp")).run(one.graph, GraphRecord())
    text = readable(one.graph)
    assert "sum_over_tokens" in text
    assert "mean_over_tokens" in text


def test_axes_are_checked() -> None:
    with fake_ranks(0, dp=2, sp=2) as mesh:
        with pytest.raises(InvalidOption, match="data_parallel='ep' is not an axis"):
            CompileOptions(mesh=mesh, data_parallel=("dp", "ep"))
        with pytest.raises(InvalidOption, match="given to sequence_parallel and data_parallel"):
            CompileOptions(mesh=mesh, sequence_parallel="sp", data_parallel=("dp", "sp"))
        folded = CompileOptions(
            mesh=mesh, sequence_parallel="sp", data_parallel="dp", expert_parallel=("dp", "sp")
        )
        assert folded.token_axes == ("sp", "dp")
        assert EXPERTS % axis_of(mesh, *folded.expert_axes).size == 0
