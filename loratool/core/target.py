"""Target: the atom of naming, a block of output rows of one base weight."""

from __future__ import annotations

from math import prod
from typing import NamedTuple


class Target(NamedTuple):
    """A block of output rows that no naming cuts further.

    `component` is a pipeline component (`unet`, `text_encoder`, ...), `path` the diffusers or
    transformers module path, with `:part` behind it where a naming reorders the rows inside one
    module (`norm_out.linear:scale`). `shape` is `(out, in)`, `(out, in, kh, kw)`, or `(size,)` for a
    norm, of the standard model. Trailing 1x1 kernels are not significant (see `same_shape`). A tuple, as thousands are
    made whenever a table is built.
    """

    component: str
    path: str
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Number of output rows in the standard model."""
        return self.shape[0]

    @property
    def module_path(self) -> str:
        """The path without the `:part` of a finer target."""
        return self.path.partition(":")[0]


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` without trailing dimensions of size 1 beyond `(out, in)`: a 1x1 conv is a linear."""
    end = len(shape)
    while end > 2 and shape[end - 1] == 1:
        end -= 1
    return shape[:end]


def may_be(shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether an update of `shape` may be one of a weight of that shape. A flattened kernel counts as equal.

    0 is a side that the update's factors do not tell; then its columns may be those of the input alone, too.
    """
    if shape[0] not in (0, weight[0]):
        return False
    return prod(shape[1:]) in (0, prod(weight[1:])) or (shape[0] == 0 and shape[1:2] == weight[1:2])


def same_shape(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    """Whether two weight shapes are equal modulo trailing 1x1 kernels."""
    return squeezed(left) == squeezed(right)
