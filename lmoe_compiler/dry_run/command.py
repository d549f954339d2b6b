"""`lmoe explain A0.3B-2B --ranks 1024`: what a model would send over its ranks, and wait for, on a laptop.

The model is compiled for the rank in the middle of a fake process group, with the passes, the autograd and the checks
of real ranks; of equal layers one. Bytes are those of the graphs' operands, times those of the stated topology at the
stated rate of matrix products. Nothing runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lmoe_compiler.dry_run import picture, scaling
from lmoe_compiler.dry_run.capture import compile_ranks
from lmoe_compiler.dry_run.memory import memory
from lmoe_compiler.dry_run.presets import PRESETS, Setting
from lmoe_compiler.dry_run.replay import replay
from lmoe_compiler.dry_run.text import page
from lmoe_compiler.runtime.topology import SCHEDULES, TOPOLOGIES


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    given = parser.parse_args(argv)
    config, topology = PRESETS[given.name], TOPOLOGIES[given.topology]
    if given.scaling:
        scaling.report(given.name, config, topology, given.schedule, given.out)
        return 0
    if given.ranks is None:
        parser.error("--ranks is needed, or --scaling")
    setting = Setting(
        config, given.ranks, given.tokens, topology, given.schedule, given.longest, given.data
    )
    compiled = compile_ranks(setting)
    replayed = replay(compiled)
    print(f"{given.name}: {page(compiled, replayed, memory(compiled))}")
    path = given.out or Path(f"explain-{given.name}-{given.ranks}.png")
    picture.draw(given.name, setting, replayed, path)
    print(f"timeline: {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lmoe explain", description=__doc__)
    parser.add_argument("name", choices=sorted(PRESETS))
    parser.add_argument("--ranks", type=int, help="ranks in all")
    parser.add_argument(
        "--data", type=int, default=1, help="data-parallel groups among them (default: 1)"
    )
    parser.add_argument("--topology", default="h100", choices=sorted(TOPOLOGIES))
    parser.add_argument(
        "--tokens", type=int, default=8192, help="tokens on each rank (default: 8192)"
    )
    parser.add_argument(
        "--longest", type=int, help="tokens of the longest packed document (default: one fills all)"
    )
    parser.add_argument(
        "--schedule", default="auto", choices=["auto", *(x.name for x in SCHEDULES)],
        help="of state exchanges; ring and hierarchical are priced, not executed",
    )  # fmt: skip
    parser.add_argument(
        "--scaling", action="store_true", help="8 to 1024 ranks, sequences of 16K to 4M tokens"
    )
    parser.add_argument("--out", type=Path, help="file of the picture: .png, .svg or .pdf")
    return parser
