"""merge equals the real peft's add_weighted_adapter, from folders that peft wrote to folders that peft loads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from loratool.core.method import Update
from loratool.core.registry import methods
from loratool.merging import _noise
from loratool.ops.inputs import Asked
from loratool.ops.merge_files import merge_files
from loratool.ops.open import open_adapter
from loratool.ops.ranks import parse_rule

NAMES = ("first", "second", "third")
WEIGHTS = [(1.0, 1.0, 1.0), (0.5, 1.25, 0.3), (1.0, -0.6, 0.8)]
RANK, FULL = 3, 12
Deltas = Mapping[str, torch.Tensor]


class Attention(nn.Module):
    """Linear layers; the smaller side of every weight is FULL, the largest rank for which peft makes factors."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(12, 16)
        self.to_k = nn.Linear(12, 17, bias=False)
        self.to_out = nn.Linear(16, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Unused."""
        return x


class Net(nn.Module):
    """Two blocks and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.conv = nn.Conv2d(6, 12, 3, padding=1)
        self.point = nn.Conv2d(14, 12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Unused."""
        return x


TARGETS = ["to_q", "to_k", "to_out", "conv", "point"]


def peft_model(configs: Sequence[Mapping[str, Any]]) -> Any:
    torch.manual_seed(0)
    made = [LoraConfig(**{"target_modules": TARGETS, "r": RANK, "lora_alpha": 2.0, **config}) for config in configs]
    model = get_peft_model(Net(), made[0], adapter_name=NAMES[0])
    for name, config in zip(NAMES[1:], made[1:], strict=False):
        model.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    return model


def layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def deltas(model: nn.Module, adapter: str) -> Deltas:
    """What peft itself says the adapter adds to every weight that it updates."""
    return {
        path: layer.get_delta_weight(adapter).detach()
        for path, layer in layers(model).items()
        if adapter in layer.lora_A
    }


def of_peft(model: Any, names: Sequence[str], weights: Sequence[float], kind: str, **options: Any) -> Deltas:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # density 1
        if "svd" in kind:  # else peft cannot keep every rank
            options["svd_full_matrices"] = False
        model.add_weighted_adapter(list(names), list(weights), "merged", combination_type=kind, **options)
    return deltas(model, "merged")


def saved(model: Any, folder: Path, names: Sequence[str] = NAMES) -> list[Path]:
    model.save_pretrained(folder, selected_adapters=list(names))
    return [folder / name for name in names]


def assert_merged(paths: Sequence[Path], weights: Sequence[float], method: str, expected: Deltas, **more: Any) -> None:
    """Files merged by loratool hold peft's updates; so they do when peft loads them."""
    output = paths[0].parent / "merged"
    asked = [Asked(str(path), weight) for path, weight in zip(paths, weights, strict=True)]
    report = merge_files(asked, output, methods()[method], **more)
    assert report.layout == "peft" and report.held is not None
    made = {module.targets[0].path: module.delta() for module in open_adapter(output).modules}
    loaded = deltas(PeftModel.from_pretrained(Net(), output), "default")
    assert made.keys() == loaded.keys() == expected.keys()
    for path, delta in expected.items():
        assert delta.any()
        torch.testing.assert_close(made[path], delta, rtol=0, atol=1e-5, msg=lambda text, path=path: f"{path}: {text}")
        torch.testing.assert_close(loaded[path], made[path], rtol=0, atol=1e-6)


ALIKE: Sequence[Mapping[str, Any]] = ({}, {}, {})
VARIED: Sequence[Mapping[str, Any]] = (
    {"use_rslora": True, "r": 4, "rank_pattern": {"to_q": 2}},
    {"r": 2, "lora_alpha": 5, "alpha_pattern": {"blocks.1.to_k": 1, "conv": 9}},
    {"r": 5, "target_modules": ["to_q", "conv"], "rank_pattern": {"conv": 1}, "use_rslora": True},
)
each_weights = pytest.mark.parametrize("weights", WEIGHTS, ids=str)
EVERYTHING = {"rule": parse_rule("rank", str(FULL))}


@each_weights
def test_cat(tmp_path: Path, weights: Sequence[float]) -> None:
    model = peft_model(ALIKE)
    assert_merged(saved(model, tmp_path), weights, "concat", of_peft(model, NAMES, weights, "cat"))


@each_weights
def test_any_ranks_scales_and_targets(tmp_path: Path, weights: Sequence[float]) -> None:
    """rslora, patterns, and modules that one of them lacks: the sum of what peft applies for each."""
    model = peft_model(VARIED)
    expected: dict[str, torch.Tensor] = {}
    for name, weight in zip(NAMES, weights, strict=True):
        for path, delta in deltas(model, name).items():
            expected[path] = expected.get(path, torch.zeros_like(delta)) + weight * delta
    assert_merged(saved(model, tmp_path), weights, "concat", expected)


@each_weights
def test_linear(tmp_path: Path, weights: Sequence[float]) -> None:
    model = peft_model(ALIKE)
    assert_merged(saved(model, tmp_path), weights, "linear", of_peft(model, NAMES, weights, "linear"))


@each_weights
@pytest.mark.parametrize("rank", [2, 6])
def test_svd(tmp_path: Path, weights: Sequence[float], rank: int) -> None:
    model = peft_model(ALIKE)
    expected = of_peft(model, NAMES, weights, "svd", svd_rank=rank)
    assert_merged(saved(model, tmp_path), weights, "concat", expected, rule=parse_rule("rank", str(rank)))


@each_weights
@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("rank", [RANK, FULL])
def test_magnitude_prune(tmp_path: Path, weights: Sequence[float], density: float, rank: int) -> None:
    model = peft_model(ALIKE)
    expected = of_peft(model, NAMES, weights, "magnitude_prune_svd", density=density, svd_rank=rank)
    more = {} if rank == RANK else EVERYTHING  # without a rule: the largest rank among the inputs
    assert_merged(saved(model, tmp_path), weights, "magnitude_prune", expected, options={"density": density}, **more)


@each_weights
@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("rank", [RANK, FULL])
def test_ties(tmp_path: Path, weights: Sequence[float], sign: str, rank: int) -> None:
    model = peft_model(ALIKE)
    expected = of_peft(model, NAMES, weights, "ties_svd", density=0.6, majority_sign_method=sign, svd_rank=rank)
    more = {} if rank == RANK else EVERYTHING
    options = {"density": 0.6, "sign": sign}
    assert_merged(saved(model, tmp_path), weights, "ties", expected, options=options, **more)


@pytest.fixture
def same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both draw the same numbers: peft asks module by module, for one adapter after the other, in the model's order."""
    order = list(layers(peft_model(ALIKE)))
    drawn: dict[tuple[str, int], torch.Tensor] = {}
    turns: Iterator[tuple[str, int]] = iter([(path, index) for path in order for index in range(len(NAMES))])

    def numbers(key: tuple[str, int], shape: Sequence[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(NAMES) * order.index(key[0]) + key[1])
        return drawn.setdefault(key, torch.rand(int(torch.tensor(shape).prod()), generator=generator)).reshape(shape)

    def uniform(update: Update, seed: int, device: torch.device) -> torch.Tensor:
        return numbers((update.name.partition(".")[2], update.index), update.shape)

    def bernoulli(chance: torch.Tensor) -> torch.Tensor:
        return (numbers(next(turns), chance.shape) < chance).to(chance.dtype)

    monkeypatch.setattr(_noise, "uniform", uniform)
    monkeypatch.setattr(torch, "bernoulli", bernoulli)


@each_weights
@pytest.mark.parametrize("rank", [RANK, FULL])
@pytest.mark.parametrize(("ours", "theirs"), [("dare_linear", "dare_linear_svd"), ("dare_ties", "dare_ties_svd")])
@pytest.mark.usefixtures("same_masks")
def test_dare(tmp_path: Path, weights: Sequence[float], ours: str, theirs: str, rank: int) -> None:
    model = peft_model(ALIKE)
    expected = of_peft(model, NAMES, weights, theirs, density=0.5, svd_rank=rank)
    more = {} if rank == RANK else EVERYTHING
    assert_merged(saved(model, tmp_path), weights, ours, expected, options={"density": 0.5}, **more)


def test_a_merged_folder_says_nothing_of_its_inputs_settings(tmp_path: Path) -> None:
    """rslora's root is in every alpha once, and the second merge of the result adds to what peft applied before."""
    model = peft_model(VARIED)
    paths = saved(model, tmp_path)
    merge_files([Asked(str(path)) for path in paths], tmp_path / "once", methods()["concat"])
    merge_files([Asked(str(tmp_path / "once"), 2.0)], tmp_path / "twice", methods()["concat"])
    once, twice = (deltas(PeftModel.from_pretrained(Net(), tmp_path / n), "default") for n in ("once", "twice"))
    for path, delta in once.items():
        torch.testing.assert_close(twice[path], 2 * delta, rtol=1e-5, atol=1e-5)
        own = [deltas(model, name)[path] for name in NAMES if path in deltas(model, name)]
        torch.testing.assert_close(delta, sum(own[1:], own[0]), rtol=0, atol=1e-5)
