"""Stop 7 of the walk: the passes that a model's graph goes through, in their order."""

from lmoe_compiler.config import CompileOptions
from lmoe_compiler.passes.base import GraphPass, PassPipeline, Record
from lmoe_compiler.passes.canonicalize import Canonicalize
from lmoe_compiler.passes.expert_parallel import ExpertParallel
from lmoe_compiler.passes.experts import LowerExperts
from lmoe_compiler.passes.gradients import SumGradients
from lmoe_compiler.passes.halo import Halo
from lmoe_compiler.passes.losses import GlobalNumbers
from lmoe_compiler.passes.overlap import Overlap
from lmoe_compiler.passes.sequence_parallel import SequenceParallel
from lmoe_compiler.passes.softmax_parallel import SoftmaxParallel
from lmoe_compiler.passes.tensor_parallel import TensorParallel
from lmoe_compiler.passes.verifier import Verifier
from lmoe_compiler.runtime.mesh import axis_of

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
    names = (options.sequence_parallel, options.expert_parallel, options.tensor_parallel)
    tokens, experts, heads = (axis_of(options.mesh, name) if name else None for name in names)
    if tokens:
        dim = options.sequence_dim
        passes += [
            # Finds the token axis for all of these, so it sees the graph as the user wrote it.
            SequenceParallel(tokens, dim, options.schedule),
            Halo(tokens, dim),
            SoftmaxParallel(tokens, dim),
            GlobalNumbers(tokens, dim),
        ]
    if heads:
        # Before the marks of expert blocks go: their weights may be cut both ways.
        passes.append(TensorParallel(heads, options.cuts))
    if experts:
        passes.append(ExpertParallel(experts))
    if tokens and options.sum_gradients:
        # After ExpertParallel, which says whose weights are not replicated.
        passes.append(SumGradients(tokens, options.expert_parallel))
    axis = tokens or experts or heads
    if axis:
        # Last: it moves waits behind whatever the others have put into the graph.
        passes.append(Overlap())
        passes.append(Verifier(axis, sequence=tokens is not None))
    return tuple(passes)
