"""Key lists of files that users of an image program really had: each is recognised, read whole, and converted there and
back, key by key and byte by byte."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch

from loratool.core.adapter import Adapter, Bundle
from loratool.core.registry import architectures, families, layouts
from loratool.core.tensor import LazyTensor
from loratool.ops.compare import compare
from loratool.ops.convert import convert
from loratool.ops.open import understand
from tests.contracts import assert_same_tensors

KEYS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "keys"

EXPECTED = {
    "flux-kohya": ("kohya", "flux"),
    "flux-diffusers": ("diffusers", "flux"),
    # ai-toolkit writes the keys of ComfyUI; without its header nothing tells the two apart.
    "flux-ai-toolkit": ("comfyui", "flux"),
    "flux-xlabs": ("xlabs", "flux"),
    "flux-control": ("native", "flux"),
    "anima-kohya": ("kohya", "anima"),
    "anima-peft": ("comfyui", "anima"),
    # Bare names, which both read; with alpha beside the factors, as diffusers never writes it.
    "qwen-image-diffusers": ("comfyui", "qwen-image"),
}
"""Key list -> layout and architecture."""

LEFT = {"flux-control": () if "set" in families() else (".scale",)}
"""Ends of keys that belong to a family without a plug-in."""

each_list = pytest.mark.parametrize("name", EXPECTED)


@cache
def bundle_of(name: str) -> Bundle:
    """Tensors of the listed shapes, every value another; small where a list is long."""
    path = KEYS / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path.name} is not here")
    if EXPECTED[name][1] not in architectures():
        pytest.skip(f"{EXPECTED[name][1]} has no table yet")
    shapes = json.loads(path.read_text(encoding="utf-8"))
    return Bundle({key: tensor(shape, at) for at, (key, shape) in enumerate(sorted(shapes.items()))})


def tensor(shape: list[int], seed: int) -> LazyTensor:
    """bfloat16 values that differ from tensor to tensor and from row to row: cheap, and no update is zero."""
    if not shape:
        return LazyTensor.scalar(8.0, "BF16")
    made = torch.arange(math.prod(shape), dtype=torch.int32).add_(seed * 7919).remainder_(509).sub_(254)
    return LazyTensor.from_torch(made.to(torch.bfloat16).div_(2048).reshape(shape))


def test_every_list_is_tried() -> None:
    if not KEYS.is_dir():
        pytest.skip("no shared data here")
    assert {path.stem for path in KEYS.glob("*.json")} == set(EXPECTED)


@each_list
def test_recognised_and_read_whole(name: str) -> None:
    opened = understand(bundle_of(name))
    assert (opened.adapter.layout, opened.adapter.architecture.id) == EXPECTED[name]
    assert not opened.detection.tie
    assert [key for key in opened.adapter.extras if not key.endswith(LEFT.get(name, ()))] == []
    read = {key for module in opened.adapter.modules for key in module.keys.values()}
    assert read | opened.adapter.extras.keys() == bundle_of(name).tensors.keys()


def again(adapter: Adapter, to: str) -> Adapter:
    """What is read of a conversion, as from a file: nothing of the source but what was written."""
    converted = convert(adapter, to)
    stored = {key: LazyTensor(t.shape, t.dtype, t.source) for key, t in converted.bundle.tensors.items()}
    return layouts()[to].read(Bundle(stored, converted.bundle.metadata), adapter.architecture)


@each_list
@pytest.mark.parametrize("to", ["diffusers", "comfyui"])
def test_there_and_back(name: str, to: str) -> None:
    bundle = bundle_of(name)
    adapter = understand(bundle).adapter
    there = again(adapter, to)
    assert there.layout == to
    assert {t for m in there.modules for t in m.targets} >= {t for m in adapter.modules for t in m.targets}
    back = convert(there, adapter.layout)
    assert back.returned or to == adapter.layout
    assert_same_tensors(bundle, back.bundle)


@each_list
@pytest.mark.parametrize("to", ["diffusers", "comfyui"])
def test_the_update_is_the_same(name: str, to: str) -> None:
    """Of the first modules: all targets of the first blocks, compared in float64."""
    whole = understand(bundle_of(name)).adapter
    few = [key for module in whole.modules[:12] for key in module.keys.values()]
    stored = {key: whole.stored[key] for key in few}
    adapter = layouts()[whole.layout].read(Bundle(stored), whole.architecture)
    differences = list(compare(adapter.modules, again(adapter, to).modules))
    assert differences
    assert all(one.error <= one.tolerance for one in differences)
