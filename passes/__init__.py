"""Stop 7 of the walk: the passes that a model's graph goes through, in their order."""

from lmoe_compiler.config import CompileOptions
from lmoe_compiler.passes.adjoints import Adjoints
from lmoe_compiler.passes.axes import Axes
from lmoe_compiler.passes.base import GraphPass, PassPipeline, Record
from lmoe_compiler.passes.canonicalize import Canonicalize
from lmoe_compiler.passes.dropped import CountDropped
from lmoe_compiler.passes.expert_parallel import ExpertParallel
from lmoe_compiler.passes.experts import LowerExperts
from lmoe_compiler.passes.gather_again import GatherAgain
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
from lmoe_compiler.runtime.mesh import Axis

__all__ = [
    "GraphPass", "PassPipeline", "Record", "after_aot", "after_autograd", "joint_passes", "pipeline",
]  # fmt: skip


def pipeline(options: CompileOptions) -> PassPipeline:
    """The passes of a compilation. Those that change numbers are in it only where an option asks for them."""
    passes: tuple[GraphPass, ...] = (
        # First: what follows matches fewer spellings, and a dead layer gets no collectives.
        Canonicalize(),
        *_spread(options),
        # After the parallel passes, which replace the marks of layers that are spread over ranks by their own form.
        LowerExperts(options.expert_capacity),
    )
    later = [p.name for p in (*_joint(options), *_late(options))]
    return PassPipeline(passes, tuple(name for name in options.disable if name not in later))


def after_autograd(options: CompileOptions) -> tuple[GraphPass, ...]:
    """The passes for the joint graph of forward and backward, before it is cut in two."""
    return tuple(p for p in _joint(options) if p.name not in options.disable)


def after_aot(options: CompileOptions) -> tuple[GraphPass, ...]:
    """The passes for the forward and backward graphs that AOTAutograd makes: ours, then the caller's."""
    ours = (p for p in _late(options) if p.name not in options.disable)
    return (*ours, *options.after_aot)


def _joint(options: CompileOptions) -> tuple[GraphPass, ...]:
    return joint_passes(Axes.of(options).sequence) if options.token_axes else ()


def joint_passes(sequence: Axis | None) -> tuple[GraphPass, ...]:
    """Those of a graph with its backward; `sequence`: the axis over which one is cut."""
    if sequence is None:
        return (Adjoints(),)
    groups = sequence.groups
    # Adjoints pair what autograd made; what comes twice after that is the forward's again.
    return (Adjoints(frozenset({groups["state"]})), GatherAgain(groups["tokens"]))


def _late(options: CompileOptions) -> tuple[GraphPass, ...]:
    return (RaiseStarts(),) if options.token_axes else ()


def _spread(options: CompileOptions) -> tuple[GraphPass, ...]:
    """The passes that make a graph one rank's part of a model."""
    passes: list[GraphPass] = []
    axes, dim = Axes.of(options), options.sequence_dim
    sequence, everyone, experts = axes.sequence, axes.everyone, axes.experts
    if sequence:
        passes += [
            # Finds the token axis for all of these, so it sees the graph as the user wrote it.
            SequenceParallel(sequence, dim, options.schedule, options.even_tokens),
            Halo(sequence, dim),
            SoftmaxParallel(sequence, dim, even=options.even_tokens),
        ]
    if everyone:
        rows = everyone if options.batch_axes else None
        passes.append(GlobalNumbers(sequence or everyone, dim, rows, cut=sequence is not None))
    if options.expert_capacity is not None:
        # Before the two passes that replace expert blocks, because it looks for them.
        passes.append(CountDropped(options.expert_capacity, everyone))
    if axes.heads:
        # Before the marks of expert blocks go, because their weights may be cut both ways.
        passes.append(TensorParallel(axes.heads, options.cuts))
    if experts:
        passes.append(ExpertParallel(experts, options.expert_capacity))
    if axes.summed:
        # After ExpertParallel, which says whose weights are not replicated.
        passes.append(SumGradients(axes.summed, axes.rest))
    if axes.agreeing:
        # It moves waits behind whatever the others have put into the graph.
        passes.append(Overlap())
        passes.append(Verifier(axes, dim))
        # Last: from here on a group's name is no longer its axis's.
        passes.append(Label())
    return tuple(passes)
