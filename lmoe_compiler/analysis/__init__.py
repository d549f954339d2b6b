"""Stop 4 of the walk: from traced expressions to a proved recurrence (index polynomials, classification, emission)."""

from lmoe_compiler.analysis.analyse import analyse

__all__ = ["analyse"]
