"""A dry run as a picture: lanes in time. Above the whole step, below the forward of its first layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmoe_compiler.dry_run.presets import Setting
from lmoe_compiler.dry_run.replay import COMPUTE, WEIGHTS, Event, Replay
from lmoe_compiler.dry_run.text import headline
from lmoe_compiler.dry_run.unroll import AFTER, BEFORE

LANES = (COMPUTE, "state", "tokens", "experts", "numbers", WEIGHTS)
COLOURS = {
    "state": "#d95f02", "tokens": "#7570b3", "experts": "#1b9e77", "numbers": "#a6761d",
    WEIGHTS: "#666666", "exposed": "#e31a1c",
}  # fmt: skip
SHADES = ("#9ecae1", "#fdd0a2", "#c7e9c0", "#dadaeb")  # computing, by kind of layer
ELSEWHERE = "#d9d9d9"
MEANING = {
    COMPUTE: "computing", "state": "states", "tokens": "halos, keys, heads",
    "experts": "rows of experts", "numbers": "statistics", WEIGHTS: "weights' gradients",
}  # fmt: skip


def draw(name: str, setting: Setting, replayed: Replay, path: Path) -> None:
    """Write the picture; the ending says its kind (png, svg, pdf)."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    figure, (whole, zoomed) = plt.subplots(2, 1, figsize=(15, 9), layout="constrained")
    title, topology = headline(setting).split("\n")
    figure.suptitle(f"{name}: {title}\n{topology}", fontsize=10)
    for axes in (whole, zoomed):
        _lanes(axes, setting, replayed)
    end = replayed.seconds * 1e3
    whole.set_xlim(0, end)
    turn = min(e.start for e in replayed.events if e.backward) * 1e3
    whole.axvline(turn, color="black", linewidth=0.8)
    for x, word, side in ((turn, "forward ", "right"), (turn, " backward", "left")):
        whole.text(x, 1.5, word, ha=side, va="center", fontsize=9)
    exposed = sum(e.exposed for e in replayed.events) * 1e3
    whole.set_title(
        f"one step: {end:.1f} ms, of which {exposed:.1f} ms wait for other ranks", fontsize=9
    )
    # The first run of equal layers: others can take a thousand times as long.
    letters = setting.config.letters
    shown = len(letters) - len(letters.lstrip(letters[0]))
    start, stop = _stretch(replayed, shown)
    zoomed.set_xlim(start, stop)
    _name_layers(zoomed, setting, replayed, shown)
    zoomed.set_title(f"the forward of the first {shown} layers", fontsize=9)
    kinds = [Patch(color=SHADES[i], label=f"layer {k}") for i, k in enumerate(setting.kinds)]
    rest = [
        Patch(color=ELSEWHERE, label="outside of layers"),
        Patch(color=COLOURS["exposed"], label="waiting"),
    ]
    figure.legend(handles=[*kinds, *rest], loc="outside lower center", ncols=8, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _lanes(axes: Any, setting: Setting, replayed: Replay) -> None:
    for event in replayed.events:
        row = LANES.index(event.lane)
        bar = (event.start * 1e3, event.seconds * 1e3)
        axes.broken_barh([bar], (row - 0.36, 0.72), color=_colour(event, setting), linewidth=0.8)
        if event.exposed:
            end = event.start + event.seconds
            waiting = ((end - event.exposed) * 1e3, event.exposed * 1e3)
            axes.broken_barh([waiting], (-0.36, 0.72), color=COLOURS["exposed"], linewidth=0)
    axes.set_yticks(range(len(LANES)), [MEANING[lane] for lane in LANES])
    axes.set_ylim(len(LANES) - 0.4, -0.7)
    axes.set_xlabel("ms")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _colour(event: Event, setting: Setting) -> str:
    if event.lane != COMPUTE:
        return COLOURS[event.lane]
    if event.layer in (BEFORE, AFTER):
        return ELSEWHERE
    return SHADES[setting.kinds.index(setting.config.letters[event.layer]) % len(SHADES)]


def _stretch(replayed: Replay, layers: int) -> tuple[float, float]:
    """From when to when the forward of the first layers runs, in ms."""
    own = [e for e in replayed.events if 0 <= e.layer < layers and not e.backward]
    return min(e.start for e in own) * 1e3, max(e.start + e.seconds for e in own) * 1e3


def _name_layers(axes: Any, setting: Setting, replayed: Replay, layers: int) -> None:
    for layer in range(layers):
        own = [e for e in replayed.of(layer=layer, lane=COMPUTE) if not e.backward]
        start = min(e.start for e in own) * 1e3
        axes.axvline(start, color="black", linewidth=0.5, linestyle=":")
        axes.text(
            start, -0.42, f" {layer} {setting.config.letters[layer]}", fontsize=9, va="bottom"
        )
