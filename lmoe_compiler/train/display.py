"""What a person sees while a model trains: a live panel in a terminal, plain lines elsewhere.

In: `Step` and `Evaluation` records of the loop. Out: text. Nothing here touches the model.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Step:
    """One optimiser step. `load` has a row per sparse layer: each expert's share of that layer's
    choices. `dropped`: of each sparse layer, the share of its choices that found no place; empty
    without a capacity.
    """

    step: int
    progress: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    seconds: float
    load: Sequence[Sequence[float]]
    dropped: Sequence[float] = ()

    @property
    def seconds_left(self) -> float:
        return self.seconds / self.progress * (1 - self.progress) if self.progress else 0.0


@dataclass(frozen=True)
class Evaluation:
    """Held-out text after `step` steps."""

    step: int
    tokens: int
    seconds: float
    bits_per_byte: float


class Display(Protocol):
    def say(self, text: str) -> None: ...
    def step(self, step: Step) -> None: ...
    def evaluation(self, evaluation: Evaluation) -> None: ...
    def close(self) -> None: ...


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The last values as bars, averaged down to `width`."""
    if not values:
        return ""
    size = max(1, -(-len(values) // width))
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    means = [sum(group) / len(group) for group in groups]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_BARS[1 + round(7 * (value - low) / span)] for value in means)


def load_bars(shares: Sequence[float]) -> str:
    """Each expert's share; a full bar is twice the balanced share, an empty one a dead expert."""
    return "".join(_BARS[min(8, round(4 * share * len(shares)))] for share in shares)


class PlainDisplay:
    """Lines for logs and pipes: one each `every` seconds, and one for each evaluation."""

    def __init__(self, out: TextIO | None = None, every: float = 15.0) -> None:
        self._out, self._every, self._last = out or sys.stdout, every, float("-inf")

    def say(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def step(self, step: Step) -> None:
        now = time.monotonic()
        if now - self._last < self._every and step.progress < 1:
            return
        self._last = now
        worst = max((max(row) * len(row) for row in step.load), default=1.0)
        dropped = f"dropped {max(step.dropped):.1%} at most  " if step.dropped else ""
        self.say(
            f"step {step.step:6d}  {step.progress:4.0%}  loss {step.loss:.4f}  "
            f"lr {step.learning_rate:.1e}  {step.tokens_per_second:7,.0f} tokens/s  "
            f"busiest expert {worst:.1f}x  {dropped}{clock(step.seconds_left)} left"
        )

    def evaluation(self, evaluation: Evaluation) -> None:
        self.say(
            f"step {evaluation.step:6d}  held-out {evaluation.bits_per_byte:.4f} bits per byte"
        )

    def close(self) -> None:
        pass


class Silent:
    """For ranks other than the first: neither shows nor records anything."""

    def say(self, text: str) -> None:
        pass

    def step(self, step: Step) -> None:
        pass

    def evaluation(self, evaluation: Evaluation) -> None:
        pass

    def close(self) -> None:
        pass


class LiveDisplay:
    """A panel that redraws itself; what is said scrolls by above it."""

    def __init__(self, baselines: dict[str, float]) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console()
        self._baselines = baselines
        self._losses: deque[float] = deque(maxlen=20_000)
        self._evaluations: list[Evaluation] = []
        self._last: Step | None = None
        self._live = Live(console=self._console, refresh_per_second=2, get_renderable=self._render)
        self._live.start()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def step(self, step: Step) -> None:
        self._losses.append(step.loss)
        self._last = step

    def evaluation(self, evaluation: Evaluation) -> None:
        self._evaluations.append(evaluation)

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> Any:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        step = self._last
        if step is None:
            return Panel("compiling and taking the first step ...", title="lmoe train")
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right")
        bar.add_row(
            ProgressBar(total=1.0, completed=step.progress),
            f"{step.progress:4.0%}  {clock(step.seconds)} + {clock(step.seconds_left)}",
        )
        facts = Table.grid(padding=(0, 2))
        facts.add_row("loss", f"[bold]{step.loss:.4f}[/]  {sparkline(list(self._losses), 48)}")
        facts.add_row("held-out", self._held_out())
        facts.add_row(
            "speed",
            f"{step.tokens_per_second:,.0f} tokens/s   step {step.step:,}   {step.tokens:,} tokens",
        )
        facts.add_row(
            "optimiser",
            f"rate {step.learning_rate:.2e}   gradient norm {step.gradient_norm:.2f}",
        )
        for layer, shares in enumerate(step.load):
            worst = max(shares) * len(shares)
            text = f"{load_bars(shares)}  busiest {worst:.2f}x"
            if step.dropped:
                text += f"  dropped {step.dropped[layer]:.2%}"
            facts.add_row(f"experts {layer}", text)
        return Panel(Group(bar, facts), title="lmoe train")

    def _held_out(self) -> str:
        beside = "  ".join(f"{name} {bits:.2f}" for name, bits in self._baselines.items())
        if not self._evaluations:
            return f"[dim]first evaluation to come   {beside}[/]"
        bits = [e.bits_per_byte for e in self._evaluations]
        return f"[bold]{bits[-1]:.4f}[/] bits per byte  {sparkline(bits, 16)}   [dim]{beside}[/]"


def make_display(baselines: dict[str, float]) -> Display:
    """Live in a terminal that can show it, else plain."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        return LiveDisplay(baselines)
    return PlainDisplay()


def result_table(model: str, bits: float, baselines: dict[str, float]) -> str:
    """Held-out bits per byte of the model beside the baselines, best first."""
    rows = sorted([(model, bits), *baselines.items()], key=lambda row: row[1])
    width = max(len(name) for name, _ in rows)
    scale = 40 / max(value for _, value in rows)
    lines = [
        f"  {name:<{width}}  {value:6.3f}  {'█' * max(1, round(value * scale))}"
        for name, value in rows
    ]
    return "\n".join(["held-out bits per byte (less is better)", *lines])
