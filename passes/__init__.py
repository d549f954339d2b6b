"""Stop 7 of the walk: the passes that a model's graph goes through, in their order."""

from lmoe_compiler.config import CompileOptions
from lmoe_compiler.passes.base import GraphPass, PassPipeline, Record
from lmoe_compiler.passes.canonicalize import Canonicalize
from lmoe_compiler.passes.expert_parallel import ExpertParallel
from lmoe_compiler.passes.experts import LowerExperts
from lmoe_compiler.passes.gradients import SumGradients
from lmoe_compiler.passes.halo import Halo
from lmoe_compiler.passes.label import Label
from lmoe_compiler.passes.losses import GlobalNumbers
from lmoe_compiler.passes.overlap import Overlap
from lmoe_compiler.passes.sequence_parallel import SequenceParallel
from lmoe_compiler.passes.softmax_parallel import SoftmaxParallel
from lmoe_compiler.passes.verifier import Verifier
from lmoe_compiler.runtime.mesh import axis_of, names_of

__all__ = ["GraphPass", "PassPipeline", "Record", "pipeline"]


def pipeline(options: CompileOptions) -> PassPipeline:
    """The passes of a compilation. Those that change numbers are in it only where an option asks for them."""
    passes: tuple[GraphPass, ...] = (
        # First: what follows matches fewer spellings, and a dead layer gets no collectives.
        Canonicalize(),
        *_spread(options),
        # After the parallel passes, which replace the marks of layers that are spread over ranks by their own form.
        LowerExperts(),
    )
    return PassPipeline(passes, options.disable)


def _spread(options: CompileOptions) -> tuple[GraphPass, ...]:
    """The passes that make a graph one rank's part of a model."""
    passes: list[GraphPass] = []
    rows, sequence, cut = (
        names_of(name)
        for name in (options.data_parallel, options.sequence_parallel, options.expert_parallel)
    )
    spread = rows + sequence
    # The same axes on every rank, in one order: process groups are made here.
    tokens, experts, everyone, replicas = (
        axis_of(options.mesh, names if names[1:] else names[0]) if names else None
        for names in (sequence, cut, spread, tuple(name for name in spread if name not in cut))
    )
    dim = options.sequence_dim
    if tokens:
        passes += [
            # Finds the token axis for all of these, so it sees the graph as the user wrote it.
            SequenceParallel(tokens, dim, options.schedule),
            Halo(tokens, dim),
            SoftmaxParallel(tokens, dim),
        ]
    if everyone:
        passes.append(GlobalNumbers(everyone, dim, cut=tokens is not None))
    if experts:
        passes.append(ExpertParallel(experts))
    if everyone and options.sum_gradients:
        # After ExpertParallel, which says whose weights are not replicated.
        passes.append(SumGradients(everyone, replicas))
    axis = everyone or experts
    if axis:
        # After all that talk to other ranks: it moves their waits, and names them.
        passes += [Overlap(), Label(), Verifier(axis, sequence=tokens is not None)]
    return tuple(passes)
