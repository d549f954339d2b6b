"""Dims, and the annotations that use them: `State[K, V]`, `Token[K]`, `Token`, `Head[K]`, `Head`.

`K` (keys) and `V` (values) come ready-made; define more by subclassing `Dim`.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import TypeAliasType, TypeVarTuple


class Dim:
    """A named dimension. `class M(lmoe.Dim): "memory slots"`; with `static=True` a step may loop over its size.

    The class's name is the axis's name in the IR; its docstring says what it counts.
    """

    static: ClassVar[bool] = False

    def __init_subclass__(cls, *, static: bool = False, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.static = static


class K(Dim):
    """keys: the rows of a state"""


class V(Dim):
    """values: the columns of a state"""


Axes = TypeVarTuple("Axes")

# To a type checker these are Tensor, so that a body may rebind its arguments freely.
State = TypeAliasType("State", Tensor, type_params=(Axes,))
Token = TypeAliasType("Token", Tensor, type_params=(Axes,))
Head = TypeAliasType("Head", Tensor, type_params=(Axes,))
