"""PEFT's patterns: what we write, PEFT looks up as we mean it."""

from __future__ import annotations

import random
import time

import pytest
import torch

from loratool.core.errors import FormatError
from loratool.core.module import Module
from loratool.core.registry import families
from loratool.core.target import Target
from loratool.core.tensor import LazyTensor
from loratool.layouts._peft_config import FEW, Matcher, alphas, config_of, number
from loratool.layouts.peft import parse_config


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
    for field, default in (("rank", "r"), ("alpha", "lora_alpha")):
        pattern = config[f"{field}_pattern"]
        matcher = Matcher(pattern)
        for path, module in modules:
            expected = getattr(module, field)
            assert pattern.get(get_pattern_key(pattern, path), config[default]) == expected
            assert matcher(path, config[default]) == expected


def test_many_patterns_become_few_expressions() -> None:
    assert len(config_of(mixed(4 * FEW), None)["alpha_pattern"]) <= 6


PATTERNS = [
    "to_q", "to.q", "attn.to_q", "^blocks.0.attn.to_q", r"^blocks\.1\.attn\.to_q$", "(to_q|to_k)", r".*\.0\..*to_[kv]",
    "attn", "q", "blocks.1.attn.to_k", "o_q", r"attn\.to_v|mlp", "[a-z]+_v", "",
]  # fmt: skip
PATHS = ["to_q", "attn.to_q", "blocks.0.attn.to_q", "blocks.1.attn.to_q", "blocks.1.attn.to_k", "blocks.0.attn.to_v",
         "blocks_0.attn.to_q", "toxq", "mlp", "a.mlp", "blocks.10.attn.to_q"]  # fmt: skip


def test_looks_up_as_peft_does_whatever_the_patterns() -> None:
    get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key
    rng = random.Random(0)
    for _ in range(400):
        chosen = rng.sample(PATTERNS, rng.randint(1, 6))
        pattern = {key: float(index) for index, key in enumerate(chosen)}
        for path in PATHS:
            expected = pattern.get(get_pattern_key(chosen, path), -1.0)
            assert Matcher(pattern)(path, -1.0) == expected, (chosen, path)


@pytest.mark.parametrize("key", ["(a+)+$", "(a|a)*b", "(x+x+)+y"])
def test_a_pattern_never_takes_long(key: str) -> None:
    before = time.perf_counter()
    assert Matcher({key: 2.0})("a" * 2000 + "!", 1.0) == 1.0
    assert time.perf_counter() - before < 2


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), True, "4", [4]])
def test_numbers_are_numbers(value: object) -> None:
    with pytest.raises(FormatError, match="expected a number"):
        number({"lora_alpha": value}, "lora_alpha")


def test_too_many_expressions_are_refused() -> None:
    with pytest.raises(FormatError, match="more than 256 expressions"):
        Matcher({rf".*x{index}\..*": 1.0 for index in range(300)})


@pytest.mark.parametrize("kind", ["[]", "{}", "null", "3", '"NONE"'])
def test_a_kind_that_is_none_is_refused(kind: str) -> None:
    """Whatever JSON has: a list cannot even be looked up."""
    with pytest.raises(FormatError, match="peft_type is"):
        parse_config(f'{{"peft_type": {kind}, "r": 8}}')
