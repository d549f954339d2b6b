"""transformers' torch code paths, for the variants it has. Runs only under tests/run_oracles.py.

Signatures as in tests/oracle_fla.py. These are the chunked forms: their algebra is not fla's.
"""

from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule


def _unscaled(q):
    return q * q.shape[-1] ** 0.5


def mamba2(q, k, v, dt, A_log, dt_bias, D, states):
    o, S = mamba2_chunk_scan(
        v, dt, -A_log.exp(), k, q, 8, D=D, dt_bias=dt_bias, dt_softplus=True,
        initial_states=states[0].transpose(-1, -2), return_final_states=True,
    )  # fmt: skip
    return o, [S.transpose(-1, -2)]


def gated_delta_rule(q, k, v, g, beta, states):
    o, S = torch_chunk_gated_delta_rule(
        _unscaled(q), k, v, g, beta, chunk_size=8, initial_state=states[0], output_final_state=True
    )
    return o, [S]


def delta_rule(q, k, v, beta, states):
    return gated_delta_rule(q, k, v, 0 * beta, beta, states)


def kda(q, k, v, g, beta, states):
    o, S = chunk_kimi_delta_attention(
        _unscaled(q), k, v, g, beta, chunk_size=8, initial_state=states[0], output_final_state=True
    )
    return o, [S]
