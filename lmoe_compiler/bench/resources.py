"""`lmoe bench resources`: registers, spills, shared memory of a recurrence's kernels, compiled without a GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from lmoe_compiler.bench.plans import plan_of, span_map_plans
from lmoe_compiler.bench.workloads import DTYPES, GATE_SHAPES, shape_of
from lmoe_compiler.codegen.aot import plan_resources
from lmoe_compiler.models import RECURRENCES

DIRECTIONS = ("forward", "backward", "step", "step_")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="lmoe bench resources", description=__doc__)
    parser.add_argument("ops", nargs="+", choices=sorted(RECURRENCES))
    parser.add_argument(
        "--directions", nargs="*", choices=DIRECTIONS, default=["forward", "backward"]
    )
    parser.add_argument(
        "--span-maps", action="store_true", help="also what sequence parallelism runs on a part"
    )
    parser.add_argument("--shape", default=",".join(map(str, GATE_SHAPES[1])), help="B,T,H,D")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--json", action="store_true", help="one JSON line a kernel")
    chosen = parser.parse_args(argv)
    shape = shape_of(chosen.shape)
    for op in chosen.ops:
        plans = [(d, plan_of(op, d, shape, chosen.dtype)) for d in chosen.directions]
        for direction, plan in [*plans, *(span_map_plans(op, shape) if chosen.span_maps else ())]:
            for kernel, found in plan_resources(plan).items():
                row = {"op": op, "direction": direction, "kernel": kernel, "chunk": plan.chunk}
                if chosen.json:
                    print(json.dumps(row | asdict(found) | {"fits": found.fits}), flush=True)
                else:
                    print(f"{op:18} {direction:9} {kernel:10} C{plan.chunk:<3} {found}", flush=True)
    return 0
