"""merge, from files to a file: layouts in and out, headers that are true, and recipes that hold what was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from loratool.core.adapter import Adapter, Bundle
from loratool.core.errors import LoratoolError, UsageError
from loratool.core.registry import methods
from loratool.core.tensor import LazyTensor
from loratool.ops import recipe
from loratool.ops.inputs import Asked
from loratool.ops.lone import lone_share
from loratool.ops.merge_files import MergeReport, merge_files
from loratool.ops.open import open_adapter
from loratool.ops.ranks import Limits, parse_rule
from tests.builders import LAYOUTS, Part, Style, build, weight, weights, write_file
from tests.ops.test_convert import assert_hashes_are_true

CONCAT = methods()["concat"]


def small_parts(layout: str, rank: int = 2, alpha: float = 1.0, count: int = 6, dtype: str = "F32") -> list[Part]:
    """Small weights of Stable Diffusion 1.x, of both components, a convolution among them."""
    table = [one for one in weights("sd15", layout) if one.shape[0] <= 320 and one.shape[1] <= 768]
    kernels = [one for one in table if len(one.shape) > 2 and one.shape[2] > 1][:1]
    encoder = [one for one in weights("sd15", layout) if one.component == "text_encoder"][:2]
    plain = [one for one in table if len(one.shape) == 2]
    return [Part(one, rank, alpha, dtype) for one in [*encoder, *plain[: count - 3], *kernels]]


def make(path: Path, layout: str = "kohya", seed: int = 0, style: Style | None = None, **options: Any) -> Path:
    return write_file(path, build(small_parts(layout, **options), layout, style, seed))


def deltas(adapter: Adapter) -> Mapping[tuple[str, ...], torch.Tensor]:
    """Rows of every update by (component, path) of their target, float64."""
    found = {}
    for module in adapter.modules:
        dense = module.family.delta({r: f.load().double() for r, f in module.factors.items()}, module.scale).flatten(1)
        row = 0
        for one, height in zip(module.targets, module.heights(), strict=True):
            found[module.component, one.path] = dense[row : row + height]
            row += height
    return found


def assert_sum(output: Path, inputs: Mapping[Path, float], tolerance: float = 1e-5) -> None:
    made, parts = deltas(open_adapter(output)), [(deltas(open_adapter(path)), w) for path, w in inputs.items()]
    assert made.keys() == set().union(*(part for part, _ in parts))
    for key, values in made.items():
        meant = sum((part[key] * w for part, w in parts if key in part), torch.zeros_like(values))
        assert float((values - meant).norm()) <= tolerance * float(meant.norm()), key


@pytest.mark.parametrize("to", LAYOUTS)
def test_different_layouts_in_and_any_out(tmp_path: Path, to: str) -> None:
    inputs = {
        make(tmp_path / "a.safetensors", "kohya", 1, rank=4, alpha=2.0): 0.7,
        make(tmp_path / "b.safetensors", "diffusers", 2): -0.3,
        make(tmp_path / "c", "peft", 3, alpha=4.0): 1.0,
        make(tmp_path / "d.safetensors", "comfyui", 4): 0.5,
    }
    before = {path: recipe.sha256(path) for path in inputs}
    output = tmp_path / ("out" if to == "peft" else "out.safetensors")
    report = merge_files([Asked(str(path), w) for path, w in inputs.items()], output, CONCAT, to=to)
    assert open_adapter(output).layout == report.layout == to
    assert_sum(output, inputs)
    assert {path: recipe.sha256(path) for path in inputs} == before
    assert (report.merged, report.error, report.ranks_after) == (6, 0.0, {10: 6})
    assert report.held is not None and report.held.error < 1e-5
    assert [one.sha256 for one in report.inputs] == list(before.values())


def test_fused_and_split_weights_of_flux(tmp_path: Path) -> None:
    names = [f"double_blocks.{n}.img_attn.qkv" for n in range(1)]
    a = write_file(
        tmp_path / "a.safetensors", build([Part(weight("flux", "kohya", name), 2, 1.0) for name in names], "kohya")
    )
    split = [f"transformer_blocks.{n}.attn.to_{part}" for n in range(1) for part in "qv"]
    parts = [Part(weight("flux", "diffusers", name), 3, 3.0) for name in split]
    b = write_file(tmp_path / "b.safetensors", build(parts, "diffusers", seed=5))
    for to, count in (("kohya", 1), ("diffusers", 3)):
        report = merge_files([Asked(str(a)), Asked(str(b), 0.5)], tmp_path / f"{to}.safetensors", CONCAT, to=to)
        assert len(report.modules) == count
        made, one, other = (deltas(open_adapter(path)) for path in (tmp_path / f"{to}.safetensors", a, b))
        for key, values in made.items():
            meant = one[key] + 0.5 * other.get(key, torch.zeros_like(values))
            assert float((values - meant).norm()) <= 1e-5 * float(meant.norm())


def test_the_header_is_true(tmp_path: Path) -> None:
    stated = {
        "ss_network_dim": "2",
        "ss_network_alpha": "1.0",
        "sshs_model_hash": "0" * 64,
        "sshs_legacy_hash": "0" * 8,
    }
    stated |= {"modelspec.title": "old", "modelspec.date": "2020", "ss_output_name": "old", "ss_tag_frequency": "{}"}
    a = make(tmp_path / "a.safetensors", style=Style(metadata=stated))
    b = make(tmp_path / "b.safetensors", seed=1, style=Style(metadata={"only": "b", "ss_network_dim": "9"}), alpha=3.0)
    output = tmp_path / "both.safetensors"
    merge_files([Asked(str(a)), Asked(str(b))], output, CONCAT)
    header = open_adapter(output).metadata
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "2")
    assert (header["modelspec.title"], header["ss_output_name"]) == ("both", "both")
    assert header["modelspec.merged_from"] == "a.safetensors, b.safetensors"
    assert "modelspec.date" not in header and "only" not in header
    assert_hashes_are_true(output)
    made = recipe.decode(header)
    assert made["inputs"][1] == {"name": "b.safetensors", "sha256": recipe.sha256(b), "weight": 1.0}
    assert (made["command"], made["method"], made["title"]) == ("merge", "concat", "both")
    assert "device" not in made and "rule" not in made
    assert json.loads(header["loratool.history"])[-1]["method"] == "concat"


@pytest.mark.parametrize(
    ("mode", "kept"), [("first", {"x": "a", "y": "a"}), ("union", {"x": "a", "y": "a", "z": "b"}), ("none", {})]
)
def test_metadata_modes(tmp_path: Path, mode: str, kept: dict[str, str]) -> None:
    a = make(tmp_path / "a.safetensors", style=Style(metadata={"x": "a", "y": "a"}))
    b = make(tmp_path / "b.safetensors", seed=1, style=Style(metadata={"x": "b", "z": "b"}))
    merge_files([Asked(str(a)), Asked(str(b))], tmp_path / "o.safetensors", CONCAT, metadata=mode)
    header = open_adapter(tmp_path / "o.safetensors").metadata
    assert {key: value for key, value in header.items() if key in "xyz"} == kept
    assert_hashes_are_true(tmp_path / "o.safetensors")


def merged(tmp_path: Path, *more: Asked, **options: Any) -> MergeReport:
    asked = [Asked(str(make(tmp_path / "a.safetensors"))), Asked(str(make(tmp_path / "b.safetensors", seed=1)))]
    return merge_files([*asked, *more], tmp_path / "o.safetensors", options.pop("method", CONCAT), **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"options": {"density": 0.5}}, "no option --density"),
        ({"method": methods()["ties"], "options": {"density": "0.5"}}, "expected a finite number"),
        ({"method": methods()["ties"], "options": {"density": True}}, "expected a number"),
        ({"method": methods()["ties"], "options": {"density": float("nan")}}, "expected a finite number"),
        ({"method": methods()["ties"], "options": {"density": 10**400}}, "expected a finite number"),
        ({"method": methods()["ties"], "options": {"normalize": 1}}, "expected true or false"),
        ({"method": methods()["ties"], "options": {"sign": 3}}, "expected a word"),
        ({"method": methods()["dare_ties"], "options": {"seed": 0.5}}, "expected a whole number"),
        ({"metadata": "all"}, "first, union, none"),
        ({"limits": Limits(0)}, "--min-rank is 0"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        merged(tmp_path, **options)
    assert not (tmp_path / "o.safetensors").exists()


def test_extras_go_along_or_are_refused_or_dropped(tmp_path: Path) -> None:
    bundle = build(small_parts("kohya"), "kohya")
    extra = LazyTensor.from_torch(torch.ones(3))
    a = write_file(tmp_path / "x.safetensors", Bundle({**bundle.tensors, "note.tensor": extra}, {}))
    report = merged(tmp_path, Asked(str(a)))
    assert report.kept == ("note.tensor",)
    assert "note.tensor" in open_adapter(tmp_path / "o.safetensors").extras
    with pytest.raises(LoratoolError, match="--drop-extras"):
        merged(tmp_path, Asked(str(a)), to="diffusers", overwrite=True)
    report = merged(tmp_path, Asked(str(a)), to="diffusers", overwrite=True, drop_extras=True)
    assert report.dropped == ("note.tensor",)


def test_a_base_is_hashed_once_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {one.name: one for one in weights("sd15", "diffusers") if one.component == "unet"}
    parts = [part for part in small_parts("kohya") if part.weight.component == "unet"]
    names = [part.weight.name for part in parts]
    folder = tmp_path / "model" / "unet"
    folder.mkdir(parents=True)
    base = {f"{name}.weight": LazyTensor.from_torch(torch.ones(table[name].shape)) for name in names}
    write_file(folder / "diffusion_pytorch_model.safetensors", Bundle(base, {}))
    a = write_file(tmp_path / "a.safetensors", build(parts, "kohya"))
    calls = []
    real = recipe.checkpoint_sha256
    monkeypatch.setattr(recipe, "checkpoint_sha256", lambda path: calls.append(path) or real(path))
    merge_files(
        [Asked(str(a))],
        tmp_path / "o.safetensors",
        CONCAT,
        base=str(tmp_path / "model"),
        rule=parse_rule("size", "1MiB"),
    )
    recorded = recipe.decode(open_adapter(tmp_path / "o.safetensors").metadata)["base"]
    assert recorded == {"name": "model", "sha256": real(tmp_path / "model")}
    assert len(calls) == 1
    write_file(folder / "more.safetensors", Bundle(base, {}))
    assert real(tmp_path / "model") != recorded["sha256"]


@pytest.mark.parametrize(
    ("method", "share"),
    [("concat", 1.0), ("ties", 1.0), ("dare_linear", 1.0), ("slerp", 0.5**0.5), ("karcher", 0.5), ("nearswap", 1e-4)],
)
def test_what_is_left_of_a_lone_module(tmp_path: Path, method: str, share: float) -> None:
    options = {"density": 0.5} if "density" in methods()[method].options else {}
    assert lone_share(methods()[method], [1.0, 1.0], options, 1) == pytest.approx(share, rel=1e-3)
    a = make(tmp_path / "a.safetensors", count=6)
    b = make(tmp_path / "b.safetensors", count=5, seed=1)
    report = merge_files([Asked(str(b)), Asked(str(a))], tmp_path / "o.safetensors", methods()[method])
    assert report.inputs[1].alone == 1
    assert any("weakens" in note and "1 of a.safetensors" in note for note in report.notes) == (share < 0.99)


def test_a_recipe_says_what_rule_was_made_without_text(tmp_path: Path) -> None:
    from loratool.ops.ranks import Rule

    merged(tmp_path, rule=Rule("rank", 3.0))
    assert recipe.decode(open_adapter(tmp_path / "o.safetensors").metadata)["rule"] == "rank 3.0"
