"""Stop 7 of the walk: the passes that a model's graph goes through, in their order."""

from lmoe_compiler.config import CompileOptions
from lmoe_compiler.passes.base import GraphPass, PassPipeline, Record
from lmoe_compiler.passes.canonicalize import Canonicalize
from lmoe_compiler.passes.dropped import CountDropped
from lmoe_compiler.passes.expert_parallel import ExpertParallel
from lmoe_compiler.passes.experts import LowerExperts
from lmoe_compiler.passes.gradients import SumGradients
from lmoe_compiler.passes.halo import Halo
from lmoe_compiler.passes.label import Label
from lmoe_compiler.passes.losses import GlobalNumbers
from lmoe_compiler.passes.overlap import Overlap
from lmoe_compiler.passes.schedule import RaiseStarts
from lmoe_compiler.passes.sequence_parallel import SequenceParallel
from lmoe_compiler.passes.softmax_parallel import SoftmaxParallel
from lmoe_compiler.passes.tensor_parallel import TensorParallel
from lmoe_compiler.passes.verifier import Verifier
from lmoe_compiler.runtime.mesh import Axis, axis_of

__all__ = ["GraphPass", "PassPipeline", "Record", "after_aot", "pipeline"]


def pipeline(options: CompileOptions) -> PassPipeline:
    """The passes of a compilation. Those that change numbers are in it only where an option asks for them."""
    passes: tuple[GraphPass, ...] = (
        # First: what follows matches fewer spellings, and a dead layer gets no collectives.
        Canonicalize(),
        *_spread(options),
        # After the parallel passes, which replace the marks of layers that are spread over ranks by their own form.
        LowerExperts(options.expert_capacity),
    )
    late = [p.name for p in _late(options)]
    return PassPipeline(passes, tuple(name for name in options.disable if name not in late))


def after_aot(options: CompileOptions) -> tuple[GraphPass, ...]:
    """The passes for the forward and backward graphs that AOTAutograd makes: ours, then the caller's."""
    ours = (p for p in _late(options) if p.name not in options.disable)
    return (*ours, *options.after_aot)


def _late(options: CompileOptions) -> tuple[GraphPass, ...]:
    return (RaiseStarts(),) if options.token_axes else ()


def _spread(options: CompileOptions) -> tuple[GraphPass, ...]:
    """The passes that make a graph one rank's part of a model."""
    passes: list[GraphPass] = []
    sequence = _axis(options, _present(options.sequence_parallel))
    everyone = _axis(options, options.token_axes)
    experts = _axis(options, options.expert_axes)
    heads = _axis(options, _present(options.tensor_parallel))
    summed = _axis(options, options.summed_axes)
    rest = _axis(options, tuple(n for n in options.summed_axes if n not in options.expert_axes))
    dim = options.sequence_dim
    if sequence:
        passes += [
            # Finds the token axis for all of these, so it sees the graph as the user wrote it.
            SequenceParallel(sequence, dim, options.schedule),
            Halo(sequence, dim),
            SoftmaxParallel(sequence, dim),
        ]
    if everyone:
        rows = everyone if options.batch_axes else None
        passes.append(GlobalNumbers(sequence or everyone, dim, rows, cut=sequence is not None))
    if options.expert_capacity is not None:
        # Before the two passes that replace expert blocks, because it looks for them.
        passes.append(CountDropped(options.expert_capacity, everyone))
    if heads:
        # Before the marks of expert blocks go, because their weights may be cut both ways.
        passes.append(TensorParallel(heads, options.cuts))
    if experts:
        passes.append(ExpertParallel(experts, options.expert_capacity))
    if summed:
        # After ExpertParallel, which says whose weights are not replicated.
        passes.append(SumGradients(summed, rest if experts else summed))
    axis = everyone or heads
    if axis:
        # It moves waits behind whatever the others have put into the graph.
        passes.append(Overlap())
        passes.append(Verifier(axis, sequence=sequence is not None))
        # Last: from here on a group's name is no longer its axis's.
        passes.append(Label())
    return tuple(passes)


def _present(name: str | None) -> tuple[str, ...]:
    return () if name is None else (name,)


def _axis(options: CompileOptions, names: tuple[str, ...]) -> Axis | None:
    return axis_of(options.mesh, *names) if names else None
