"""Which numbers of a parameter one rank of a mesh axis keeps, and a note of it at the module that owns it.

A layer says how its parameters may be cut, as `Part`s: stretches of one dimension, each of which every rank takes its
share of (heads, hidden channels) or keeps whole (what all heads share). `cut` takes this rank's part, in place, and
notes a `Cut`; `cuts_of` gives all notes of a model, by parameter name. Next: parallel.py, which calls it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from lmoe_compiler.errors import NotShardable

_NOTES = "lmoe_cuts"


@dataclass(frozen=True)
class Part:
    """How one parameter may be cut: stretches (length, shared out or not) that fill dimension `dim`.

    summed: the operation that uses the parameter sums over `dim`, so that a part gives a part of the sum. copies: so
    many neighbouring ranks have the same share of each stretch that is shared out.
    """

    dim: int
    stretches: tuple[tuple[int, bool], ...]
    summed: bool = False
    copies: int = 1

    @classmethod
    def even(cls, parameter: Tensor, dim: int, *, summed: bool = False, copies: int = 1) -> Part:
        """All of the dimension is shared out."""
        return cls(dim, ((parameter.shape[dim], True),), summed, copies)


@dataclass(frozen=True)
class Cut:
    """What a rank has of a parameter: `spans` (start, stop) of the whole's dimension `dim`, one behind the other.

    axis: of the mesh. common: spans of the rank's own part that all ranks of the axis have. summed, copies: as in Part.
    """

    axis: str
    dim: int
    spans: tuple[tuple[int, int], ...]
    common: tuple[tuple[int, int], ...] = ()
    summed: bool = False
    copies: int = 1

    @classmethod
    def of(cls, part: Part, axis: str, index: int, size: int) -> Cut:
        """The part of rank `index` of `size`; every shared stretch is a multiple of `size / copies`."""
        share, parts = index // part.copies, size // part.copies
        spans, common, own = [], [], 0
        ends = accumulate(length for length, _ in part.stretches)
        for (length, shared), end in zip(part.stretches, ends, strict=True):
            count = length // parts if shared else length
            start = end - length + (share * count if shared else 0)
            spans.append((start, start + count))
            if not shared:
                common.append((own, own + count))
            own += count
        return cls(axis, part.dim, tuple(spans), tuple(common), part.summed, part.copies)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the mesh that `axis` is: several may be cut over as one."""
        return tuple(self.axis.split(" x "))

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of `whole`, in memory of its own."""
        parts = [whole.narrow(self.dim, a, b - a) for a, b in self.spans]
        return torch.cat(parts, self.dim)


def share(count: int, ranks: int, what: str) -> int:
    """How many of `count` things each of so many ranks has; raises NotShardable if that is no whole number."""
    if count % ranks:
        raise NotShardable(
            f"{count} {what} on {ranks} ranks",
            why="each rank of an axis holds as many as the others",
            try_=f"a number of {what} that {ranks} divides, or a smaller axis of the mesh",
        )
    return count // ranks


@contextmanager
def located(where: str) -> Iterator[None]:
    """Add the layer's name to the errors of `share`."""
    try:
        yield
    except NotShardable as error:
        raise NotShardable(
            error.what, where=where, why=error.why, try_=error.try_
        ) from error.__cause__


def cut(module: nn.Module, name: str, part: Part, axis: str, index: int, size: int) -> None:
    """Replace parameter `name` (dotted, below `module`) by this rank's part and note that."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    parameter = owner.get_parameter(leaf)
    for length, shared in part.stretches:
        if shared:
            share(length, size // part.copies, f"numbers along dimension {part.dim} of {name}")
    taken = Cut.of(part, axis, index, size)
    own = nn.Parameter(taken.take(parameter.detach()), requires_grad=parameter.requires_grad)
    # Not setattr: a ParameterDict keeps names of its own.
    owner._parameters[leaf] = own
    notes: dict[str, tuple[Cut, ...]] = owner.__dict__.setdefault(_NOTES, {})
    notes[leaf] = (*notes.get(leaf, ()), taken)


def cuts_of(model: nn.Module) -> dict[str, tuple[Cut, ...]]:
    """The notes of all cut parameters of a model, by name, in the order in which they were cut."""
    return dict(_notes(model))


def _notes(model: nn.Module) -> Iterator[tuple[str, tuple[Cut, ...]]]:
    for path, module in model.named_modules():
        notes: Mapping[str, tuple[Cut, ...]] = module.__dict__.get(_NOTES, {})
        for name, cuts in notes.items():
            yield f"{path}.{name}" if path else name, cuts
