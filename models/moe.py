"""A sparse mixture of SwiGLU experts: a top-k softmax router, its losses and loads, an optional
shared expert.

Dropless: every chosen (token, expert) pair is computed, unless the model is compiled with a fixed
capacity; then `Routing.dropped` says how many are not. The experts are one op, `lmoe::experts`; no
communication here (the expert-parallel pass inserts it).
Notation: B batch, T tokens, N = B T, D hidden size, E experts, k chosen, F expert size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmoe_compiler.cuts import Part, share
from lmoe_compiler.experts import dropped_rows, experts
from lmoe_compiler.models.config import ModelConfig


class Routing(NamedTuple):
    """What the router's choices cost, summed over tokens: other blocks of a model take these, and
    have their own tokens. Everything is an output of the graph: no host read.
    """

    aux_loss: Tensor  # scalar, 1 when balanced
    z_loss: Tensor  # scalar
    load: Tensor  # [E] tokens per expert
    dropped: Tensor  # [E] those of them that find no place there (capacity.py)


def route(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor, Routing]:
    """Softmax over all experts, then the k largest; logits [N, E] in float32 -> weights and ids
    (int64) of the chosen, [N, k], and their statistics.

    aux_loss = E sum_e f_e P_e, f_e the share of choices and P_e the mean probability of expert e
    (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6); z_loss = mean logsumexp^2 (Zoph et al. 2022,
    arXiv 2202.08906, eq. 5).
    """
    probabilities = logits.softmax(dim=-1)
    weights, ids = probabilities.topk(top_k, dim=-1)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    load = F.one_hot(ids, logits.shape[-1]).sum(dim=(0, 1)).to(logits.dtype)
    share = load / max(1, ids.numel())
    aux_loss = logits.shape[-1] * (share * probabilities.mean(dim=0)).sum()
    z_loss = logits.logsumexp(dim=-1).square().mean()
    dropped = dropped_rows(ids, logits.shape[-1]).to(load.dtype)
    return weights, ids, Routing(aux_loss, z_loss, load, dropped)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): a dense MLP, or the expert that every token visits."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * size, bias=False)
        self.down_proj = nn.Linear(size, hidden_size, bias=False)

    def tensor_parts(self, ranks: int) -> dict[str, Part]:
        """What hidden channels own, for parallelize(tensor_parallel=...)."""
        size = self.down_proj.weight.shape[1]
        share(size, ranks, "channels of an MLP")
        return {
            "gate_up_proj.weight": Part(0, ((size, True), (size, True))),
            "down_proj.weight": Part.even(self.down_proj.weight, 1, summed=True),
        }

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        y: Tensor = self.down_proj(F.silu(gate) * up)
        return y


class SparseMoE(nn.Module):
    """x [B, T, D] -> [B, T, D] and the routing. Experts are gate_up [E, 2F, D] and down [E, D,
    F].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.renormalise = config.top_k, config.renormalise
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.gate_up = nn.Parameter(
            torch.empty(config.num_experts, 2 * config.expert_size, config.hidden_size)
        )
        self.down = nn.Parameter(
            torch.empty(config.num_experts, config.hidden_size, config.expert_size)
        )
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, std=config.init_std)
        self.shared = (
            SwiGLU(config.hidden_size, config.shared_expert_size)
            if config.shared_expert_size
            else None
        )

    def tensor_parts(self, ranks: int) -> dict[str, Part]:
        """What the experts' hidden channels own, for parallelize(tensor_parallel=...)."""
        size = self.down.shape[2]
        share(size, ranks, "channels of an expert")
        return {
            "gate_up": Part(1, ((size, True), (size, True))),
            "down": Part.even(self.down, 2, summed=True),
        }

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        rows = x.flatten(0, -2)
        # The router stays in float32 or wider: a rounded logit changes who is chosen.
        wide = torch.promote_types(self.router.weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(rows.to(wide), self.router.weight.to(wide))
        weights, ids, routing = route(logits, self.top_k, self.renormalise)
        y = experts(rows, weights, ids, self.gate_up, self.down)
        y = y.view_as(x)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, routing
