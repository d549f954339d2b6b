"""The plan that a benchmark call gets, without running it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lmoe_compiler.bench.workloads import DTYPES, Shape
from lmoe_compiler.codegen.compiled import Request
from lmoe_compiler.codegen.cost import B, H, T, device, estimate
from lmoe_compiler.codegen.names import printable
from lmoe_compiler.codegen.plan import Plan
from lmoe_compiler.codegen.run import with_columns
from lmoe_compiler.codegen.triton import function_name
from lmoe_compiler.config import Options
from lmoe_compiler.ir.nodes import Program
from lmoe_compiler.layout import Spec, leading, map_axes
from lmoe_compiler.lower import spans
from lmoe_compiler.models import RECURRENCES


def request_of(program: Program, direction: str, shape: Shape, dtype: str = "bf16") -> Request:
    """A benchmark call: tokens of one dtype, fp32 head parameters, all heads alike; a step has a state."""
    step = direction in ("step", "step_")
    sizes = dict(zip("BTH", shape, strict=False))
    specs = [
        Spec(
            (*(sizes[n] for n in leading(var, step=step)), *(shape[3] for _ in var.axes)),
            torch.float32 if var.kind == "head" else DTYPES[dtype],
            torch.device("cuda"),
        )
        for var in program.inputs
    ]
    ends = tuple(False for _ in program.states) if direction == "backward" else ()
    return Request(direction, printable(program), specs, step, None, ends, Options())


def plan_of(op: str, direction: str, shape: Shape, dtype: str = "bf16") -> Plan:
    request = request_of(RECURRENCES[op].program(), direction, shape, dtype)
    return request.plan(request.choice())


def span_map_plans(op: str, shape: Shape) -> Iterator[tuple[str, Plan]]:
    """The plans of a benchmark call's span map, and of its gradients, as sequence parallelism has them."""
    program = RECURRENCES[op].program()
    derived = [("E", spans.ends_program(program))]
    for var, axes in zip(program.states, map_axes(program), strict=True):
        if axes is not None:
            m = with_columns(spans.map_program(program, var.name, axes), shape[3])
            derived.append((f"M of {var.name}", m))
    inputs = request_of(program, "backward", shape).inputs
    for name, part in derived:
        for direction in ("ends", "pullback"):
            ends = tuple(direction == "pullback" for _ in part.states)
            request = Request(direction, printable(part), inputs, True, None, ends, Options())
            yield f"{direction} {name}", request.plan(request.choice())


def bounds(op: str, shape: Shape, dtype: str) -> dict[str, dict[str, float]]:
    """By the name of each kernel of forward and backward: microseconds that its bytes, its arithmetic and its chain of
    dependent products take at least. The largest is what holds it up, if it is near what is measured.
    """
    batch, length, heads, _ = shape
    sizes = {B: batch, T: length, H: heads}
    found = {}
    for direction in ("forward", "backward"):
        plan = plan_of(op, direction, shape, dtype)
        for kernel, cost in zip(plan.kernels, estimate(plan), strict=True):
            seconds = cost.seconds(sizes, device())
            found[function_name(plan, kernel)] = {k: 1e6 * v for k, v in seconds.items()}
    return found
