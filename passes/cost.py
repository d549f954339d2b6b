"""Work in a model's graph: operations of a node, and of what can run while a layer waits for other ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx

from lmoe_compiler.passes.splice import fake_values, known_size, run
from lmoe_compiler.passes.token_axis import MARKED, operator

Shape = Sequence[Any]


def flops(gm: fx.GraphModule, node: fx.Node) -> float:
    """Operations of one of the user's nodes, by torch's counter; elementwise work counts as nothing."""
    if not node.op.startswith("call") or node.meta.get("lmoe"):
        return 0.0
    if any("example_value" not in operand.meta for operand in node.all_input_nodes):
        return 0.0
    return counted(gm, node)


def counted(gm: fx.GraphModule, node: fx.Node) -> float:
    """Operations of any node, on its operands' fake values."""
    # torch's counter imports triton, which importing us must not.
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False, custom_mapping=attention_formulas())
    with fake_values(gm), torch.no_grad(), counter:
        run(node)
    return float(known_size(counter.get_total_flops()))


@cache
def attention_formulas() -> dict[Any, Callable[..., int]]:
    """Of shapes: torch 2.11's own refuse keys with fewer heads than queries, and none is the CPU kernel's."""
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    def forward(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, *_for_each_query_head(q, k, v))

    def backward(grad: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, q, *_for_each_query_head(q, k, v))

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention: forward,
        aten._scaled_dot_product_efficient_attention: forward,
        aten._scaled_dot_product_cudnn_attention: forward,
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_backward: backward,
        aten._scaled_dot_product_efficient_attention_backward: backward,
        aten._scaled_dot_product_cudnn_attention_backward: backward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def _for_each_query_head(q: Shape, *shared: Shape) -> list[Shape]:
    return [(*shape[:1], *q[1:2], *shape[2:]) for shape in shared]


def work_beside(gm: fx.GraphModule, node: fx.Node) -> float:
    """Operations that Overlap can put between the start and the wait of this node's exchange.

    That is what follows and does not depend on the node, up to the next marked op that does.
    """
    held, total = {node}, 0.0
    following = node.next
    while following.op != "output":
        if any(operand in held for operand in following.all_input_nodes):
            if operator(following) in MARKED:
                break
            held.add(following)
        else:
            total += flops(gm, following)
        following = following.next
    return total
