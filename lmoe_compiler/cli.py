"""The `lmoe` command: train, generate, explain, bench. Each is a module with `main(argv)`, loaded
when asked for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from lmoe_compiler.errors import LmoeError

COMMANDS = {
    "train": ("lmoe_compiler.train.run", "train a language model on text, compiled"),
    "generate": ("lmoe_compiler.train.generate", "continue prompts with a trained model"),
    "explain": ("lmoe_compiler.report", "every stage of a recurrence, as text"),
    "bench": ("lmoe_compiler.bench", "time generated kernels on a GPU"),
}

_EXTRA = "pip install 'lmoe-compiler[train]'"


def usage() -> str:
    """What `lmoe --help` prints."""
    rows = "\n".join(f"  lmoe {name:<10} {what}" for name, (_, what) in COMMANDS.items())
    return f"""\
lmoe: write a linear sequence model's recurrence once; the compiler derives the rest.

{rows}

`lmoe COMMAND --help` lists a command's options. To begin:

  lmoe train --minutes 10                      a hybrid model on the Python standard library
  lmoe train --pattern NNNN --out runs/softmax   its softmax twin
  lmoe generate runs/default --prompt 'def '"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"lmoe: there is no command {command!r}\n\n{usage()}", file=sys.stderr)
        return 2
    module = COMMANDS[command][0]
    try:
        status: int | None = importlib.import_module(module).main(rest)
        return status or 0
    except LmoeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("lmoe_compiler"):
            raise
        print(f"lmoe {command} needs {error.name}: {_EXTRA}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1


if __name__ == "__main__":
    sys.exit(main())
