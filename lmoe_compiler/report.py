"""`lmoe explain NAME`: the stages of a recurrence that comes with the package, as text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lmoe_compiler.models import RECURRENCES


def main(argv: Sequence[str]) -> None:
    """Print every stage of one recurrence."""
    parser = argparse.ArgumentParser(prog="lmoe explain", description=__doc__)
    parser.add_argument("name", choices=sorted(RECURRENCES), help="a recurrence of the package")
    print(RECURRENCES[parser.parse_args(argv).name].explain())
