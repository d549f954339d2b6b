"""The plan that a benchmark call gets, without running it."""

from __future__ import annotations

from lmoe_compiler.bench.workloads import Shape
from lmoe_compiler.codegen.cost import B, H, T, choose, device, estimate
from lmoe_compiler.codegen.partition import Call, backward_plan, forward_plan
from lmoe_compiler.codegen.plan import Choice, Plan
from lmoe_compiler.codegen.triton import function_name
from lmoe_compiler.ir.nodes import Program
from lmoe_compiler.lower.adjoint import adjoint
from lmoe_compiler.lower.chunk import chunk_program
from lmoe_compiler.models import RECURRENCES


def call_of(program: Program, shape: Shape) -> Call:
    """The plan's view of a benchmark call: bf16, all heads alike, no states given."""
    _, _, heads, size = shape
    sizes = dict(program.static)
    sizes |= {axis.rstrip("'"): size for var in program.inputs for axis in var.axes}
    names = tuple((var.name, heads) for var in program.inputs)
    none = tuple(False for _ in program.states)
    return Call(tuple(sizes.items()), heads, names, "bf16", False, False, none)


def plan_of(op: str, direction: str, shape: Shape) -> Plan:
    program = RECURRENCES[op].program()
    call = call_of(program, shape)
    return plan_for(program, direction, choose(program, direction, call, shape[0], shape[1]), call)


def plan_for(program: Program, direction: str, choice: Choice, call: Call) -> Plan:
    chunk = chunk_program(program)
    if direction == "forward":
        return forward_plan(chunk, choice, call)
    return backward_plan(adjoint(chunk), choice, call)


def bounds(op: str, shape: Shape) -> dict[str, dict[str, float]]:
    """By the name of each kernel of forward and backward: microseconds that its bytes, its arithmetic and its chain of
    dependent products take at least. The largest is what holds it up, if it is near what is measured.
    """
    batch, length, heads, _ = shape
    sizes = {B: batch, T: length, H: heads}
    found = {}
    for direction in ("forward", "backward"):
        plan = plan_of(op, direction, shape)
        for kernel, cost in zip(plan.kernels, estimate(plan), strict=True):
            seconds = cost.seconds(sizes, device())
            found[function_name(plan, kernel)] = {k: 1e6 * v for k, v in seconds.items()}
    return found
