"""Editing a Dynamo graph: insert calls whose values are known at once, and say where a node comes
from.

An inserted node is one call of an ordinary function; AOTAutograd traces into it later, which is
what derives its backward. Its fake value is computed on insertion, so the passes after it see
sizes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def fake_mode_of(gm: fx.GraphModule) -> FakeTensorMode | None:
    """The fake mode of the graph's values."""
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


@contextlib.contextmanager
def fake_values(gm: fx.GraphModule) -> Iterator[None]:
    """Ops run on the graph's fake values as they do in Dynamo: composite ones by their Python
    decompositions.
    """
    # Those in C++ may ask for plain sizes: torch 2.11's matmul guards that T is this compilation's
    # length, which makes every T of the graph that number.
    with fake_mode_of(gm) or contextlib.nullcontext(), enable_python_dispatcher():
        yield


def run(node: fx.Node) -> Any:
    """Call what the node calls, on its operands' fake values."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), _value)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _value(node: fx.Node) -> Any:
    return node.meta["example_value"]


def known_size(size: Any) -> int:
    """A size as a number: of this compilation, where it is a symbol."""
    hint = getattr(getattr(size, "node", None), "hint", None)
    return int(size if hint is None else hint)


def where(node: fx.Node) -> str:
    """The layer and the user's line of a node."""
    modules = node.meta.get("nn_module_stack") or {}
    layer = next((path for path, _ in reversed(list(modules.values()))), "")
    lines = [line for line in (node.stack_trace or "").splitlines() if line.strip()]
    return ": ".join(part for part in (clean(layer), "\n".join(lines[-2:]).strip()) if part)


def layer_of(node: fx.Node) -> str:
    """Path of the module that a node came from, as named_modules has it; for a backward, its forward's."""
    modules = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return clean(next((path for path, _ in reversed(list(modules.values()))), "")) or "model"


def parameter_name(node: fx.Node) -> str | None:
    """Name of the parameter that an input of the graph is, as named_parameters of the compiled module has it.

    None for one that is reached otherwise: through a list, a closure.
    """
    name = getattr(getattr(node, "_dynamo_source", None), "name", "")
    text = str(name() if callable(name) else name)  # a method before torch 2.12
    found = re.search(r"((?:\._modules\['[^']+'\])*)\._parameters\['([^']+)'\]$", text)
    if found is None or "._modules[" in text[: found.start()]:
        return None
    return ".".join([*re.findall(r"\['([^']+)'\]", found[1]), found[2]])


def clean(path: str) -> str:
    """Dynamo's "L['self'].layers['0'].mixer" -> "layers.0.mixer"."""
    words = re.sub(r"\['?(\w+)'?\]", r".\1", path).split(".")
    noise = {"L", "G", "self", "fn", "_modules", ""}
    return ".".join(word for word in words if word not in noise)


class Editor:
    """Inserts nodes before `anchor`, named after the pass that made them."""

    def __init__(self, gm: fx.GraphModule, made_by: str) -> None:
        self.gm, self.made_by, self.mode = gm, made_by, fake_mode_of(gm)
        self.anchor: fx.Node = next(iter(gm.graph.nodes))

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """One call before the anchor; operands are nodes and plain data."""
        with self.gm.graph.inserting_before(self.anchor):
            node = self.gm.graph.call_function(function, args, kwargs)
        for key in ("nn_module_stack", "source_fn_stack"):
            if key in self.anchor.meta:
                node.meta[key] = self.anchor.meta[key]
        node.meta["lmoe"] = self.made_by
        self.refresh(node)
        return node

    def refresh(self, node: fx.Node) -> None:
        """Compute a node's fake value (again, where its operands have changed)."""
        node.meta["example_value"] = self.value(node)

    def value(self, node: fx.Node) -> Any:
        """What a node gives for its operands' fake values, as they are now."""
        # Sizes that only the data knows (splits of an all-to-all) are made again by AOTAutograd.
        shapes = self.mode.shape_env if self.mode else None
        fresh = shapes.ignore_fresh_unbacked_symbols() if shapes else contextlib.nullcontext()
        with fake_values(self.gm), fresh:
            return run(node)

    def data(self, name: str, value: Tensor) -> fx.Node:
        """A tensor that differs between ranks, as a buffer: the only way in which a rank enters a
        graph.
        """
        if not hasattr(self.gm, name):
            self.gm.register_buffer(name, value, persistent=False)
            # AOTAutograd wants to know where a graph's tensors come from; this one is ours.
            sources = getattr(self.gm, "_param_name_to_source", None)
            if sources is not None:
                from torch._dynamo.source import ConstantSource

                sources[name] = ConstantSource(source_name=name)
        with self.gm.graph.inserting_before(self.anchor):
            node = self.gm.graph.get_attr(name)
        node.meta["lmoe"] = self.made_by
        node.meta["example_value"] = (
            value if self.mode is None else self.mode.from_tensor(value, static_shapes=True)
        )
        return node

    def finish(self) -> None:
        """Check the graph and make it run."""
        self.gm.graph.lint()
        self.gm.recompile()


def device_of(value: Any) -> torch.device:
    return value.device if isinstance(value, Tensor) else torch.device("cpu")
