"""`lmoe explain A1B-7B --scaling`: one step from 8 to 1024 ranks and of sequences from 16K to 4M tokens.

strong    one sequence of a fixed length, cut over more and more ranks
weak      a fixed number of tokens on each rank, so that the sequence grows with the ranks

Each number of ranks is compiled once. Sizes in its graphs are expressions in T, so every length is read off the same
graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmoe_compiler.dry_run.capture import Compiled, compile_ranks
from lmoe_compiler.dry_run.memory import memory
from lmoe_compiler.dry_run.presets import Setting
from lmoe_compiler.dry_run.replay import COMPUTE, replay
from lmoe_compiler.dry_run.text import aligned
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.passes.planner import size
from lmoe_compiler.runtime.topology import Topology

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
LENGTHS = tuple(2**k for k in (14, 16, 18, 20, 22))
PER_RANK = (2048, 4096, 8192)
COMPILED = 4096  # tokens a rank at compilation; any number gives the same graphs
LEAST = 16  # tokens a rank: below, halos and chunks are longer than what they serve

ASSUMPTIONS = """\
Assumptions: one sequence over all ranks (no data parallelism), as many tokens on each; experts over up to 64
neighbours, balanced routing; one document fills the sequence; bfloat16; products at the stated rate whatever their
size, elementwise work free; links at the stated speed without congestion; gradients of weights reduced once a step,
while the backward runs; recurrences at the cheapest schedule that runs; softmax layers by heads where ranks divide
them, else everybody gets all keys."""


@dataclass(frozen=True)
class Point:
    """One step: seconds, of which exposed; tokens per second and rank; peak memory in bytes.

    `recurrences`: seconds of it in recurrent layers with their experts; nothing in them grows with the sequence.
    """

    ranks: int
    length: int
    seconds: float
    exposed: float
    memory: float
    recurrences: float

    @property
    def rate(self) -> float:
        return self.length / self.seconds / self.ranks


def point(compiled: Compiled, length: int) -> Point:
    """What a compilation says of a sequence of that many tokens."""
    ranks = compiled.setting.sequence
    tokens = length // ranks
    replayed = replay(compiled, tokens)
    letters, choices = compiled.setting.config.letters, compiled.choices
    recurrent = {int(name.split(".")[2]) for name in choices}
    kinds = compiled.setting.kinds
    seconds = sum(
        e.seconds if e.lane == COMPUTE else e.exposed
        for e in replayed.events
        if e.layer >= 0 and kinds.index(letters[e.layer]) in recurrent
    )
    exposed = sum(e.exposed for e in replayed.events)
    return Point(ranks, length, replayed.seconds, exposed, memory(compiled, tokens).peak, seconds)


def grid(
    config: ModelConfig, topology: Topology, schedule: str = "auto", ranks: Sequence[int] = RANKS
) -> tuple[list[Point], list[Point]]:
    """(strong, weak)"""
    strong, weak = list[Point](), list[Point]()
    for count in ranks:
        compiled = compile_ranks(Setting(config, count, COMPILED, topology, schedule))
        strong += [point(compiled, n) for n in LENGTHS if n // count >= LEAST]
        weak += [point(compiled, n * count) for n in PER_RANK]
    return strong, weak


def report(
    name: str, config: ModelConfig, topology: Topology, schedule: str, out: Path | None
) -> None:
    """Print both tables and draw them."""
    strong, weak = grid(config, topology, schedule)
    print(f"{name}, state exchange {schedule}\n{topology}\n{ASSUMPTIONS}\n")
    for title, points in (("strong", strong), ("weak", weak)):
        print(f"{title}\n{table(points)}\n")
    path = out or Path(f"scaling-{name}.png")
    draw(f"{name}, state exchange {schedule}; {topology}", strong, weak, path)
    print(f"picture: {path}")


def table(points: Sequence[Point]) -> str:
    """A line a point, ordered by length within ranks."""
    head = (
        "ranks",
        "sequence",
        "tokens a rank",
        "step ms",
        "exposed",
        "recurrent ms",
        "tokens/s a rank",
        "memory",
    )
    rows = [
        (
            str(p.ranks), _count(p.length), str(p.length // p.ranks), f"{p.seconds * 1e3:.1f}",
            f"{p.exposed / p.seconds:.0%}", f"{p.recurrences * 1e3:.1f}", f"{p.rate:.0f}", size(p.memory),
        )
        for p in points
    ]  # fmt: skip
    return aligned([head, *rows])


def _count(n: int) -> str:
    return f"{n >> 20}M" if n >= 1 << 20 else f"{n >> 10}K"


def draw(title: str, strong: Sequence[Point], weak: Sequence[Point], path: Path) -> None:
    """Step time over ranks: of fixed sequences (strong), and of fixed tokens a rank (weak)."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for number, length in enumerate(LENGTHS):
        own = [p for p in strong if p.length == length]
        _line(left, own, f"{_count(length)} tokens", number)
    for number, tokens in enumerate(PER_RANK):
        own = [p for p in weak if p.length == tokens * p.ranks]
        _line(right, own, f"{tokens} tokens a rank", number)
    left.set_title("strong: a sequence over more ranks")
    right.set_title("weak: a sequence that grows with the ranks")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(RANKS, [str(r) for r in RANKS])
        axes.set_xlabel("ranks")
        axes.set_ylabel("ms a step; dashed: of it in recurrent layers; dotted: ideal")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _line(axes: Any, points: Sequence[Point], label: str, number: int) -> None:
    if not points:
        return
    ranks = [p.ranks for p in points]
    first, colour = points[0], f"C{number}"
    axes.plot(ranks, [p.seconds * 1e3 for p in points], "o-", color=colour, label=label)
    axes.plot(ranks, [p.recurrences * 1e3 for p in points], "--", color=colour)
    ideal = [
        first.seconds * 1e3 * (p.length / p.ranks) / (first.length / first.ranks) for p in points
    ]
    axes.plot(ranks, ideal, ":", color=colour)
