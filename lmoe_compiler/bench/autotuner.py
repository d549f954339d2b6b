"""Triton's autotuner under flash-linear-attention: search once, write the choices down, replay them in later runs.

At first use of a kernel the library times every configuration: minutes an op, nearly all of it compiling. A Tuner takes
the place of the one function that Triton asks for a choice it does not know, in one of three modes:

compile   compiles this process's share of the configurations and launches nothing: fills Triton's cache folder
search    times every configuration shortly and the fastest few properly; writes the choice down
replay    takes the choice that was written down; one that was not is searched

Calls after the first are Triton's own, so a replayed kernel costs the library nothing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

Choices = dict[str, dict[str, Any]]
"""Kernel (module and name) -> key as JSON text -> configuration."""

FINALISTS = 4


class Tuner:
    """Installed for the process; `chosen` collects (search) or gives (replay) the choices."""

    def __init__(
        self,
        mode: Literal["compile", "search", "replay"],
        chosen: Mapping[str, Mapping[str, Any]] | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """share: (i, n): of each kernel's configurations only every n-th from the i-th is compiled."""
        self.mode, self.share = mode, share
        self.chosen: Choices = {kernel: dict(found) for kernel, found in (chosen or {}).items()}
        self.searched: list[str] = []
        self.configs: list[Any] = []
        self.called: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.autotuners: dict[int, Any] = {}
        self.bench: Callable[..., Sequence[float]] = once if mode == "compile" else brief

    def install(self) -> None:
        from triton import knobs
        from triton.runtime import autotuner, jit

        # The library asks for this by default; kernels that do not are taken along.
        knobs.autotuning.cache = True
        kind = autotuner.Autotuner
        self.bench_one = kind._bench
        kind.check_disk_cache = lambda tuner, *asked: self._find(tuner, *asked)
        kind._bench = lambda tuner, *args, config, **meta: self._bench(tuner, args, config, meta)
        kind.do_bench = property(lambda tuner: self.bench)
        if self.mode == "compile":
            launch = jit.JITFunction.run
            jit.JITFunction.run = lambda kernel, *args, grid, warmup, **rest: launch(
                kernel, *args, grid=grid, warmup=True, **rest
            )

    def forget(self) -> None:
        """The next call of every kernel is a first one again."""
        for tuner in self.autotuners.values():
            tuner.cache.clear()
        self.chosen, self.searched = {}, []

    def _find(
        self, tuner: Any, key: tuple[Any, ...], configs: Sequence[Any], benchmark: Callable[[], Any]
    ) -> bool:
        """In place of Autotuner.check_disk_cache: sets `tuner.cache[key]`; True if nothing was timed."""
        from triton.runtime.autotuner import Config

        self.autotuners[id(tuner)] = tuner
        function = tuner.base_fn
        name, text = f"{function.__module__}.{function.__name__}", json.dumps(key, default=str)
        if self.mode == "replay" and text in self.chosen.get(name, {}):
            tuner.cache[key] = Config(**self.chosen[name][text])
            return True
        self.configs = list(configs)
        benchmark()
        if self.mode != "compile":
            tuner.cache[key] = self._best(tuner)
            self.searched.append(name)
            self.chosen.setdefault(name, {})[text] = as_written(tuner.cache[key])
        return False

    def _best(self, tuner: Any) -> Any:
        """The fastest of the few that were fastest in the short timing."""
        ranked = sorted(tuner.configs_timings, key=tuner.configs_timings.get)
        args, meta = self.called
        self.bench = careful
        times = {c: self.bench_one(tuner, *args, config=c, **meta) for c in ranked[:FINALISTS]}
        self.bench = brief
        return min(times, key=lambda c: times[c][0])

    def _bench(self, tuner: Any, args: tuple[Any, ...], config: Any, meta: dict[str, Any]) -> Any:
        self.called = args, meta
        first, count = self.share
        if self.configs.index(config) % count != first:
            return [float("inf")] * 3
        return self.bench_one(tuner, *args, config=config, **meta)


def as_written(config: Any) -> dict[str, Any]:
    """The arguments of triton.Config."""
    return {name: value for name, value in vars(config).items() if name != "pre_hook"}


def once(call: Callable[[], Any], quantiles: Any = None) -> list[float]:
    call()
    return [0.0] * 3


def brief(call: Callable[[], Any], quantiles: Any = None) -> list[float]:
    """The best of three runs after one, in milliseconds."""
    import torch

    call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [min(a.elapsed_time(b) for a, b in itertools.pairwise(events))] * 3


def careful(call: Callable[[], Any], quantiles: Any = None) -> list[float]:
    from triton.testing import do_bench

    return list(do_bench(call, warmup=5, rep=30, quantiles=(0.5, 0.2, 0.8)))
