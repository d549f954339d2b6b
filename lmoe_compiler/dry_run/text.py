"""A dry run as text: the plan, a table of exchanges by layer, memory and time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from lmoe_compiler.dry_run.capture import Compiled
from lmoe_compiler.dry_run.memory import Memory
from lmoe_compiler.dry_run.presets import Setting
from lmoe_compiler.dry_run.replay import COMPUTE, Event, Replay
from lmoe_compiler.dry_run.unroll import AFTER, BEFORE
from lmoe_compiler.passes.planner import size

HEAD = ("layers", "exchange", "received", "us", "exposed", "received", "us", "exposed")


def page(compiled: Compiled, replayed: Replay, memory: Memory) -> str:
    """Everything, for a terminal."""
    setting = compiled.setting
    return "\n".join(
        [
            headline(setting),
            "",
            "plan, of each kind of layer",
            *(f"  {_renamed(note, setting)}" for note in compiled.notes),
            "",
            f"{'':<{_width(setting)}}  {'each layer, forward':^40}  {'backward':^31}",
            table(setting, replayed),
            "",
            _memory(memory),
            _time(replayed),
        ]
    )


def headline(setting: Setting) -> str:
    """The question, in words."""
    length = setting.sequence * setting.tokens
    data = f"{setting.data} data-parallel groups of " if setting.data > 1 else ""
    longest = f", documents of at most {setting.longest} tokens" if setting.longest else ""
    return (
        f"{data}{setting.sequence} ranks, {setting.tokens} tokens on each: a sequence of {length} "
        f"tokens{longest}; experts cut over {setting.expert_ranks}; one step, forward and backward\n"
        f"{setting.topology}"
    )


def table(setting: Setting, replayed: Replay) -> str:
    """A line for each exchange of each kind of layer: bytes received, time, and what of it is exposed."""
    rows = [HEAD]
    for layers in _places(setting):
        own = [e for e in replayed.events if e.layer in layers and e.lane != COMPUTE]
        for what in dict.fromkeys((e.lane, e.what) for e in own):
            both = [
                _sums((e for e in own if (e.lane, e.what) == what and e.backward is b), len(layers))
                for b in (False, True)
            ]
            rows.append((_names(layers), f"{what[0]}: {what[1]}", *both[0], *both[1]))
    talk = [e for e in replayed.events if e.lane != COMPUTE]
    both = [_sums(e for e in talk if e.backward is b) for b in (False, True)]
    rows.append(("all", "", *both[0], *both[1]))
    return aligned(rows)


def _sums(events: Iterable[Event], layers: int = 1) -> tuple[str, str, str]:
    """In the mean of so many layers."""
    found = list(events)
    if not found:
        return ("", "", "")
    volume, seconds, exposed = (
        sum(getattr(e, name) for e in found) / layers for name in ("volume", "seconds", "exposed")
    )
    return (size(volume), f"{seconds * 1e6:.0f}", f"{exposed * 1e6:.0f}")


def _places(setting: Setting) -> list[list[int]]:
    """Equal layers together, in the order of the model."""
    letters = setting.config.letters
    kinds = [[i for i, c in enumerate(letters) if c == kind] for kind in setting.kinds]
    return [[BEFORE], *kinds, [AFTER]]


def _names(layers: Sequence[int]) -> str:
    """0-2, 4-6, ...: runs of layers."""
    if layers[0] in (BEFORE, AFTER):
        return "embedding" if layers[0] == BEFORE else "head, loss"
    runs = [
        [i for _, i in run]
        for _, run in groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0])
    ]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _renamed(note: str, setting: Setting) -> str:
    """A compiled layer's name -> the letter that it stands for."""
    for index, letter in enumerate(setting.kinds):
        note = note.replace(f"model.layers.{index}.", f"{letter}: ")
    return note


def _width(setting: Setting) -> int:
    return max(len(_names(layers)) for layers in _places(setting)) + 14


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _memory(memory: Memory) -> str:
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "AdamW": memory.optimiser,
        "kept for the backward": memory.kept_in_all,
        "working set": memory.working,
    }
    listed = " + ".join(f"{name} {size(value)}" for name, value in parts.items())
    return f"peak memory, at most {size(memory.peak)}: {listed}"


def _time(replayed: Replay) -> str:
    exposed = sum(e.exposed for e in replayed.events)
    return (
        f"step {replayed.seconds * 1e3:.1f} ms, of which {exposed * 1e3:.1f} ms "
        f"({exposed / replayed.seconds:.0%}) wait for other ranks"
    )
