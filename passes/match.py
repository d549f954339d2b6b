"""Find marked nodes, and put an ordinary function in the place of one: traced on its fake operands, then spliced.

find(gm, torch.ops.lmoe.experts)       every node that calls the op
replace(gm, node, function, "name")    function(*node.args) traced op by op into the graph instead of the node
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from lmoe_compiler.passes.splice import fake_values

ENTER, EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


def find(gm: fx.GraphModule, *packets: Any) -> list[fx.Node]:
    """Nodes that call one of these ops (any overload), in order."""
    return [
        node
        for node in gm.graph.nodes
        if node.op == "call_function"
        and (node.target in packets or getattr(node.target, "overloadpacket", None) in packets)
    ]


def replace(
    gm: fx.GraphModule,
    node: fx.Node,
    function: Callable[..., Any],
    made_by: str,
    seen: dict[str, fx.GraphModule] | None = None,
) -> list[fx.Node]:
    """Splice `function` over the node's operands in its place; the new nodes, in order.

    `seen` keeps what was traced, so that the layers of a model, which differ in nothing, are traced once.
    """
    operands = list(dict.fromkeys(node.all_input_nodes))
    key, known = _signature(node, operands), {} if seen is None else seen
    traced = known.get(key) or known.setdefault(key, _trace(gm, node, function, operands))
    env: dict[fx.Node, Any] = {}
    given = iter(operands)
    inserted: list[fx.Node] = []
    result: Any = None
    with gm.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                env[inner] = next(given)
            elif inner.op == "output":
                result = fx.node.map_arg(inner.args[0], lambda n: env[n])
            else:
                env[inner] = _copy(gm, traced, inner, env, node, made_by)
                inserted.append(env[inner])
    _use(gm, node, result)
    gm.graph.erase_node(node)
    return inserted


def _trace(
    gm: fx.GraphModule, node: fx.Node, function: Callable[..., Any], operands: list[fx.Node]
) -> fx.GraphModule:
    """`function` on the operands' fake values, above autograd and under the node's autocast."""
    args, kwargs = node.args, node.kwargs

    def flat(*values: Any) -> Any:
        table = dict(zip(operands, values, strict=True))
        given = fx.node.map_arg((args, kwargs), lambda n: table[n])
        return function(*given[0], **given[1])

    with ExitStack() as stack:
        for opened in _open_autocasts(node):
            stack.enter_context(torch.autocast(opened[0], opened[1], opened[2]))
        stack.enter_context(fake_values(gm))
        values = [operand.meta["example_value"] for operand in operands]
        traced = make_fx(flat, pre_dispatch=True)(*values)
    assert isinstance(traced, fx.GraphModule)
    traced.graph.eliminate_dead_code()
    return traced


def _signature(node: fx.Node, operands: list[fx.Node]) -> str:
    """All that a trace depends on: fake values, which operand stands where, plain arguments, autocast."""
    values = [
        (x.shape, x.stride(), x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else x
        for x in (operand.meta["example_value"] for operand in operands)
    ]
    where = fx.node.map_arg((node.args, node.kwargs), lambda n: f"operand {operands.index(n)}")
    return repr((values, where, _open_autocasts(node)))


def _open_autocasts(node: fx.Node) -> list[tuple[Any, ...]]:
    """Arguments of the autocast regions that are open at a node, outermost first."""
    opened: dict[fx.Node, tuple[Any, ...]] = {}
    for earlier in node.graph.nodes:
        if earlier is node:
            break
        if earlier.target is ENTER:
            opened[earlier] = tuple(earlier.args)
        elif earlier.target is EXIT:
            opened.pop(earlier.args[0])
    return list(opened.values())


def _copy(
    gm: fx.GraphModule,
    traced: fx.GraphModule,
    inner: fx.Node,
    env: dict[fx.Node, Any],
    replaced: fx.Node,
    made_by: str,
) -> fx.Node:
    if inner.op == "get_attr":
        name, value = _constant(gm, made_by), getattr(traced, str(inner.target))
        assert isinstance(value, Tensor), inner
        gm.register_buffer(name, value, persistent=False)
        copied = gm.graph.get_attr(name)
        copied.meta["example_value"] = value
    else:
        copied = gm.graph.node_copy(inner, lambda n: env[n])
        copied.meta = {"example_value": inner.meta.get("val")}
    for key in ("nn_module_stack", "stack_trace"):
        if key in replaced.meta:
            copied.meta[key] = replaced.meta[key]
    copied.meta["lmoe"] = made_by
    return copied


def _constant(gm: fx.GraphModule, made_by: str) -> str:
    index = 0
    while hasattr(gm, f"lmoe_{made_by}_{index}"):
        index += 1
    return f"lmoe_{made_by}_{index}"


def _use(gm: fx.GraphModule, node: fx.Node, result: Any) -> None:
    """Let the users of `node` use `result`: a node, or a list of which they take items."""
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
        return
    for user in list(node.users):
        assert user.target is operator.getitem, user
        user.replace_all_uses_with(result[user.args[1]])
        gm.graph.erase_node(user)
