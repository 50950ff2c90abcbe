"""Method: one way to merge the updates of several adapters. What a plug-in in `merging/` offers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Update(Protocol):
    """One input's update of one weight, as a method sees it: alpha / rank and block weights applied, strength not.

    Everything is float32 or better, on one device, and the kernel of a convolution is flattened: `(out, in * kh * kw)`.
    """

    @property
    def index(self) -> int:
        """The position of its adapter among the inputs."""

    @property
    def name(self) -> str:
        """The module's name: the same in every input. Random methods seed with it."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in * kh * kw)`."""

    def pair(self) -> tuple[Tensor, Tensor]:
        """`left` `(out, rank)` and `right` `(rank, in * kh * kw)`: left @ right is the update.

        The scale is part of both (its square root each, its sign of left), as far as it is not 1. Rank 0 if the
        adapter does not update this weight.
        """

    def dense(self) -> Tensor:
        """The update as one matrix; zero if the adapter does not update this weight. Yours to change."""


@dataclass(frozen=True)
class Option:
    """One keyword parameter of a method: `--name` on the command line."""

    name: str
    default: Any

    @property
    def flag(self) -> str:
        """How it is spelled on the command line."""
        return f"--{self.name.replace('_', '-')}"


@dataclass(frozen=True)
class Method:
    """A merge method: a pure function from the updates of one weight, and their strengths, to the merged update.

    `merge(updates, weights, **options)`: `updates` has one entry for every input, also for those without the module;
    the options are its keyword-only parameters (a trailing underscore is not part of the name: `lambda_`).
    `formula` is one line, `source` where it was published, `when` for whom it is. `symmetric`: the order of the
    inputs does not matter. `exact`: the result is the weighted sum itself; `stands_for_sum`: it is meant to be, but is
    not, and the report says how far off it is. `inputs`: how few and how many (None: any number).
    """

    id: str
    title: str
    formula: str
    source: str
    when: str
    merge: Callable[..., Any]
    symmetric: bool = True
    exact: bool = False
    stands_for_sum: bool = False
    inputs: tuple[int, int | None] = (1, None)

    @property
    def options(self) -> Mapping[str, Option]:
        """The options by name, with their defaults."""
        keywords = [p for p in inspect.signature(self.merge).parameters.values() if p.kind is p.KEYWORD_ONLY]
        return {p.name.rstrip("_"): Option(p.name.rstrip("_"), p.default) for p in keywords}

    def apply(self, updates: Sequence[Update], weights: Sequence[float], options: Mapping[str, Any]) -> Any:
        """The merged update: one matrix, or `(left, right)`. `options` by their names."""
        parameters = inspect.signature(self.merge).parameters
        spelled = {name if name in parameters else f"{name}_": value for name, value in options.items()}
        return self.merge(updates, weights, **spelled)
