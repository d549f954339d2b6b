"""Every collective learns its name: the layer and what it is for, as the name of its process group.

    halo(x, 3, ..., "7")  ->  halo(x, 3, ..., "layers.0.mixer.conv: sequence.halo @7")

It is the same group. A time-out in the compiled graph, forward or backward, can then say what was waited for
(runtime/failures.py).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import fx

from lmoe_compiler.passes.report import Report
from lmoe_compiler.passes.splice import layer_of
from lmoe_compiler.passes.verifier import collectives_of
from lmoe_compiler.runtime.failures import named


@dataclass(frozen=True)
class Label:
    """Names the group of every collective after its layer and function."""

    name: str = "label"
    changes_numerics: bool = False

    def __call__(self, gm: fx.GraphModule) -> Report:
        report = Report(self.name)
        for node in collectives_of(gm):
            assert callable(node.target)
            parameters = list(inspect.signature(node.target).parameters)
            position = parameters.index("group") if "group" in parameters else len(node.args)
            group = node.args[position] if position < len(node.args) else None
            if not isinstance(group, str):
                continue
            label = f"{layer_of(node)}: {_purpose(node)}"
            if (name := named(group, label)) != group:
                node.update_arg(position, name)
                report.add("collectives")
        if report.counts:
            gm.recompile()
        return report


def _purpose(node: fx.Node) -> str:
    return f"{node.target.__module__.rpartition('.')[2]}.{node.target.__name__}"  # type: ignore[union-attr]
