"""Independent float64 NumPy forms, with gradients by central differences: no torch, no autograd.

For the variants no library has (sLSTM), and TTT and RWKV-7 a second time, as products of explicit
transition matrices. Signatures as in tests/oracle_fla.py, on NumPy arrays.
"""

import numpy as np


def _scan(inputs, S, transition):
    """S_t = A_t S_{t-1} + write_t v_t', o_t = q_t' S_t, with A_t a K x K matrix."""
    outputs = []
    for t in range(inputs["q"].shape[1]):
        now = {name: x[:, t] for name, x in inputs.items()}
        S = transition(now) @ S + now["write"][..., :, None] * now["v"][..., None, :]
        outputs.append(np.squeeze(now["q"][..., None, :] @ S, -2))
    return np.stack(outputs, 1), [S]


def _outer(a, b):
    return a[..., :, None] * b[..., None, :]


def ttt_linear(q, k, v, eta, states):
    eye = np.eye(k.shape[-1])
    inputs = {"q": q, "k": k, "v": v, "eta": eta[..., None], "write": eta[..., None] * k}
    return _scan(inputs, states[0], lambda t: eye - _outer(t["eta"] * t["k"], t["k"]))


def rwkv7(q, k, v, g, kappa, a, states):
    eye = np.eye(k.shape[-1])
    kappa = kappa / np.sqrt((kappa**2).sum(-1, keepdims=True))
    inputs = {"q": q, "v": v, "g": g, "kappa": kappa, "a": a, "write": k}
    return _scan(
        inputs,
        states[0],
        lambda t: eye * np.exp(t["g"])[..., None, :] - _outer(t["a"] * t["kappa"], t["kappa"]),
    )


def slstm(z, i, f, o, Rz, Ri, Rf, Ro, states):
    """Without the stabiliser: c and n in true scale (eq. 8-14), rescaled by exp(m) at the ends."""
    c, n, m, h = states
    c, n = c * np.exp(m), n * np.exp(m)
    outputs = []
    for t in range(z.shape[1]):
        zt, it, ft, ot = (
            x[:, t] + np.einsum("hij,bhj->bhi", R, h)
            for x, R in ((z, Rz), (i, Ri), (f, Rf), (o, Ro))
        )
        m = np.maximum(-np.log1p(np.exp(-ft)) + m, it)
        forget, write = 1 / (1 + np.exp(-ft)), np.exp(it)
        c, n = forget * c + write * np.tanh(zt), forget * n + write
        h = c / n / (1 + np.exp(-ot))
        outputs.append(h)
    return np.stack(outputs, 1), [c * np.exp(-m), n * np.exp(-m), m, h]


def gradients(function, inputs, states, d_output, d_states, step=1e-6):
    """Gradients of <o, d_output> + <final states, d_states> to all entries of inputs and states."""
    inputs = {name: x.copy() for name, x in inputs.items()}
    states = [x.copy() for x in states]

    def loss():
        output, finals = function(**inputs, states=states)
        return (output * d_output).sum() + sum(
            (final * d).sum() for final, d in zip(finals, d_states, strict=True)
        )

    def gradient(x):
        result = np.zeros_like(x)
        for at in np.ndindex(x.shape):
            value = x[at]
            x[at] = value + step
            above = loss()
            x[at] = value - step
            result[at] = (above - loss()) / (2 * step)
            x[at] = value
        return result

    return {name: gradient(x) for name, x in inputs.items()}, [gradient(x) for x in states]
