"""The order of starts and waits after AOTAutograd: what moves, and what must not."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore

from lmoe_compiler.passes.base import operation
from lmoe_compiler.passes.schedule import RaiseStarts
from lmoe_compiler.runtime import collectives


def graph_of(function: Callable[..., object], *args: Tensor) -> fx.GraphModule:
    """Traced as one rank of two; `function` gets the group's name last."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        assert dist.group.WORLD is not None
        group = dist.group.WORLD.group_name
        return make_fx(lambda *xs: function(*xs, group))(*args)
    finally:
        dist.destroy_process_group()


def order(gm: fx.GraphModule) -> list[str]:
    calls = [operation(node) for node in gm.graph.nodes if node.op == "call_function"]
    names = [name.split(".")[1] if "." in name else name for name in calls]
    return [name for name in names if name not in ("detach", "alias")]


def test_a_start_rises_and_its_wait_sinks() -> None:
    def step(x: Tensor, group: str) -> Tensor:
        other = (x.sin() + 1).exp()
        rows = collectives.wait(collectives.start_even_all_to_all(x * 2, 2, group))
        last = rows.cos() + other
        return collectives.wait(collectives.start_even_all_to_all(last, 2, group)).tanh()

    gm = graph_of(step, torch.randn(4))
    assert RaiseStarts()(gm).counts == {"waits": 1}
    exchange = ["all_to_all_single", "wait_tensor"]
    assert order(gm) == [
        "mul", exchange[0], "sin", "add", "exp", exchange[1], "cos", "add", *exchange, "tanh",
    ]  # fmt: skip
    assert not RaiseStarts()(gm).counts


def test_a_gradient_hurries_nobody() -> None:
    """What only the caller waits for starts where its operand was made, and is waited for last."""

    def step(x: Tensor, group: str) -> tuple[Tensor, Tensor]:
        late = x.sin().cos()
        first = (x * 2).exp()
        summed = collectives.all_reduce(late, group)
        return collectives.all_reduce(first, group), summed

    gm = graph_of(step, torch.randn(4))
    RaiseStarts()(gm)
    assert order(gm) == [
        "sin", "cos", "all_reduce", "mul", "exp", "all_reduce", "wait_tensor", "wait_tensor",
    ]  # fmt: skip


def test_random_numbers_and_changes_of_operands_keep_their_place() -> None:
    def step(x: Tensor, group: str) -> Tensor:
        noise = torch.rand_like(x)
        x.mul_(3)
        rows = collectives.wait(collectives.start_even_all_to_all(x + 1, 2, group))
        return collectives.wait(collectives.start_even_all_to_all(rows * noise, 2, group)).cos()

    gm = graph_of(step, torch.randn(4))
    RaiseStarts()(gm)
    assert order(gm)[:2] == ["rand_like", "mul_"]
    assert order(gm)[2:4] == ["add", "all_to_all_single"]


def test_what_a_check_forbids_does_not_start_before_it() -> None:
    def step(x: Tensor, group: str) -> Tensor:
        late = x.sin().cos()
        torch._assert_async((late < 2).all(), "too large")
        rows = collectives.wait(collectives.start_even_all_to_all(x * 2, 2, group))
        return rows.cos()

    gm = graph_of(step, torch.randn(4))
    before = order(gm)
    assert not RaiseStarts()(gm).counts
    assert order(gm) == before
    assert before.index("_assert_async") < before.index("all_to_all_single")


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_graph_keeps_its_nodes_and_comes_to_rest(data: st.DataObject) -> None:
    """Random programs of products, effects and exchanges: lint checks that operands come first."""
    kinds = data.draw(st.lists(st.sampled_from("wws+*re"), min_size=1, max_size=14))
    picks = [data.draw(st.integers(0, 30)) for _ in kinds]

    def step(x: Tensor, group: str) -> list[Tensor]:
        values, flying = [x * 1], []
        for kind, pick in zip(kinds, picks, strict=True):
            value = values[pick % len(values)]
            if kind == "s":
                flying.append(collectives.start_even_all_to_all(value * 2, 2, group))
            elif kind == "w" and flying:
                values.append(collectives.wait(flying.pop(pick % len(flying))))
            elif kind == "e":
                value.add_(1)
            elif kind == "r":
                values.append(value * torch.rand_like(value))
            else:
                values.append(value.sin() if kind == "+" else value * values[-1])
        return [*values, *(collectives.wait(flight) for flight in flying)]

    gm = graph_of(step, torch.randn(4))
    before = order(gm)
    RaiseStarts()(gm)
    gm.graph.lint()
    assert sorted(order(gm)) == sorted(before)
    effects = [name for name in before if name in ("add_", "rand_like")]
    assert [name for name in order(gm) if name in ("add_", "rand_like")] == effects
    settled = order(gm)
    RaiseStarts()(gm)
    assert order(gm) == settled
