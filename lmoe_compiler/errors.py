"""Every mistake a user can make, one class each: what is wrong, where, why, and code that works.

`assert` is for our own bugs; users only ever see these. Warnings that we raise are here too.
"""

from __future__ import annotations

from functools import partial
from textwrap import indent
from typing import Any


class LmoeError(Exception):
    """Base of every error. The message is four labelled parts; empty parts are left out."""

    def __init__(self, what: str, *, where: str = "", why: str = "", try_: str = "") -> None:
        self.what, self.where, self.why, self.try_ = what, where, why, try_
        super().__init__(what, where, why, try_)

    def __str__(self) -> str:
        parts = [self.what]
        for label, part in (("where", self.where), ("why", self.why), ("try", self.try_)):
            if part:
                parts.append(f"  {label + ':':<7}" + indent(part, " " * 9).lstrip())
        return "\n".join(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        parts = {"where": self.where, "why": self.why, "try_": self.try_}
        return partial(type(self), **parts), (self.what,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self}"


# Step functions and programs.


class UnknownAnnotation(LmoeError, TypeError):
    """An argument of a step function without State, Token or Head, or with something that is no Dim."""


class BadSignature(LmoeError, TypeError):
    """A step function whose arguments cannot be a recurrence's: no state, *args, defaults, a clash of names."""


class WrongReturn(LmoeError, ValueError):
    """A step returned the wrong number of values, or a state of another shape."""


class MixedDims(LmoeError, ValueError):
    """Two different dims met where one was expected (S + S.T), or a dim was taken for a number."""


class DataDependentControlFlow(LmoeError, ValueError):
    """A Python branch, loop or conversion that needs the value of a tensor."""


class InPlaceUpdate(LmoeError, ValueError):
    """A step that changes a tensor in place."""


class SideEffect(LmoeError, ValueError):
    """A step that changes something outside itself."""


class CapturedTensor(LmoeError, ValueError):
    """A step that uses a tensor which is not one of its arguments."""


class UnsupportedOperation(LmoeError, NotImplementedError):
    """A torch operation that has no meaning for one token of one head."""


class IRSyntaxError(LmoeError, ValueError):
    """IR text that does not parse; `where` holds line and column."""


class InvalidProgram(LmoeError, ValueError):
    """A recurrence, built by hand or parsed, that breaks a rule of the IR."""


class BadBound(LmoeError, ValueError):
    """A declared bound of an unknown input, or with low above high."""


# Configuration.


class InvalidOption(LmoeError, ValueError):
    """An option, a backend option or an LMOE_* variable has a name or value that does not exist."""


class ImplementationUnavailable(LmoeError, RuntimeError):
    """`implementation="triton"` was asked for where it cannot run."""


class FallbackWarning(UserWarning):
    """`implementation="auto"` could not take the generated kernels; said once per reason."""


# Calls.


class InvalidArgument(LmoeError, TypeError):
    """A call has an unknown, missing or doubled argument, or one that is not a tensor."""


class ShapeMismatch(LmoeError, ValueError):
    """An argument has the wrong rank, or disagrees with another about a size."""


class HeadCountMismatch(ShapeMismatch):
    """Head counts must divide the widest input's."""


class DtypeMismatch(LmoeError, ValueError):
    """An argument has a dtype that this recurrence cannot take, or a mix of dtypes."""


class DeviceMismatch(LmoeError, ValueError):
    """Arguments lie on different devices."""


class InvalidCuSeqlens(LmoeError, ValueError):
    """`cu_seqlens` must be int32 [N+1], 0 = c0 <= c1 <= ... <= cN = T, with a batch of one."""


class InvalidState(LmoeError, ValueError):
    """`initial_state=` or `state=` has the wrong count, shape or dtype."""


class BoundViolated(LmoeError, ValueError):
    """Under debug: an input left the range that `bounds=` declares."""


class WrongResult(LmoeError, ArithmeticError):
    """LMOE_VERIFY found a lowered recurrence that disagrees with its program: a mistake of ours."""


# Differentiation.


class UnsupportedTransform(LmoeError, NotImplementedError):
    """Forward mode or a second derivative through a compiled recurrence."""


class NoSpanMap(LmoeError, NotImplementedError):
    """The state after a span is not an affine function of the state before it."""


# The torch.compile backend.


class PassFailed(LmoeError, RuntimeError):
    """A graph pass raised or left a graph that does not hold together."""


# Models and training.


class InvalidModel(LmoeError, ValueError):
    """A model's configuration contradicts itself: sizes, layer pattern, experts, mixers."""


class InvalidTraining(LmoeError, ValueError):
    """A training option has an unknown name or an impossible value."""


class InvalidData(LmoeError, ValueError):
    """Training text, a tokenizer or a prompt is missing, empty, unreadable or too short."""


class DamagedCheckpoint(LmoeError, RuntimeError):
    """A checkpoint is missing a file or its bytes are not those that were written."""


class ArchitectureMismatch(LmoeError, ValueError):
    """`--resume` with a model that differs from the checkpoint's."""


class NonFiniteLoss(LmoeError, ArithmeticError):
    """The loss or a gradient became NaN or infinite; training stopped before using it."""


# Many ranks.


class StaticSequence(LmoeError, ValueError):
    """The token axis has a fixed size in the graph, so passes cannot follow it."""


class MixesTokens(LmoeError, NotImplementedError):
    """An operation combines tokens of different ranks in a way that no pass knows."""


class NotShardable(LmoeError, NotImplementedError):
    """A marked operation is used in a way that has no meaning on a shard of the sequence."""


class DropsInSilence(LmoeError, ValueError):
    """A fixed expert capacity, for a model that does not report what it leaves out."""


class CollectiveFailed(LmoeError, RuntimeError):
    """A collective timed out or lost a rank: which operation of which layer, and what is known of the others."""


class WrongOnRanks(LmoeError, RuntimeError):
    """The verifier found a layer that would be wrong on a cut sequence, or ranks that would not agree."""


class RanksDisagree(WrongOnRanks):
    """Ranks compared what they compiled, and it differs, or one of them has nothing to compare."""
