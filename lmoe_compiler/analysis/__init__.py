"""Stop 4 of the walk: from traced expressions to a proved recurrence.

poly.py (the normal form), functions.py (its identities), evaluate.py (expressions to polynomials), classify.py (one
step's polynomial as decay, feedback, write), emit.py (polynomials to expressions), analyse.py (the whole),
intervals.py (ranges), check.py (the program against the step).
"""

from lmoe_compiler.analysis.analyse import analyse
from lmoe_compiler.analysis.check import check
from lmoe_compiler.analysis.intervals import interval

__all__ = ["analyse", "check", "interval"]
