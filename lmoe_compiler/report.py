"""`lmoe explain NAME`: every stage of a recurrence of the package, or of a whole model, as text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from lmoe_compiler.dry_run import command
from lmoe_compiler.dry_run.presets import PRESETS
from lmoe_compiler.explain import explain
from lmoe_compiler.models import RECURRENCES
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM
from lmoe_compiler.models.own_mixers import is_own, own

_MODEL = "model"


def main(argv: Sequence[str]) -> int:
    """Print the stages of one recurrence, or of a small model's forward and backward; or a dry run."""
    if any(argument in PRESETS or argument.startswith("--ranks") for argument in argv):
        return command.main(argv)
    names, presets = ", ".join(sorted(RECURRENCES)), " or ".join(PRESETS)
    parser = argparse.ArgumentParser(
        prog="lmoe explain",
        description=__doc__,
        epilog=f"recurrences: {names}. Over many ranks: lmoe explain PRESET --help ({presets})",
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        help="a recurrence of the package, FILE.py:NAME of your own, or model",
    )
    parser.add_argument("--pattern", default="LN", help="layers of the model (default: LN)")
    parser.add_argument(
        "--mixer", default="gated_delta_rule", help="its L layers (default: gated_delta_rule)"
    )
    arguments = parser.parse_args(argv)
    if is_own(arguments.name):
        found = own(arguments.name)
        print(getattr(found, "recurrence", found).explain())
        return 0
    if arguments.name in RECURRENCES:
        print(RECURRENCES[arguments.name].explain())
        return 0
    if arguments.name != _MODEL:
        parser.error(
            f"there is no recurrence {arguments.name!r}; there are {names}, or FILE.py:NAME"
        )
    config = ModelConfig(
        num_layers=len(arguments.pattern),
        layer_pattern=arguments.pattern,
        mixers={"L": arguments.mixer, "N": "attention"},
    )
    ids = torch.randint(0, config.vocab_size, (2, 65))
    print(explain(LinearMoEForCausalLM(config), ids[:, :-1], ids[:, 1:]))
    return 0
