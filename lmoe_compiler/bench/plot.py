"""The picture of a table: microseconds of ours and the library's, and the memory floor, by op and shape."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def bars(cells: Mapping[tuple[str, tuple[int, ...], str], Mapping[str, Any]], path: Path) -> None:
    """Writes the picture, where matplotlib is installed. `cells` by op, shape and side, as table.py reads them."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = {key: row for key, row in cells.items() if "both_us" in row}
    places = list(dict.fromkeys((op, shape) for op, shape, side in good if side == "ours"))
    if not places:
        return
    figure, panels = pyplot.subplots(2, 1, figsize=(max(6.0, 0.8 * len(places)), 8), sharex=True)
    for panel, (key, title) in zip(
        panels, (("forward", "forward"), ("both", "forward and backward")), strict=True
    ):
        for offset, side in enumerate(("ours", "fla")):
            at = [i for i, place in enumerate(places) if (*place, side) in good]
            heights = [good[*places[i], side][f"{key}_us"] for i in at]
            panel.bar([i + 0.38 * offset for i in at], heights, width=0.36, label=side)
        for i, place in enumerate(places):
            floor = good[*place, "ours"][f"{key}_floor_us"]
            panel.hlines(floor, i - 0.2, i + 0.6, colors="black", linewidth=1)
        panel.set_yscale("log")
        panel.set_ylabel("microseconds")
        panel.set_title(f"{title} (line: memory floor)")
        panel.legend()
    labels = [f"{op}\n{','.join(map(str, shape))}" for op, shape in places]
    panels[-1].set_xticks(range(len(places)), labels, rotation=90, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
