"""Passes and their pipeline: graphs before and after, what a report says, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import fx

import lmoe_compiler as lmoe
from lmoe_compiler import errors
from lmoe_compiler.config import CompileOptions
from lmoe_compiler.passes import match, pipeline
from lmoe_compiler.passes.base import GraphRecord, PassPipeline, Record, operations
from lmoe_compiler.passes.canonicalize import Canonicalize
from lmoe_compiler.passes.experts import LowerExperts
from lmoe_compiler.passes.match import find, replace
from lmoe_compiler.passes.report import Report

N, D, WIDTH, EXPERTS, K = 6, 8, 4, 3, 2


def graph_of(function, *args, dynamic=False) -> fx.GraphModule:
    """The graph that Dynamo makes of a function: what a pass gets."""
    seen = []

    def keep(gm, _):
        seen.append(gm)
        return gm.forward

    torch.compile(function, backend=keep, fullgraph=True, dynamic=dynamic)(*args)
    return seen[0]


def block_inputs(dtype=torch.float32):
    x = torch.randn(N, D, dtype=dtype, requires_grad=True)
    weights, ids = torch.randn(N, EXPERTS).softmax(-1).topk(K)
    gate_up = torch.randn(EXPERTS, 2 * WIDTH, D, dtype=dtype, requires_grad=True)
    down = torch.randn(EXPERTS, D, WIDTH, dtype=dtype, requires_grad=True)
    return x, weights, ids, gate_up, down


def experts(x, weights, ids, gate_up, down):
    return torch.ops.lmoe.experts(x, weights, ids, gate_up, down) + x


def test_the_expert_block_becomes_its_parts():
    inputs = block_inputs()
    gm = graph_of(experts, *inputs)
    assert operations(gm)["experts"] == 1
    record = GraphRecord(texts=True)
    PassPipeline((LowerExperts(),)).run(gm, record)
    (done,) = record.passes
    assert done.report.counts == {"expert blocks": 1}
    assert f"{EXPERTS} experts, {D} -> {WIDTH}" in done.report.notes[0]
    assert done.removed == {"experts": 1}
    for op, count in {"lmoe.dispatch": 1, "lmoe.grouped_mm": 2, "lmoe.collect": 1}.items():
        assert done.added[op] == count
    assert "torch.ops.lmoe.experts" in record.before
    assert not find(gm, torch.ops.lmoe.experts)
    assert "lmoe.collect" in done.after
    (output,) = gm(*(inputs[i] for i in _order(gm, inputs)))
    torch.testing.assert_close(output, experts(*inputs))


def _order(gm: fx.GraphModule, inputs) -> list[int]:
    """Which argument each placeholder is, by shape and type (all differ)."""
    return [
        next(i for i, x in enumerate(inputs) if (x.shape, x.dtype) == (value.shape, value.dtype))
        for value in (n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder")
    ]


def test_inserted_nodes_say_where_they_come_from():
    gm = graph_of(experts, *block_inputs())
    old = set(gm.graph.nodes)
    LowerExperts()(gm)
    new = [n for n in gm.graph.nodes if n not in old]
    assert len(new) > 10
    assert all(n.meta["lmoe"] == "lower_experts" for n in new)
    assert all(n.meta["example_value"] is not None for n in new)
    assert all("torch.ops.lmoe.experts" in n.meta["stack_trace"] for n in new)


def test_a_replacement_keeps_symbolic_sizes():
    gm = graph_of(experts, *block_inputs(), dynamic=True)
    LowerExperts()(gm)
    (gathered,) = find(gm, torch.ops.lmoe.dispatch)
    assert isinstance(gathered.meta["example_value"].shape[0], torch.SymInt)


def test_a_replacement_under_autocast_is_what_autocast_makes_of_it():
    def under_autocast(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return experts(*inputs)

    inputs = block_inputs()
    compiled = lmoe.compile(under_autocast, inner="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), under_autocast(*inputs), rtol=0, atol=0)


def test_equal_layers_are_traced_once_and_others_are_not(monkeypatch):
    def layers(x, weights, ids, gate_up, down, wide):
        y = experts(x, weights, ids, gate_up, down)
        y = experts(y, weights, ids, 2 * gate_up, down)
        return experts(y, weights, ids, torch.cat([gate_up, wide], 1), torch.cat([down, down], 2))

    inputs = (*block_inputs(), torch.randn(EXPERTS, 2 * WIDTH, D))
    traced = []
    trace = match.make_fx
    monkeypatch.setattr(match, "make_fx", lambda *a, **k: traced.append(a) or trace(*a, **k))
    compiled = lmoe.compile(layers, inner="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), layers(*inputs))
    assert len(traced) == 2


def test_replace_passes_items_of_a_list_on():
    def items(x):
        low, high = torch.chunk(x, 2)
        return low - high

    gm = graph_of(items, torch.randn(4))
    node = next(n for n in gm.graph.nodes if n.target is torch.chunk)
    replace(gm, node, lambda x, n: [x[2:] * 1, x[:2] * 1], "swap")
    gm.graph.lint()
    gm.recompile()
    x = torch.randn(4)
    torch.testing.assert_close(gm(x)[0], x[2:] - x[:2])


def clutter(x):
    y = x.float().contiguous()
    unused = torch.ops.aten.mul.Tensor(y, 2)
    del unused
    return F.dropout(y.to(torch.float32), 0.0) + 1


def test_canonicalize_removes_what_does_nothing():
    gm = graph_of(clutter, torch.randn(3))
    report = Canonicalize()(gm)
    assert sum(report.counts.values()) == len(operations(graph_of(clutter, torch.randn(3)))) - 1
    assert list(operations(gm)) == ["add"]


def needed(x):
    noise = F.dropout(x, 0.5)
    y = x.to(torch.float64)
    z = x.t().contiguous()
    torch.nn.init.zeros_(torch.empty(1))
    return noise, y, z


def test_canonicalize_keeps_what_does_something():
    gm = graph_of(needed, torch.randn(3, 2))
    before = [n.format_node() for n in gm.graph.nodes]
    assert not Canonicalize()(gm).counts
    assert [n.format_node() for n in gm.graph.nodes] == before


def test_canonicalize_leaves_mutation_alone():
    def mutate(x):
        y = x.clone()
        y.add_(1)
        y[0] = 5
        return y

    x = torch.randn(3)
    compiled = lmoe.compile(mutate, inner="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), mutate(x))


def test_default_passes_keep_numbers_and_have_one_order():
    found = pipeline(CompileOptions())
    assert [p.name for p in found.passes] == ["canonicalize", "lower_experts"]
    assert not any(p.changes_numerics for p in found.passes)


def test_disable_leaves_the_mark_in_the_graph():
    record = Record(texts=True)
    inputs = block_inputs()
    compiled = lmoe.compile(experts, inner="eager", disable="lower_experts", record=record)
    torch.testing.assert_close(compiled(*inputs), experts(*inputs))
    assert [p.report.name for p in record.graphs[0].passes] == ["canonicalize"]


def test_nothing_to_do_leaves_the_module_untouched():
    gm = graph_of(lambda x: x * 2, torch.randn(3))
    code = gm.forward.__code__
    record = GraphRecord(texts=True)
    pipeline(CompileOptions()).run(gm, record)
    assert gm.forward.__code__ is code
    assert not any(p.report.counts or p.added or p.removed or p.after for p in record.passes)


def test_uuid_depends_on_passes_and_their_options():
    @dataclass(frozen=True)
    class Named(LowerExperts):
        name: str = "other"

    keys = [
        PassPipeline(passes).uuid()
        for passes in [(Canonicalize(),), (LowerExperts(),), (Named(),), (Named("third"),)]
    ]
    assert len(set(keys)) == len(keys)
    assert PassPipeline((Canonicalize(), LowerExperts()), ("lower_experts",)).uuid() == keys[0]


@dataclass(frozen=True)
class Faulty:
    fault: str
    name: str = "faulty"
    changes_numerics: bool = False

    def __call__(self, gm: fx.GraphModule) -> Report:
        node = next(n for n in gm.graph.nodes if n.op == "call_function")
        if self.fault == "raises":
            raise KeyError("lost")
        with gm.graph.inserting_after(node):
            extra = gm.graph.call_function(torch.neg, (node,))
        if self.fault == "no value":
            extra.meta["lmoe"] = self.name
        elif self.fault == "no origin":
            extra.meta["example_value"] = node.meta["example_value"]
        else:
            node.args = (extra, 2)
        return Report(self.name, {"faults": 1})


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("raises", "KeyError: 'lost'"),
        ("no value", "has no value"),
        ("no origin", "does not say which pass made it"),
        ("cycle", "used before it has been defined"),
    ],
)
def test_a_faulty_pass_is_named(fault, text):
    gm = graph_of(lambda x: x * 2, torch.randn(3))
    with pytest.raises(errors.PassFailed, match=f"the pass 'faulty' failed(.|\n)*{text}"):
        PassPipeline((Faulty(fault),)).run(gm, GraphRecord())


@dataclass(frozen=True)
class DoubleSines:
    """sin -> sin + sin, on the graphs after AOTAutograd: visible in numbers, so it says so."""

    name: str = "double_sines"
    changes_numerics: bool = True

    def __call__(self, gm: fx.GraphModule) -> Report:
        report = Report(self.name)
        for node in find(gm, torch.ops.aten.sin):
            with gm.graph.inserting_after(node):
                twice = gm.graph.call_function(torch.ops.aten.add.Tensor, (node, node))
            twice.meta = {"val": node.meta["val"], "lmoe": self.name}
            node.replace_all_uses_with(
                twice, delete_user_cb=lambda user, new=twice: user is not new
            )
            report.add("sines")
        if report.counts:
            gm.recompile()
        return report


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_passes_after_aot_see_both_directions(inner):
    """The gradient of -cos is a sine that is in the backward graph alone."""
    record, x = Record(), torch.randn(4, requires_grad=True)
    compiled = lmoe.compile(
        lambda x: -x.cos(),
        inner=inner,
        after_aot=(DoubleSines(),),
        record=record,
        # A result from Inductor's caches has the passes in it, and does not run them again.
        inductor={"force_disable_caches": True},
    )
    output = compiled(x)
    output.sum().backward()
    torch.testing.assert_close(output, -x.cos())
    torch.testing.assert_close(x.grad, 2 * x.sin().detach())
    done = [p.report.counts for p in record.graphs[0].passes if p.report.name == "double_sines"]
    assert done == [{}, {"sines": 1}]
