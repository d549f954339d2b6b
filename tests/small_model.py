"""A small hybrid with everything: a recurrence with short convolutions, grouped softmax, experts, a shared one."""

from __future__ import annotations

from lmoe_compiler.models.config import ModelConfig

# Weights as large as this keep gradients away from rounding.
SMALL = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    layer_pattern="LN",
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    linear_heads=4,
    key_dim=4,
    value_dim=4,
    num_experts=4,
    top_k=2,
    expert_size=8,
    shared_expert_size=8,
    init_std=0.2,
)
