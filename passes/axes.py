"""Which ranks hold what: the axes of one compilation, as its passes and their verifier see them."""

from __future__ import annotations

from dataclasses import dataclass

from lmoe_compiler.config import CompileOptions
from lmoe_compiler.runtime.mesh import Axis, axis_of


@dataclass(frozen=True)
class Axes:
    """Each is None where nothing is spread in that way.

    sequence   over which a sequence is cut
    everyone   all ranks with other tokens, of the same sequence or of others
    experts    over which experts are cut
    heads      over which heads and channels are cut; their tokens are the same
    summed     over which the graph sums gradients
    rest       those of `summed` with the same experts
    """

    sequence: Axis | None = None
    everyone: Axis | None = None
    experts: Axis | None = None
    heads: Axis | None = None
    summed: Axis | None = None
    rest: Axis | None = None

    @classmethod
    def of(cls, options: CompileOptions) -> Axes:
        """Those of `lmoe.compile`. Process groups of an axis are made at its first use."""

        def axis(*names: str | None) -> Axis | None:
            given = tuple(name for name in names if name)
            return axis_of(options.mesh, *given) if given else None

        return cls(
            axis(options.sequence_parallel),
            axis(*options.token_axes),
            axis(*options.expert_axes),
            axis(options.tensor_parallel),
            axis(*options.summed_axes),
            axis(*(n for n in options.summed_axes if n not in options.expert_axes)),
        )

    @property
    def agreeing(self) -> tuple[Axis, ...]:
        """Whose ranks have to compile the same collectives."""
        return tuple(dict.fromkeys(a for a in (self.everyone, self.heads) if a))
