"""approximate: modules that a layout cannot express, rewritten as plain LoRA pairs. Only when asked for by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratool.core.errors import NotExact, UsageError
from loratool.core.module import Module
from loratool.core.registry import families
from loratool.core.tensor import LazyTensor, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from loratool.ops.weights import BaseWeights


@dataclass(frozen=True)
class Wish:
    """How far to approximate: a rank, or the share of the squared Frobenius norm to keep."""

    rank: int | None = None
    energy: float | None = None


@dataclass(frozen=True)
class Approximated:
    """One rewritten module: its rank and the relative error ||delta - lora|| / ||delta|| (Frobenius)."""

    title: str
    family: str
    rank: int
    error: float


def check_options(family: str | None, rank: int | None, energy: float | None) -> Wish | None:
    """The wish that command-line options spell; UsageError where they make no sense."""
    if family is None:
        if rank is not None or energy is not None:
            raise UsageError("--rank and --energy say how to approximate", hint="add --approximate lora")
        return None
    if family != "lora":
        raise UsageError(f"cannot approximate by {family!r}", hint="--approximate lora")
    if (rank is None) == (energy is None):
        raise UsageError("--approximate lora needs one of --rank and --energy", hint="--energy 0.999, for instance")
    if rank is not None and rank < 1:
        raise UsageError(f"--rank is {rank}, expected 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy is {energy}, expected more than 0 and at most 1")
    return Wish(rank, energy)


def as_lora(
    modules: Sequence[Module],
    wish: Wish,
    obstacle: Callable[[Module], str | None],
    base: BaseWeights | None = None,
) -> tuple[tuple[Module, ...], tuple[Approximated, ...]]:
    """The modules, those of other families as LoRA pairs by truncated SVD of the dense update (computed in float64).

    A Tucker module becomes one where it has an obstacle. Vectors (of norms and biases) are no matrix, and stay. What
    families that are not additive change is taken with the weights of `base`; raises NotExact where there are none.
    Factors are balanced (sqrt(S) on each side), in the module's dtype; alpha becomes the rank. The error reported is
    that of the stored, rounded factors.
    """
    made, report = [], []
    for module in modules:
        if not is_rewritten(module, obstacle):
            made.append(module)
            continue
        pair, error = _truncated(module, wish, base)
        made.append(pair)
        report.append(Approximated(module.title, module.family.id, pair.rank, error))
    return tuple(made), tuple(report)


def is_rewritten(module: Module, obstacle: Callable[[Module], str | None]) -> bool:
    """Whether a module becomes a pair."""
    if module.family is families()["lora"]:
        return "mid" in module.factors and obstacle(module) is not None
    return len(module.shape) > 1


def _update(module: Module, base: BaseWeights | None) -> Tensor:
    """The update in float64, `(out, in)` or `(out, in, kh, kw)`."""
    import torch

    if module.family.additive:
        loaded = {role: factor.load().double() for role, factor in module.factors.items()}
        return module.family.delta(loaded, module.scale)
    from loratool.ops.factored import dense_update

    if base is None:
        raise NotExact(
            f"{module.title}: what {module.family.title} modules change depends on the base weights",
            hint="add --base CHECKPOINT, the model that it was trained on",
        )
    dense = dense_update(module, torch.float64, base=base)
    kernel = module.shape[2:]
    return dense.reshape(len(dense), -1, *kernel) if kernel else dense


def _truncated(module: Module, wish: Wish, base: BaseWeights | None) -> tuple[Module, float]:
    import torch

    module = module if base is None else base.sized(module)
    delta = _update(module, base)
    standard = module.targets[0].shape
    if delta.dim() == 2 and len(standard) > 2:  # a LoKr whose w2_b hides the kernel
        kernel = standard[2:]
        columns = delta.shape[1]
        for size in kernel:
            columns //= size
        delta = delta.reshape(delta.shape[0], columns, *kernel)
    left, values, right = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    rank = _rank(values.tolist(), wish)
    root = values[:rank].sqrt()
    dtype = torch_dtype(module.dtype)
    up, down = (left[:, :rank] * root).to(dtype), (root[:, None] * right[:rank]).to(dtype)
    ones = (1,) * (delta.dim() - 2)
    stored = {
        "up": LazyTensor.from_torch(up.reshape(up.shape[0], rank, *ones).contiguous()),
        "down": LazyTensor.from_torch(down.reshape(rank, *delta.shape[1:]).contiguous()),
    }
    norm = float(delta.norm())
    error = float((delta.flatten(1) - up.double() @ down.double()).norm()) / norm if norm else 0.0
    bias = None if base is None else base.changed_bias(module)
    if "bias" in module.factors:
        stored["bias"] = module.factors["bias"]
    elif bias is not None:
        stored["bias"] = LazyTensor.from_torch(bias.to(dtype))
    pair = replace(module, family=families()["lora"], factors=stored, alpha=float(rank), keys={})
    return pair, error


def _rank(values: Sequence[float], wish: Wish) -> int:
    """The rank a wish asks for, given the singular values in descending order."""
    if wish.rank is not None:
        return min(wish.rank, len(values))
    total = sum(value * value for value in values)
    kept = 0.0
    for rank, value in enumerate(values, 1):
        kept += value * value
        if kept >= (wish.energy or 1.0) * total:
            return rank
    return len(values)
