"""What a dry run is asked: a model, how many ranks, how many tokens on each, and how fast they talk."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lmoe_compiler.errors import InvalidOption
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.runtime.topology import Topology

# Sizes of Linear-MoE (arXiv 2503.05447, table 2): no shared expert, 64 experts, 8 chosen.
PRESETS = {
    "A0.3B-2B": ModelConfig(
        vocab_size=151936, hidden_size=1024, num_layers=12, layer_pattern="LLLN", num_heads=8,
        num_kv_heads=8, head_dim=128, linear_heads=8, key_dim=128, value_dim=128, num_experts=64,
        top_k=8, expert_size=896, shared_expert_size=0,
    ),
    "A1B-7B": ModelConfig(
        vocab_size=151936, hidden_size=2048, num_layers=16, layer_pattern="LLLN", num_heads=16,
        num_kv_heads=16, head_dim=128, linear_heads=16, key_dim=128, value_dim=128, num_experts=64,
        top_k=8, expert_size=1024, shared_expert_size=0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One dry run: `ranks` of which `data` groups each hold a sequence, with `tokens` on each rank.

    `longest`: tokens of the longest packed document, None where one fills the sequence.
    """

    config: ModelConfig
    ranks: int
    tokens: int
    topology: Topology
    schedule: str = "auto"
    longest: int | None = None
    data: int = 1

    def __post_init__(self) -> None:
        if self.data < 1 or self.ranks % self.data or self.ranks < 2 * self.data:
            raise InvalidOption(
                f"{self.ranks} ranks in {self.data} data-parallel groups",
                why="each group holds one sequence on two or more ranks, as many as the others",
                try_="--ranks 1024 --data 16",
            )
        if self.tokens < self.config.conv_size:
            raise InvalidOption(
                f"{self.tokens} tokens on each rank",
                why=f"short convolutions look {self.config.conv_size - 1} tokens back, on one rank",
                try_="--tokens 8192",
            )

    @property
    def sequence(self) -> int:
        """Ranks over which one sequence is cut."""
        return self.ranks // self.data

    @property
    def expert_ranks(self) -> int:
        """Ranks over which experts are cut: neighbours, as many as divide both."""
        return math.gcd(self.config.num_experts, self.sequence) if self.config.num_experts else 1

    @property
    def span(self) -> int | None:
        """Over how many ranks a document spans at most."""
        return None if self.longest is None else math.ceil((self.longest - 1) / self.tokens) + 1

    @property
    def kinds(self) -> str:
        """Letters of the pattern, each once: equal layers are compiled once."""
        return "".join(dict.fromkeys(self.config.letters))
