"""The record of a run: one JSON object a line in `metrics.jsonl`, and the same scalars for
TensorBoard.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from lmoe_compiler.train.display import Evaluation, Step

FILE = "metrics.jsonl"


class Logs:
    """Appends to a run's logs; `resumed_at` drops what a killed process wrote after its
    checkpoint.
    """

    def __init__(self, run: Path, resumed_at: int) -> None:
        path = run / FILE
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= resumed_at]
            path.write_text("".join(kept))
        self._file = path.open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_at + 1)

    def step(self, step: Step) -> None:
        load = [[round(share, 4) for share in row] for row in step.load]
        dropped = {"dropped": list(step.dropped)} if step.dropped else {}
        self._write(
            {
                "step": step.step,
                "tokens": step.tokens,
                "seconds": round(step.seconds, 3),
                "loss": step.loss,
                "learning_rate": step.learning_rate,
                "gradient_norm": step.gradient_norm,
                "tokens_per_second": round(step.tokens_per_second),
                "load": load,
                **dropped,
            }
        )
        for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_second"):
            self._board.add_scalar(f"train/{name}", getattr(step, name), step.step)
        for layer, shares in enumerate(step.load):
            busiest = max(shares) * len(shares)
            self._board.add_scalar(f"experts/busiest_{layer}", busiest, step.step)
        for layer, share in enumerate(step.dropped):
            self._board.add_scalar(f"experts/dropped_{layer}", share, step.step)

    def evaluation(self, evaluation: Evaluation) -> None:
        self._write(
            {
                "step": evaluation.step,
                "tokens": evaluation.tokens,
                "seconds": round(evaluation.seconds, 3),
                "held_out": evaluation.bits_per_byte,
            }
        )
        self._board.add_scalar("held_out/bits_per_byte", evaluation.bits_per_byte, evaluation.step)

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def _write(self, record: dict[str, object]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def _step_of(line: str) -> float:
    """A line that a kill cut short belongs to no step that is kept."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")
