"""`lmoe train` for torchrun, with a rank that dies: torchrun tests/torchrun_main.py RANK STEP FILE train ...

Rank RANK notes the time in FILE and kills itself within step STEP, after its backward pass.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

from lmoe_compiler import cli
from lmoe_compiler.train.loop import Trainer


def main(rank: int, step: int, file: Path, argv: list[str]) -> int:
    gradients = Trainer._gradients

    def last(self):
        result = gradients(self)
        if dist.get_rank() == rank and self.clock.step + 1 == step:
            file.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Trainer._gradients = last  # type: ignore[method-assign]
    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
