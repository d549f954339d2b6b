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

DTYPES = ("fp32", "bf16")
COMPILERS = ("auto", "inductor", "aot_eager", "eager", "none")


@dataclass(frozen=True)
class TrainConfig:
    """One run. With `steps=0` it ends, and the learning rate anneals, by the clock (`minutes`)."""

    model: ModelConfig = field(default_factory=ModelConfig)

    # files, folders and globs of text; none: the Python standard library's sources on this machine
    data: tuple[str, ...] = ()
    # a tokenizer.json, or empty for bytes
    tokenizer: str = ""
    # share of the files that is held out, chosen by their hash
    held_out: float = 0.05
    # folder of this run: checkpoints, logs, curves, sample
    out: str = "runs/default"
    # runs whose held-out curve is drawn beside this one's
    compare: tuple[str, ...] = ()

    minutes: float = 10.0
    # train this many steps, whatever the time: the deterministic mode
    steps: int = 0
    sequence_length: int = 256
    batch_size: int = 8
    # micro-batches of batch_size sequences added up for one step
    accumulate: int = 1
    seed: int = 0

    learning_rate: float = 3e-3
    # where the cosine ends, as a share of learning_rate
    final_rate: float = 0.02
    # share of the run that the learning rate rises in
    warmup: float = 0.02
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    # largest norm of a step's gradient
    clip: float = 1.0

    dtype: str = "fp32"
    # auto, cpu or cuda
    device: str = "auto"
    # inner compiler below our backend: auto is inductor where there is a C++ compiler, else
    # aot_eager; none trains the module as it stands
    compiler: str = "auto"
    # evaluations on held-out text, with a checkpoint each, spread over the run
    evaluations: int = 10
    # held-out tokens of each evaluation, and of the last one
    evaluation_tokens: int = 32_768
    final_tokens: int = 131_072
    # newest checkpoints that stay
    keep: int = 2
    sample_tokens: int = 400

    def __post_init__(self) -> None:
        for name, known in (("dtype", DTYPES), ("compiler", COMPILERS)):
            if getattr(self, name) not in known:
                raise InvalidTraining(
                    f"{name}={getattr(self, name)!r} does not exist",
                    why=f"it is one of {', '.join(known)}",
                    try_=f"--{name} {known[0]}",
                )
        counts = ("sequence_length", "batch_size", "accumulate", "evaluations", "evaluation_tokens")
        for name in (*counts, "keep"):
            if getattr(self, name) < 1:
                raise InvalidTraining(f"{name}={getattr(self, name)} is not positive")
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


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of TrainConfig and ModelConfig, all without a default."""
    parser.add_argument("--config", metavar="TOML", help="a file of these options")
    parser.add_argument("--resume", metavar="RUN", help="continue a run from its last checkpoint")
    parser.add_argument("--mixer", metavar="NAME", help="the recurrence of the L layers")
    for title, owner in (("training", TrainConfig), ("model", ModelConfig)):
        group = parser.add_argument_group(title)
        for option in dataclasses.fields(owner):
            if option.name in ("model", "mixers"):
                continue
            names = [flag(option.name)]
            if option.name == "layer_pattern":
                names.append("--pattern")
            default = option.default
            several = isinstance(default, tuple)
            group.add_argument(
                *names,
                dest=option.name,
                default=argparse.SUPPRESS,
                type=_truth if isinstance(default, bool) else str if several else type(default),
                nargs="*" if several else None,
                metavar=type(default).__name__ if not several else "PATH",
                help="(default: none)" if several else f"(default: {default})",
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
        model["mixers"] = {"L": arguments.mixer}
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
