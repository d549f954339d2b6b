"""A graph pass and the pipeline that runs passes: what is the same for all of them is done here, once.

In: the graph that Dynamo made of a model. Out: the same graph, changed in place, and a Record of every pass.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import fx
from torch._logging import trace_structured

from lmoe_compiler.debug import show
from lmoe_compiler.errors import InvalidOption, LmoeError, PassFailed
from lmoe_compiler.passes.report import Report

log = logging.getLogger(__name__)


class GraphPass(Protocol):
    """A frozen dataclass: a name, typed options, and a call that changes the graph and says what it did.

    `changes_numerics` passes never run unless an option asks for them.
    """

    @property
    def name(self) -> str: ...
    @property
    def changes_numerics(self) -> bool: ...
    def __call__(self, gm: fx.GraphModule) -> Report: ...


@dataclass(frozen=True)
class PassRecord:
    """One pass over one graph: what it reports, how the operations changed, how long it took."""

    report: Report
    added: dict[str, int]
    removed: dict[str, int]
    seconds: float
    after: str = ""

    def __str__(self) -> str:
        change = [f"+{n} {op}" for op, n in self.added.items()]
        change += [f"-{n} {op}" for op, n in self.removed.items()]
        lines = [f"{self.report}  ({self.seconds * 1e3:.1f} ms)"]
        return "\n".join([*lines, *(f"    {line}" for line in change)])


@dataclass
class GraphRecord:
    """One graph of a compiled model: as it came, pass by pass, and after AOTAutograd where it was seen.

    With `texts` the graphs are kept as text, which takes time to print.
    """

    texts: bool = False
    before: str = ""
    passes: list[PassRecord] = field(default_factory=list)
    programs: tuple[tuple[str, str], ...] = ()
    lowered: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Record:
    """Everything one compilation did."""

    texts: bool = False
    graphs: list[GraphRecord] = field(default_factory=list)


@dataclass(frozen=True)
class PassPipeline:
    """Passes in their order. A pass that changes nothing leaves the module untouched."""

    passes: tuple[GraphPass, ...]
    disable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [p.name for p in self.passes]
        for name in self.disable:
            if name not in names:
                raise InvalidOption(
                    f"disable={name!r}: there is no such pass",
                    why=f"passes of this compilation are {', '.join(names)}",
                    try_=f'options={{"disable": ("{names[0]}",)}}',
                )

    @property
    def active(self) -> list[GraphPass]:
        return [p for p in self.passes if p.name not in self.disable]

    def run(self, gm: fx.GraphModule, record: GraphRecord) -> None:
        """Run every pass on `gm` in place and note each in `record`."""
        if record.texts and not record.before:
            record.before = readable(gm)
        for graph_pass in self.active:
            record.passes.append(_run(graph_pass, gm, record.texts))

    def uuid(self) -> str:
        """Identifies code and options of the passes, for caches of what comes after them."""
        digest = hashlib.sha256()
        for graph_pass in self.active:
            digest.update(repr(graph_pass).encode())
            digest.update(inspect.getsource(type(graph_pass)).encode())
        return digest.hexdigest()


def _run(graph_pass: GraphPass, gm: fx.GraphModule, texts: bool) -> PassRecord:
    old, known = operations(gm), set(gm.graph.nodes)
    start = time.perf_counter()
    try:
        report = graph_pass(gm)
        gm.graph.lint()
        _check_values(gm, known)
    except LmoeError:
        raise
    except Exception as error:
        raise PassFailed(
            f"the pass {graph_pass.name!r} failed: {type(error).__name__}: {error}",
            why="this is a mistake of ours; the graph was not compiled",
            try_=f'torch.compile(model, backend="lmoe", options={{"disable": ("{graph_pass.name}",)}})',
        ) from error
    seconds = time.perf_counter() - start
    new = operations(gm)
    text = readable(gm) if texts and report.counts else ""
    result = PassRecord(report, dict(new - old), dict(old - new), seconds, text)
    log.debug("%s", result)
    show("fx", f"after {graph_pass.name}", lambda: f"{result}\n{readable(gm)}")
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"lmoe_{graph_pass.name}", "encoding": "string"},
        payload_fn=lambda: f"{result}\n{readable(gm)}",
    )
    return result


def _check_values(gm: fx.GraphModule, known: set[fx.Node]) -> None:
    """Whatever a pass inserts carries its fake value, so that the passes after it see sizes."""
    for node in gm.graph.nodes:
        if node not in known and node.op != "output":
            assert "example_value" in node.meta or "val" in node.meta, f"{node} has no value"
            assert "lmoe" in node.meta, f"{node} does not say which pass made it"


def operations(gm: fx.GraphModule) -> Counter[str]:
    """How often each operation occurs."""
    calls = (node for node in gm.graph.nodes if node.op.startswith("call"))
    return Counter(operation(node) for node in calls)


def operation(node: fx.Node) -> str:
    """A node's operation as a person would name it."""
    if isinstance(node.target, str):
        return f".{node.target}" if node.op == "call_method" else node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def readable(gm: fx.GraphModule) -> str:
    """The graph as a Python function with shapes."""
    return gm.print_readable(print_output=False).strip()
