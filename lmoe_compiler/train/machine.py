"""What a run takes from the machine it is on: device, threads, and the compiler below our backend."""

from __future__ import annotations

import os
import shutil
import time
from typing import Any

import torch
from torch import nn

import lmoe_compiler
from lmoe_compiler.errors import InvalidTraining
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM
from lmoe_compiler.train.config import TrainConfig

_CXX = ("g++", "clang++", "c++")


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidTraining(
            f"device={name!r} does not exist", why="auto, cpu or cuda", try_="--device auto"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidTraining(
            f"device={name!r}, but torch sees no GPU",
            why=f"torch {torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}",
            try_="--device cpu",
        )
    return device


def pick_threads(config: TrainConfig, model: LinearMoEForCausalLM) -> int:
    """All cores, unless other programs keep them so busy that threads waiting for each other lose.

    Only for runs by the clock: the number of threads changes how sums are rounded, and equal runs
    of so many steps must have equal losses.
    """
    every = torch.get_num_threads()
    if config.threads or config.steps or every == 1:
        return config.threads or every
    ids = torch.zeros(config.batch_size, config.sequence_length, dtype=torch.int64)
    ids = ids.to(model.embed.weight.device)
    seconds = {}
    for threads in (1, every):
        torch.set_num_threads(threads)
        begin = time.monotonic()
        for _ in range(3):
            model(ids)
        seconds[threads] = time.monotonic() - begin
    return min(seconds, key=lambda threads: seconds[threads])


def pick_compiler(name: str) -> str:
    """`auto` is Inductor, which on CPU needs a C++ compiler."""
    if name != "auto":
        return name
    if torch.cuda.is_available() or any(map(shutil.which, (os.environ.get("CXX", ""), *_CXX))):
        return "inductor"
    return "aot_eager"


def compile_model(model: nn.Module, compiler: str, **options: Any) -> Any:
    """The model through our torch.compile backend, with the inner compiler that was chosen and
    options of `lmoe.compile`.
    """
    compiler = pick_compiler(compiler)
    if compiler == "none":
        return model
    return lmoe_compiler.compile(model, fullgraph=True, inner=compiler, **options)
