"""Layers and models around the recurrences, and the table of recurrences: name -> definition."""

from lmoe_compiler.models import (
    delta_rule,
    diagonal_decay,
    nonlinear,
    scalar_decay,
    test_time_training,
)

RECURRENCES = {
    "linear_attention": scalar_decay.linear_attention,
    "normalised_linear_attention": scalar_decay.normalised_linear_attention,
    "retention": scalar_decay.retention,
    "simple_gla": scalar_decay.simple_gla,
    "mamba2": scalar_decay.mamba2,
    "gla": diagonal_decay.gla,
    "hgrn2": diagonal_decay.hgrn2,
    "delta_rule": delta_rule.delta_rule,
    "gated_delta_rule": delta_rule.gated_delta_rule,
    "kda": delta_rule.kda,
    "rwkv7": delta_rule.rwkv7,
    "ttt_linear": test_time_training.ttt_linear,
    "slstm": nonlinear.slstm,
}

__all__ = ["RECURRENCES"]
