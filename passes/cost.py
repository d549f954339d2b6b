"""Work in a model's graph: operations of a node, and of what can run while a layer waits for other ranks."""

from __future__ import annotations

import torch
from torch import fx

from lmoe_compiler.passes.splice import fake_values, known_size, run
from lmoe_compiler.passes.token_axis import MARKED, operator


def flops(gm: fx.GraphModule, node: fx.Node) -> float:
    """Operations of one of the user's nodes, by torch's counter; elementwise work counts as nothing."""
    if not node.op.startswith("call") or node.meta.get("lmoe"):
        return 0.0
    if any("example_value" not in operand.meta for operand in node.all_input_nodes):
        return 0.0
    # torch's counter imports triton, which importing us must not.
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with fake_values(gm), torch.no_grad(), counter:
        run(node)
    return float(known_size(counter.get_total_flops()))


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
