"""What a training run is: dataclass defaults, overridden by a TOML file, overridden by flags.

The flags are read off the dataclasses, so a new field needs no other line.
"""

from __future__ import annotations

import argparse
import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lmoe_compiler.errors import InvalidTraining
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.own_mixers import absolute

DTYPES = ("fp32", "bf16")
COMPILERS = ("auto", "inductor", "aot_eager", "eager", "none")


def option(default: Any, what: str) -> Any:
    """A field with its line of `--help`."""
    return field(default=default, metadata={"help": what})


@dataclass(frozen=True)
class TrainConfig:
    """One run. With `steps=0` it ends, and the learning rate anneals, by the clock (`minutes`)."""

    model: ModelConfig = field(default_factory=ModelConfig)

    data: tuple[str, ...] = option((), "text files, folders, globs; none: Python's own sources")
    tokenizer: str = option("", "a tokenizer.json; empty: bytes")
    held_out: float = option(0.05, "share of the files that is held out, chosen by their hash")
    out: str = option("runs/default", "folder of the run")
    compare: tuple[str, ...] = option((), "runs whose curves are drawn beside this one's")

    minutes: float = option(10.0, "length of the run by the clock")
    steps: int = option(0, "length of the run in steps instead, the deterministic mode")
    sequence_length: int = option(256, "tokens of a training window")
    batch_size: int = option(8, "windows at a time")
    accumulate: int = option(1, "batches that are added up for one step")
    seed: int = option(0, "of the weights and the batches")

    learning_rate: float = option(3e-3, "at its peak")
    final_rate: float = option(0.02, "where the cosine ends, as a share of the peak")
    warmup: float = option(0.02, "share of the run in which the rate rises")
    weight_decay: float = option(0.1, "of matrices")
    beta1: float = option(0.9, "AdamW's")
    beta2: float = option(0.95, "AdamW's")
    clip: float = option(1.0, "largest norm of a step's gradient")

    dp: int = option(0, "ranks that share the rows of a batch; 0: all that there are")
    sp: int = option(1, "ranks that share a sequence")
    ep: int = option(1, "ranks that share the experts: 1, sp, dp or all of the same ranks")
    expert_capacity: float = option(
        0.0,
        "places of an expert for each rank's rows, in units of a balanced load; what finds none is dropped, "
        "in training and on held-out text, and shown; 0: exact, nothing is dropped",
    )
    timeout: float = option(600.0, "seconds after which ranks no longer wait for each other")

    dtype: str = option("fp32", "fp32, or bf16 by autocast")
    device: str = option("auto", "auto, cpu or cuda")
    threads: int = option(0, "of the CPU; 0: all, or one where others keep the cores busy")
    compiler: str = option(
        "auto",
        "below our backend: inductor, aot_eager, eager; none: not compiled; auto: inductor if there is a C++ compiler",
    )
    evaluations: int = option(10, "on held-out text, each with a checkpoint, over the run")
    evaluation_tokens: int = option(32_768, "held-out tokens of an evaluation")
    final_tokens: int = option(131_072, "held-out tokens of the last one")
    keep: int = option(2, "newest checkpoints that stay")
    sample_tokens: int = option(400, "length of the sample at the end")

    def __post_init__(self) -> None:
        for name, known in (("dtype", DTYPES), ("compiler", COMPILERS)):
            if getattr(self, name) not in known:
                raise InvalidTraining(
                    f"{name}={getattr(self, name)!r} does not exist",
                    why=f"it is one of {', '.join(known)}",
                    try_=f"--{name} {known[0]}",
                )
        counts = ("sequence_length", "batch_size", "accumulate", "evaluations", "evaluation_tokens")
        for name in (*counts, "keep", "sp", "ep"):
            if getattr(self, name) < 1:
                raise InvalidTraining(f"{name}={getattr(self, name)} is not positive")
        if self.dp < 0 or self.timeout <= 0:
            raise InvalidTraining(f"dp={self.dp}, timeout={self.timeout}: neither may be negative")
        if not 0 <= self.expert_capacity < float("inf"):
            raise InvalidTraining(
                f"expert_capacity={self.expert_capacity} is neither 0 nor a positive number",
                try_="--expert-capacity 1.25",
            )
        if self.expert_capacity and self.compiler == "none":
            raise InvalidTraining(
                f"expert_capacity={self.expert_capacity} without a compiler",
                why="places are counted out by our backend; models themselves are exact",
                try_="--compiler aot_eager",
            )
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidTraining(f"{name}={getattr(self, name)} is not a positive number")
        if self.seed < 0:
            raise InvalidTraining(f"seed={self.seed} is negative", try_="--seed 0")
        if not 0 <= self.warmup <= 1:
            raise InvalidTraining(
                f"warmup={self.warmup} is not between 0 and 1",
                why="it is a share of the run, not a number of steps",
                try_="--warmup 0.02",
            )
        if not self.out or Path(self.out).is_file():
            raise InvalidTraining(
                f"out={self.out!r} is {'a file' if self.out else 'empty'}",
                why="a run is a folder of its own",
                try_="--out runs/mine",
            )
        if not 0 < self.held_out < 1:
            raise InvalidTraining(
                f"held_out={self.held_out} is not between 0 and 1", try_="--held-out 0.05"
            )
        if self.steps < 0 or (not self.steps and self.minutes <= 0):
            raise InvalidTraining(
                f"steps={self.steps}, minutes={self.minutes}: nothing to do",
                why="a run ends after its steps, or by the clock when steps is 0",
                try_="--minutes 10",
            )


_Config = TypeVar("_Config", TrainConfig, ModelConfig)
# The mixers have a flag of their own, and the tokenizer knows the vocabulary.
_NO_FLAG = ("model", "mixers", "vocab_size")
_ALIASES = {"layer_pattern": ("--pattern",)}
_METAVARS = {int: "N", float: "X", str: "S", bool: "true|false"}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of TrainConfig and ModelConfig, all without a default."""
    parser.add_argument("--config", metavar="TOML", help="a file of these options")
    parser.add_argument("--resume", metavar="RUN", help="continue a run from its last checkpoint")
    parser.add_argument(
        "--mixer",
        metavar="NAME",
        help="the recurrence of the L layers: one of the package, or FILE.py:NAME of your own",
    )
    for title, owner in (("training", TrainConfig), ("model", ModelConfig)):
        group = parser.add_argument_group(title)
        for one in dataclasses.fields(owner):
            if one.name not in _NO_FLAG:
                _add_flag(group, one)


def _add_flag(group: argparse._ArgumentGroup, one: dataclasses.Field[Any]) -> None:
    default = one.default
    several = isinstance(default, tuple)
    shown = "" if several or default == "" else f" (default: {default})"
    group.add_argument(
        flag(one.name),
        *_ALIASES.get(one.name, ()),
        dest=one.name,
        default=argparse.SUPPRESS,
        type=_truth if isinstance(default, bool) else str if several else type(default),
        nargs="*" if several else None,
        metavar="PATH" if several else _METAVARS[type(default)],
        help=one.metadata["help"] + shown,
    )


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def read_toml(path: str | Path) -> dict[str, Any]:
    """Options from a file: those of the run at the top, those of the model under [model]."""
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise InvalidTraining(f"cannot read {path}: {error.strerror}", where="--config") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidTraining(f"{path} is not TOML: {error}", where="--config") from error


def override(config: TrainConfig, changes: Mapping[str, Any], where: str) -> TrainConfig:
    """`config` with changes, in the layout of the TOML file; unknown names are refused."""
    changes = dict(changes)
    model = _replaced(config.model, dict(changes.pop("model", {})), f"{where}, [model]")
    return _replaced(dataclasses.replace(config, model=model), changes, where)


def _replaced(config: _Config, changes: dict[str, Any], where: str) -> _Config:
    defaults = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name, value in changes.items():
        if name not in defaults:
            raise InvalidTraining(
                f"there is no option {name!r}", where=where, why=f"options: {', '.join(defaults)}"
            )
        default = defaults[name]
        if isinstance(default, tuple):
            changes[name] = (value,) if isinstance(value, str) else tuple(value)
        elif isinstance(default, float) and type(value) is int:
            changes[name] = float(value)
        elif isinstance(default, Mapping):
            changes[name] = {**default, **value}
        elif type(value) is not type(default):
            raise InvalidTraining(
                f"{name}={value!r} is not of type {type(default).__name__}", where=where
            )
    return dataclasses.replace(config, **changes)


def from_flags(base: TrainConfig, arguments: argparse.Namespace) -> TrainConfig:
    """`base`, then the file of --config, then the flags that were given."""
    config = base
    if arguments.config:
        config = override(config, read_toml(arguments.config), arguments.config)
    given = {k: v for k, v in vars(arguments).items() if k in _names(TrainConfig)}
    model = {k: v for k, v in vars(arguments).items() if k in _names(ModelConfig)}
    if arguments.mixer:
        model["mixers"] = {"L": absolute(arguments.mixer)}
    if "layer_pattern" in model and "num_layers" not in model:
        repeats = -(-config.model.num_layers // max(1, len(model["layer_pattern"])))
        model["num_layers"] = repeats * len(model["layer_pattern"]) or config.model.num_layers
    return override(config, {**given, "model": model}, "the command line")


def _names(owner: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(owner)}


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain values, as `override` and TOML have them; a mixer object becomes its text."""
    model = {f.name: getattr(config.model, f.name) for f in dataclasses.fields(config.model)}
    model["mixers"] = {letter: str(mixer) for letter, mixer in config.model.mixers.items()}
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()} | {"model": model}


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    return override(TrainConfig(), values, "the checkpoint")


def to_toml(values: Mapping[str, Any]) -> str:
    """The file that `read_toml` reads back: scalars first, tables after."""
    lines = [f"{k} = {_toml_value(v)}" for k, v in values.items() if not isinstance(v, Mapping)]
    for name, table in values.items():
        if isinstance(table, Mapping):
            inline = {k: v for k, v in table.items() if not isinstance(v, Mapping)}
            lines += ["", f"[{name}]", *(f"{k} = {_toml_value(v)}" for k, v in inline.items())]
            for key, inner in table.items():
                if isinstance(inner, Mapping):
                    pairs = ", ".join(f"{k} = {_toml_value(v)}" for k, v in inner.items())
                    lines.append(f"{key} = {{ {pairs} }}")
    return "\n".join(lines) + "\n"


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, Sequence):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return repr(value)
