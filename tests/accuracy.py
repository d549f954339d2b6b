"""The rule for half precision: an error is judged beside that of a float32 loop on the same rounded inputs."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative RMS errors that the libraries' own tests allow in bf16 (reference/fla_and_rivals.md 3.1);
# float16 carries three more bits, float32 is held to some units in its last place.
ALLOWED = {
    torch.bfloat16: {"output": 0.005, "gradient": 0.008, "gate": 0.02},
    torch.float16: {"output": 0.001, "gradient": 0.001, "gate": 0.003},
    torch.float32: {"output": 4e-6, "gradient": 4e-6, "gate": 4e-6},
}


measured: list[tuple[str, float]] = []
"""What the current test compared, for its report: name and relative RMS error."""


def relative_rms(actual: Tensor, exact: Tensor) -> float:
    error = (actual.double() - exact.double()).square().mean().sqrt()
    return float(error / exact.double().square().mean().sqrt().clamp_min(1e-30))


def assert_accurate(
    actual: dict[str, Tensor],
    floor: dict[str, Tensor],
    exact: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Each at most 1.5 times as far from `exact` as `floor`, or the library's tolerance; NaN never passes."""
    wrong = []
    for name, x in actual.items():
        kind = "gate" if x.dim() < 4 else "gradient" if name.startswith("d") else "output"
        error, least = relative_rms(x, exact[name]), relative_rms(floor[name], exact[name])
        measured.append((name, error))
        if not error <= max(1.5 * least, ALLOWED[dtype][kind]):
            wrong.append(f"{name}: {error:.1e}, float32 loop {least:.1e}")
    assert not wrong, wrong
