"""Stop 7 of the walk: the passes that a model's graph goes through, in their order."""

from lmoe_compiler.config import CompileOptions
from lmoe_compiler.passes.base import GraphPass, PassPipeline, Record
from lmoe_compiler.passes.canonicalize import Canonicalize
from lmoe_compiler.passes.experts import LowerExperts

__all__ = ["GraphPass", "PassPipeline", "Record", "pipeline"]


def pipeline(options: CompileOptions) -> PassPipeline:
    """The passes of a compilation. Those that change numbers are in it only where an option asks for them."""
    passes: tuple[GraphPass, ...] = (
        # First: what follows matches fewer spellings, and a dead layer gets no collectives.
        Canonicalize(),
        # After the parallel passes, which replace the marks of layers that are spread over ranks by their own form.
        LowerExperts(),
    )
    return PassPipeline(passes, options.disable)
