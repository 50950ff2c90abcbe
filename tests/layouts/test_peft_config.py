"""PEFT's patterns: what we write, PEFT looks up as we mean it."""

from __future__ import annotations

import pytest
import torch

from loratool.core.module import Module
from loratool.core.registry import families
from loratool.core.target import Target
from loratool.core.tensor import LazyTensor
from loratool.layouts._peft_config import FEW, Matcher, alphas, config_of


def mixed(count: int) -> list[tuple[str, Module]]:
    """Modules of three ranks and of alphas between 1 and 7; every tenth name is the end of another."""
    made = []
    for index in range(count):
        rank = (4, 4, 8, 2)[index % 4]
        path = f"blocks.{index}.proj" if index % 10 else f"proj{index}.blocks.{index + 1}.proj"
        factors = {"up": torch.ones(6, rank), "down": torch.ones(rank, 6)}
        lazy = {role: LazyTensor.from_torch(tensor) for role, tensor in factors.items()}
        targets = (Target("model", path, (6, 6)),)
        made.append((path, Module(targets, families()["lora"], lazy, float(1 + index % 7))))
    return made


@pytest.mark.parametrize("count", [3, FEW // 2, 4 * FEW])
@pytest.mark.parametrize("anchor", [True, False])
def test_peft_finds_every_rank_and_alpha(count: int, anchor: bool) -> None:
    get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key
    modules = mixed(count) if anchor else [item for item in mixed(count) if item[0].startswith("blocks")]
    config = config_of(modules, None, anchor)
    assert alphas(config, modules) == [module.alpha for _, module in modules]
    for path, module in modules:
        for field, default, expected in (("rank", "r", module.rank), ("alpha", "lora_alpha", module.alpha)):
            pattern = config[f"{field}_pattern"]
            assert pattern.get(get_pattern_key(pattern, path), config[default]) == expected
            assert Matcher(pattern)(path, config[default]) == expected


def test_many_patterns_become_few_expressions() -> None:
    assert len(config_of(mixed(4 * FEW), None)["alpha_pattern"]) <= 6
