"""flash-linear-attention's naive functions, one per variant. Runs only under tests/run_oracles.py.

Every function takes a recurrence's inputs by name and its initial states, all in our layout
(inputs [B, T, H, ...], states [B, H, ...]), and returns the output and the final states.
"""

import torch
import torch.nn.functional as F
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.kda.naive import naive_recurrent_kda
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from fla.ops.simple_gla.naive import naive_chunk_simple_gla, naive_recurrent_simple_gla


def _unscaled(q):
    """Several of these functions scale q by K ** -0.5 and take no argument for it."""
    return q * q.shape[-1] ** 0.5


def _head_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def linear_attention(q, k, v, states):
    o, S = naive_recurrent_linear_attn(q, k, v, 1.0, states[0], output_final_state=True)
    return o, [S]


def normalised_linear_attention(q, k, v, states):
    S, z = states
    start = (S, z[:, None])
    o, (S, z) = naive_recurrent_linear_attn(
        F.elu(q) + 1, F.elu(k) + 1, v, 1.0, start, output_final_state=True, normalize=True
    )
    return o, [S, z[:, 0]]


def retention(q, k, v, gamma, states):
    g = gamma.log().expand(q.shape[:3])
    o, S = naive_recurrent_simple_gla(q, k, v, g, 1.0, states[0])
    return o, [S]


def simple_gla(q, k, v, g, states):
    o, S = naive_chunk_simple_gla(q, k, v, g, states[0], True, chunk_size=16, scale=1.0)
    return o, [S]


def mamba2(q, k, v, dt, A_log, dt_bias, D, states):
    dt = F.softplus(dt + dt_bias)
    g = -A_log.exp() * dt
    o, S = naive_recurrent_simple_gla(q, k, dt[..., None] * v, g, 1.0, states[0])
    return o + D[:, None] * v, [S]


def gla(q, k, v, g, states):
    o, S = naive_recurrent_gla(_unscaled(q), k, v, g, states[0], output_final_state=True)
    return o, [S]


def hgrn2(q, f, v, states):
    f = torch.sigmoid(f)
    return gla(q, 1 - f, v, f.log(), states)


def delta_rule(q, k, v, beta, states):
    o, S = delta_rule_recurrence(*_head_first(_unscaled(q), k, v, beta), states[0])
    return o.transpose(1, 2), [S]


def gated_delta_rule(q, k, v, g, beta, states):
    o, S = naive_recurrent_gated_delta_rule(q, k, v, beta, g, 1.0, states[0], True)
    return o, [S]


def kda(q, k, v, g, beta, states):
    o, S = naive_recurrent_kda(q, k, v, g, beta, 1.0, states[0], output_final_state=True)
    return o, [S]


def rwkv7(q, k, v, g, kappa, a, states):
    kappa = kappa / kappa.norm(dim=-1, keepdim=True)
    o, S = dplr_recurrence(*_head_first(_unscaled(q), k, v, -kappa, a * kappa, g), states[0])
    return o.transpose(1, 2), [S]


def ttt_linear(q, k, v, eta, states):
    """One gradient step on |S' k - v|^2 / 2 is the delta rule's update."""
    return delta_rule(q, k, v, eta, states)
