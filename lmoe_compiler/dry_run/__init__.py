"""Models compiled for ranks that do not exist: presets -> capture -> replay, memory -> text, picture, scaling."""

from lmoe_compiler.dry_run.capture import Compiled, capture, compile_ranks, fake_ranks
from lmoe_compiler.dry_run.memory import Memory, memory
from lmoe_compiler.dry_run.presets import PRESETS, Setting
from lmoe_compiler.dry_run.replay import Event, Replay, replay

__all__ = [
    "PRESETS", "Compiled", "Event", "Memory", "Replay", "Setting", "capture", "compile_ranks",
    "fake_ranks", "memory", "replay",
]  # fmt: skip
