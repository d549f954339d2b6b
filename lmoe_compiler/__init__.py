"""Write a linear sequence model's recurrence once, for one token; the compiler derives the rest."""

from lmoe_compiler import errors
from lmoe_compiler.backend import compile
from lmoe_compiler.blocks import compile_blocks, data_parallel
from lmoe_compiler.definition import Recurrence, parse, recurrence
from lmoe_compiler.dims import Dim, Head, State, Token
from lmoe_compiler.explain import explain
from lmoe_compiler.parallel import parallelize

__all__ = [
    "Dim",
    "Head",
    "Recurrence",
    "State",
    "Token",
    "compile",
    "compile_blocks",
    "data_parallel",
    "errors",
    "explain",
    "parallelize",
    "parse",
    "recurrence",
]
