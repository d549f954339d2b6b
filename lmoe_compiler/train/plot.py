"""The curves of one or several runs as a picture: loss, held-out bits per byte, expert load.

In: `metrics.jsonl` of the runs. Out: `curves.png`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

_SMOOTHING = 40
_COLOURS = ("#1f6fb2", "#d1495b", "#2a9d5c", "#8e5ea2")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def draw(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], baselines: Mapping[str, float], path: Path
) -> None:
    """One picture; the first run is the one that just ended, and its expert loads are shown."""
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.4), width_ratios=(1, 1, 0.9))
    for (name, metrics), colour in zip(runs.items(), _COLOURS, strict=False):
        _draw_run(axes[0], axes[1], name, metrics, colour)
    axes[0].set(xlabel="million tokens", ylabel="nats per token", title="training loss")
    axes[1].set(xlabel="million tokens", ylabel="bits per byte", title="held-out text")
    # The worst baseline would flatten the curves.
    for name, bits in sorted(baselines.items(), key=lambda item: item[1])[:-1]:
        axes[1].axhline(bits, color="#777777", linewidth=0.8, linestyle="--")
        right = axes[1].get_yaxis_transform()
        axes[1].text(
            0.99, bits, name, transform=right, ha="right", va="bottom", fontsize=8, color="#555555"
        )
    for axis in axes[:2]:
        axis.grid(alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    _draw_load(figure, axes[2], next(iter(runs.values())))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_run(
    loss: Any, held_out: Any, name: str, metrics: Sequence[Mapping[str, Any]], colour: str
) -> None:
    steps = [m for m in metrics if "loss" in m]
    values = np.array([m["loss"] for m in steps])
    window = max(1, len(values) // _SMOOTHING)
    if len(values):
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        tokens = np.array([m["tokens"] / 1e6 for m in steps])[window - 1 :]
        loss.plot(tokens, smooth, color=colour, linewidth=1.4, label=name)
        loss.set_ylim(smooth.min() * 0.95, np.quantile(smooth, 0.98) * 1.05)
    evaluations = [m for m in metrics if "held_out" in m]
    held_out.plot(
        [m["tokens"] / 1e6 for m in evaluations],
        [m["held_out"] for m in evaluations],
        "o-", color=colour, markersize=3, linewidth=1.4, label=name,
    )  # fmt: skip


def _draw_load(figure: Any, axis: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Rows are experts of all layers, columns are time; white is the balanced share."""
    loads = [m["load"] for m in metrics if m.get("load")]
    if not loads:
        axis.set_visible(False)
        return
    shares = np.array(loads)
    relative = (shares * shares.shape[-1]).reshape(len(loads), -1).T
    columns = np.array_split(relative, min(200, relative.shape[1]), axis=1)
    picture = np.stack([column.mean(axis=1) for column in columns], axis=1)
    image = axis.imshow(picture, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, origin="lower")
    for layer in range(1, shares.shape[1]):
        axis.axhline(layer * shares.shape[2] - 0.5, color="black", linewidth=0.6)
    middles = [(layer + 0.5) * shares.shape[2] - 0.5 for layer in range(shares.shape[1])]
    axis.set_yticks(middles, [f"layer {layer}" for layer in range(shares.shape[1])], fontsize=8)
    axis.set_xticks([])
    axis.set(xlabel="training", title="expert load (1 is balanced)")
    figure.colorbar(image, ax=axis, fraction=0.05)
