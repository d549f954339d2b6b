"""Stop 7 of the walk: the passes that a model's graph goes through, in their order."""

from lmoe_compiler.config import CompileOptions
from lmoe_compiler.passes.adjoints import Adjoints
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
from lmoe_compiler.passes.verifier import Verifier
from lmoe_compiler.runtime.mesh import Axis, axis_of

__all__ = ["GraphPass", "PassPipeline", "Record", "after_autograd", "axes", "pipeline"]


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


def after_autograd(options: CompileOptions) -> PassPipeline:
    """What looks at the joint graph of forward and backward."""
    tokens, _ = axes(options)
    spread = options.sequence_parallel or options.expert_parallel
    groups = frozenset({tokens.groups["state"]} if tokens else ())
    return PassPipeline((Adjoints(groups),) if spread else ())


def axes(options: CompileOptions) -> tuple[Axis | None, Axis | None]:
    """The axis of the tokens and that of the experts. Their process groups are made at the first call."""
    names = (options.sequence_parallel, options.expert_parallel)
    tokens, experts = (axis_of(options.mesh, name) if name else None for name in names)
    return tokens, experts


def _spread(options: CompileOptions) -> tuple[GraphPass, ...]:
    """The passes that make a graph one rank's part of a model."""
    passes: list[GraphPass] = []
    tokens, experts = axes(options)
    if tokens:
        dim = options.sequence_dim
        passes += [
            # Finds the token axis for all of these, so it sees the graph as the user wrote it.
            SequenceParallel(tokens, dim, options.schedule),
            Halo(tokens, dim),
            SoftmaxParallel(tokens, dim),
            GlobalNumbers(tokens, dim),
        ]
    if experts:
        passes.append(ExpertParallel(experts))
    if tokens and options.sum_gradients:
        # After ExpertParallel, which says whose weights are not replicated.
        passes.append(SumGradients(tokens, options.expert_parallel))
    if tokens or experts:
        # Last: it moves waits behind whatever the others have put into the graph.
        passes.append(Overlap())
        sums = tokens is not None and options.sum_gradients
        passes.append(Verifier(tokens, experts, options.sequence_dim, sums))
    return tuple(passes)
