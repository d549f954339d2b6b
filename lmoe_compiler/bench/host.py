"""`lmoe bench host`: what the processor does in one call, everything but the launches themselves.

Runs without a GPU: kernels are planned and printed as for one, and a launch does nothing. Tensors lie in the
processor's memory, whose allocator costs about what the caching allocator of a GPU does.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lmoe_compiler import implementation
from lmoe_compiler.bench.workloads import WORKLOADS, make_inputs
from lmoe_compiler.codegen import compiled, driver, launch, launcher
from lmoe_compiler.definition import Recurrence
from lmoe_compiler.models import RECURRENCES

SHAPE = (1, 128, 2, 16)


class Compiled:
    """Stands in for a compiled kernel."""

    function, packed_metadata = 1, (4, 1, 0)
    metadata = SimpleNamespace(
        name="none", global_scratch_size=0, profile_scratch_size=0, num_ctas=1, launch_pdl=False
    )


class Driver:
    """Stands in for a CUDA driver before 12.4: every function says that all is well."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name == "cuFuncGetParamInfo":
            raise AttributeError(name)
        setattr(self, name, _well)
        return _well

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: object, flags: object) -> int:
        executable._obj.value = 1
        return 0


def _well(*_: object) -> int:
    return 0


def _compile(
    self: launcher.Launcher, grid: int, args: object, device: int | None, keep: bool
) -> None:
    self.compiled[device] = Compiled()


def _together(calls: object) -> None:
    pass


def _yes() -> bool:
    return True


def _stream(device: int) -> int:
    return 0


@contextmanager
def no_launches() -> Iterator[None]:
    """CPU tensors take the way of CUDA tensors, and kernels do nothing."""
    nothing = Driver()

    def stand_in() -> Driver:
        return nothing

    compiled.forget()
    implementation.forget()
    with (
        mock.patch.object(implementation, "_interpreted", _yes),
        mock.patch.object(launcher.Launcher, "compile", _compile),
        mock.patch.object(launch, "compile_together", _together),
        mock.patch.object(launch, "current_stream", _stream),
        mock.patch.object(driver, "driver", stand_in),
    ):
        yield
    compiled.forget()
    implementation.forget()


def calls(recurrence: Recurrence, inputs: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    """The timed calls: inference, training, a decode step, and a step in place."""
    leaves = list(inputs.values())
    plain = [x.detach() for x in leaves]
    output = recurrence(*leaves)
    weights = torch.ones_like(output)
    tokens = {var.name for var in recurrence.inputs if var.kind == "token"}
    one = [x.detach()[:, 0].contiguous() if n in tokens else x.detach() for n, x in inputs.items()]
    _, state = recurrence.step(*one)
    state = state if isinstance(state, tuple) else (state,)
    arg = state if len(state) > 1 else state[0]

    def train() -> object:
        return torch.autograd.grad(recurrence(*leaves), leaves, weights)

    return {
        "forward": lambda: recurrence(*plain),
        "forward+backward": train,
        "step": lambda: recurrence.step(*one, state=arg),
        "step in place": lambda: recurrence.step(*one, state=arg, inplace=True),
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="lmoe bench host", description=__doc__)
    parser.add_argument("ops", nargs="*", help="default: simple_gla gated_delta_rule gla")
    parser.add_argument(
        "--profile", choices=["forward", "forward+backward", "step", "step in place"]
    )
    chosen = parser.parse_args(argv)
    for op in chosen.ops or ["simple_gla", "gated_delta_rule", "gla"]:
        with no_launches():
            recurrence = RECURRENCES[op].with_options(implementation="triton")
            inputs = make_inputs(WORKLOADS[op], SHAPE, torch.bfloat16, "cpu")
            for name, function in calls(recurrence, inputs).items():
                for _ in range(3):
                    function()
                if chosen.profile == name:
                    _profile(function)
                print(f"{op:18} {name:18} {1e6 * least(function):7.1f} us", flush=True)
    return 0


def least(function: Callable[[], object], batches: int = 40, size: int = 50) -> float:
    """Seconds of processor time of a call: of many batches the least, because others use the machine too."""
    times = []
    for _ in range(batches):
        begin = time.process_time()
        for _ in range(size):
            function()
        times.append((time.process_time() - begin) / size)
    return min(times)


def _profile(function: Callable[[], object]) -> None:
    with cProfile.Profile() as profile:
        for _ in range(2000):
            function()
    pstats.Stats(profile).sort_stats("tottime").print_stats(35)


def functions_entered(function: Callable[[], object]) -> int:
    """Python functions that one call enters."""
    with cProfile.Profile(builtins=False) as profile:
        function()
    return sum(entry.callcount for entry in profile.getstats())
