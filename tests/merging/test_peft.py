"""The methods equal the real peft's add_weighted_adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from loratool.core.method import Update
from loratool.core.registry import methods
from loratool.merging import _noise
from tests.contracts import PairUpdate, merged

peft = pytest.importorskip("peft")

OUT, IN, RANK, ALPHA = 12, 10, 3, 2.0
WEIGHTS = [(1.0, 1.0, 1.0), (0.5, 1.25, 0.3), (1.0, -0.6, 0.8)]
NAMES = ("first", "second", "third")


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(IN, OUT, bias=False)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"], init_lora_weights=False)
    model = peft.get_peft_model(Net(), config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    return model


def updates_of(model: Any) -> list[PairUpdate]:
    layer, root = model.base_model.model.layer, (ALPHA / RANK) ** 0.5
    return [
        PairUpdate(
            index,
            "layer",
            layer.lora_B[name].weight.detach() * root,
            layer.lora_A[name].weight.detach() * root,
        )
        for index, name in enumerate(NAMES)
    ]


def of_peft(model: Any, weights: Sequence[float], kind: str, **options: Any) -> torch.Tensor:
    if kind.endswith("svd"):
        options["svd_rank"] = min(OUT, IN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # density 1
        model.add_weighted_adapter(list(NAMES), list(weights), "merged", combination_type=kind, **options)
    delta = model.base_model.model.layer.get_delta_weight("merged").detach()
    assert delta.any()
    return delta


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


each_weights = pytest.mark.parametrize("weights", WEIGHTS, ids=str)
each_density = pytest.mark.parametrize("density", [0.3, 0.7, 1.0])
each_sign = pytest.mark.parametrize("sign", ["total", "frequency"])


@each_weights
@pytest.mark.parametrize(("ours", "theirs"), [("concat", "cat"), ("linear", "linear"), ("concat", "svd")])
def test_sums(model: Any, weights: Any, ours: str, theirs: str) -> None:
    assert_same(merged(methods()[ours], updates_of(model), weights), of_peft(model, weights, theirs))


@each_weights
@each_density
def test_magnitude_prune(model: Any, weights: Any, density: float) -> None:
    found = merged(methods()["magnitude_prune"], updates_of(model), weights, density=density)
    assert_same(found, of_peft(model, weights, "magnitude_prune_svd", density=density))


@each_weights
@each_density
@each_sign
def test_ties(model: Any, weights: Any, density: float, sign: str) -> None:
    found = merged(methods()["ties"], updates_of(model), weights, density=density, sign=sign)
    assert_same(found, of_peft(model, weights, "ties_svd", density=density, majority_sign_method=sign))


@pytest.fixture
def same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both draw the same numbers: peft asks for one mask after the other, in the order of the adapters."""
    drawn = [torch.rand(OUT, IN, generator=torch.Generator().manual_seed(n)) for n in range(len(NAMES))]
    turns: Iterator[torch.Tensor] = iter(drawn)

    def uniform(update: Update, seed: int, device: torch.device) -> torch.Tensor:
        return drawn[update.index]

    def bernoulli(chance: torch.Tensor) -> torch.Tensor:
        return (next(turns) < chance).to(chance.dtype)

    monkeypatch.setattr(_noise, "uniform", uniform)
    monkeypatch.setattr(torch, "bernoulli", bernoulli)


@each_weights
@each_density
@pytest.mark.usefixtures("same_masks")
def test_dare_linear(model: Any, weights: Any, density: float) -> None:
    found = merged(methods()["dare_linear"], updates_of(model), weights, density=density)
    assert_same(found, of_peft(model, weights, "dare_linear_svd", density=density))


@each_weights
@each_density
@each_sign
@pytest.mark.usefixtures("same_masks")
def test_dare_ties(model: Any, weights: Any, density: float, sign: str) -> None:
    found = merged(methods()["dare_ties"], updates_of(model), weights, density=density, sign=sign)
    assert_same(found, of_peft(model, weights, "dare_ties_svd", density=density, majority_sign_method=sign))
