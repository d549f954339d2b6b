"""Layers and models around the recurrences, and the table of recurrences: name -> definition."""

from lmoe_compiler.models.delta_rule import delta_rule, gated_delta_rule, kda, rwkv7
from lmoe_compiler.models.diagonal_decay import gla, hgrn2
from lmoe_compiler.models.nonlinear import slstm
from lmoe_compiler.models.scalar_decay import (
    linear_attention,
    mamba2,
    normalised_linear_attention,
    retention,
    simple_gla,
)
from lmoe_compiler.models.test_time_training import ttt_linear

RECURRENCES = {
    "linear_attention": linear_attention,
    "normalised_linear_attention": normalised_linear_attention,
    "retention": retention,
    "simple_gla": simple_gla,
    "mamba2": mamba2,
    "gla": gla,
    "hgrn2": hgrn2,
    "delta_rule": delta_rule,
    "gated_delta_rule": gated_delta_rule,
    "kda": kda,
    "rwkv7": rwkv7,
    "ttt_linear": ttt_linear,
    "slstm": slstm,
}

__all__ = ["RECURRENCES", *RECURRENCES]
