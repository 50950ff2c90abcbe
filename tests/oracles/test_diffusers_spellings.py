"""Spellings that we read, against the converters of diffusers that read them: the same factors under the same names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from loratool.core.adapter import Adapter, Bundle
from loratool.core.registry import architectures, families, layouts
from loratool.core.tensor import LazyTensor
from loratool.ops.convert import convert
from loratool.ops.open import understand

conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
state_dicts = pytest.importorskip("diffusers.utils.state_dict_utils")

RANK = 2
NORMS = ("query_norm", "key_norm")


def numbers(*shape: int, seed: int) -> Tensor:
    """Values that differ from tensor to tensor and from row to row."""
    count = torch.Size(shape).numel()
    return (
        (torch.arange(count, dtype=torch.float32).add_(seed * 7919).remainder_(9973) - 4986).div_(4096).reshape(shape)
    )


def weights(naming: str, architecture: str = "flux", component: str = "transformer") -> Iterator[tuple[str, int, Any]]:
    """(name, rows, shape behind the rows) of every weight in a naming."""
    for name, targets in architectures()[architecture].naming(component, naming).items():
        yield name, sum(target.rows for target in targets), targets[0].shape[1:]


def pairs(prefix: str, naming: str, down: str, up: str, skip: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A pair for every Linear of Flux in a naming."""
    made: dict[str, Tensor] = {}
    for at, (name, rows, rest) in enumerate(weights(naming)):
        if rest and not name.startswith(skip):
            made[f"{prefix}{name}.{down}"] = numbers(RANK, *rest, seed=2 * at)
            made[f"{prefix}{name}.{up}"] = numbers(rows, RANK, seed=2 * at + 1)
    return made


def opened(state: Mapping[str, Tensor], layout: str, architecture: str = "flux") -> Adapter:
    adapter = understand(Bundle({key: LazyTensor.from_torch(tensor) for key, tensor in state.items()})).adapter
    assert (adapter.layout, adapter.architecture.id) == (layout, architecture)
    return adapter


def in_diffusers(adapter: Adapter) -> dict[str, Tensor]:
    made = convert(adapter, "diffusers").bundle
    assert not made.side_files
    return {key: tensor.load() for key, tensor in made.tensors.items()}


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [key for key, tensor in theirs.items() if not torch.equal(ours[key], tensor)] == []


def test_xlabs() -> None:
    whole = pairs("", "xlabs", "down.weight", "up.weight")
    state = {key: tensor for key, tensor in whole.items() if ".processor." in key}
    assert len(state) == 2 * (4 * 19 + 2 * 38)
    ours = in_diffusers(opened(state, "xlabs"))
    assert_same(ours, conversion._convert_xlabs_flux_lora_to_diffusers(dict(state)))


def test_bfl_control() -> None:
    state = pairs("", "bfl", "lora_A.weight", "lora_B.weight")
    norms = {}
    for at, (name, rows, rest) in enumerate(weights("bfl")):
        if rest:
            state[f"{name}.lora_B.bias"] = numbers(rows, seed=1000 + at)
        elif name.endswith(NORMS):
            norms[f"{name}.scale"] = numbers(rows, seed=2000 + at)
    theirs = conversion._convert_bfl_flux_control_lora_to_diffusers({**state, **norms})
    adapter = opened({**state, **norms}, "native")
    if "set" in families():
        assert not adapter.extras
        ours = in_diffusers(adapter)
    else:
        assert adapter.extras.keys() == norms.keys()
        ours = in_diffusers(opened(state, "native"))
        theirs = {key: tensor for key, tensor in theirs.items() if not key.endswith(("_q.weight", "_k.weight"))}
    # diffusers swaps the halves of norm_out's lora_A, whose rows are rank components: that mixes them up. Not we.
    key = "transformer.norm_out.linear.lora_A.weight"
    assert torch.equal(ours.pop(key).flip(0), theirs.pop(key))
    assert_same(ours, theirs)


def test_fal_kontext() -> None:
    others = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer.adaLN")
    state = pairs("base_model.model.", "bfl", "lora_A.weight", "lora_B.weight", skip=others)
    ours = in_diffusers(opened(state, "peft"))
    assert_same(ours, conversion._convert_fal_kontext_lora_to_diffusers(dict(state)))


def test_kohya_flux() -> None:
    others = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")
    state = {}
    for key, tensor in pairs("", "bfl", "lora_down.weight", "lora_up.weight", skip=others).items():
        name, dot, suffix = key.partition(".lora_")
        state[f"lora_unet_{name.replace('.', '_')}{dot}{suffix}"] = tensor
    ours = in_diffusers(opened(state, "kohya"))
    assert_same(ours, conversion._convert_kohya_flux_lora_to_diffusers(dict(state)))


OLD = {"to_q": "to_q_lora", "to_k": "to_k_lora", "to_v": "to_v_lora", "to_out.0": "to_out_lora"}


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_attention_processors(architecture: str) -> None:
    state = {}
    for at, (name, rows, rest) in enumerate(weights("diffusers", architecture, "unet")):
        block, _, path = name.rpartition(".attn")
        if block and len(rest) == 1 and path[2:] in OLD:
            stem = f"unet.{block}.attn{path[0]}.processor.{OLD[path[2:]]}"
            state[f"{stem}.down.weight"] = numbers(1, *rest, seed=2 * at)
            state[f"{stem}.up.weight"] = numbers(rows, 1, seed=2 * at + 1)
    assert len(state) == (256 if architecture == "sd15" else 1120)
    theirs = {
        key.replace(".processor.", "."): tensor
        for key, tensor in state_dicts.convert_unet_state_dict_to_peft(dict(state)).items()
    }
    theirs = {key.replace(".to_out.lora", ".to_out.0.lora"): tensor for key, tensor in theirs.items()}
    assert_same(in_diffusers(opened(state, "diffusers", architecture)), theirs)


def test_sai_control_lora() -> None:
    state = {"lora_controlnet": torch.zeros(1)}
    for at, (name, rows, rest) in enumerate(weights("ldm", "sdxl", "unet")):
        if rest and name.startswith(("input_blocks.", "middle_block.", "time_embed.", "label_emb.")):
            state[f"{name}.down"] = numbers(1, *rest, seed=2 * at)
            state[f"{name}.up"] = numbers(rows, 1, *(1,) * (len(rest) - 1), seed=2 * at + 1)
            state[f"{name}.bias"] = numbers(rows, seed=3 * at)
    adapter = opened(state, "control-lora", "sdxl")
    assert set(adapter.extras) == {key for key in state if key.endswith((".bias", MARKER))}
    assert any("ControlNet" in note for note in adapter.notes)
    theirs = {
        f"unet.{key}": tensor
        for key, tensor in state_dicts.convert_sai_sd_control_lora_state_dict_to_peft(dict(state)).items()
        if tensor is not None and ".lora_" in key
    }
    made = convert(adapter, "diffusers", drop_extras=True).bundle
    assert_same({key: tensor.load() for key, tensor in made.tensors.items()}, theirs)


MARKER = "lora_controlnet"


def test_read_only_spellings_come_back() -> None:
    whole = pairs("diffusion_model.", "xlabs", "down.weight", "up.weight")
    state = {key: tensor for key, tensor in whole.items() if ".processor." in key}
    adapter = opened(state, "xlabs")
    for to in ("kohya", "comfyui", "diffusers"):
        there = convert(adapter, to)
        back = convert(layouts()[to].read(there.bundle, adapter.architecture), "xlabs")
        assert back.returned
        assert_same({key: tensor.load() for key, tensor in back.bundle.tensors.items()}, state)
