"""Random factors, and layers that the libraries' own modules are put on, shared by the tests of families."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from loratool.core.family import Factors, Family
from loratool.core.module import Module
from loratool.core.target import Target
from loratool.core.tensor import LazyTensor

LAYERS: Mapping[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 36),
    "wide linear": lambda: nn.Linear(48, 16),
    "conv 1x1": lambda: nn.Conv2d(12, 24, 1),
    "conv 3x3": lambda: nn.Conv2d(12, 24, 3),
    "conv 3x1": lambda: nn.Conv2d(12, 20, (3, 1)),
    "conv 1d": lambda: nn.Conv1d(12, 24, 3),
}


def factors(seed: int = 0, **shapes: tuple[int, ...]) -> Factors:
    """Random factors by role, float64."""
    generator = torch.Generator().manual_seed(seed)
    return {
        role: LazyTensor.from_torch(torch.randn(shape, generator=generator, dtype=torch.float64))
        for role, shape in shapes.items()
    }


def constant(value: float) -> LazyTensor:
    """A stored number."""
    return LazyTensor.scalar(value, "F64")


def shuffle(module: nn.Module, seed: int = 0) -> None:
    """Random values in all parameters, small enough for rotations to be some."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)


def stored(trained: nn.Module, names: Mapping[str, str]) -> dict[str, LazyTensor]:
    """What a module saves, by role; `names` are the names of roles in its state."""
    state = trained.state_dict()
    return {role: LazyTensor.from_torch(state[key].detach()) for role, key in names.items() if key in state}


def module_of(family: Family, roles: Factors, shape: tuple[int, ...], alpha: float | None = None) -> Module:
    """A module on one target of that shape."""
    assert family.problem({role: factor.shape for role, factor in roles.items()}) is None
    return Module((Target("unet", "x", shape),), family, roles, alpha)


def applied(module: Module, weight: torch.Tensor, strength: float) -> torch.Tensor:
    """The new weight, float32, in the shape of the old one."""
    loaded = {role: factor.load().float() for role, factor in module.factors.items()}
    flat = weight.detach().reshape(len(weight), -1)
    return module.family.apply(loaded, module.scale, flat, strength).reshape(weight.shape)
