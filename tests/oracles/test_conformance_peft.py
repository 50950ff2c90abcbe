"""The rules of the program `peft` against PEFT itself: `PeftModel.from_pretrained` on each component's model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from peft import PeftModel
from safetensors.torch import load_file, save_file

from loratool.core.registry import programs
from loratool.ops.conformance import FULLY, NOT, conform
from loratool.ops.convert_file import convert_file
from loratool.ops.open import open_adapter
from tests.oracles.applied import Name, Update, assert_as_told, carried
from tests.oracles.models import complaints, kohya_file, pipeline
from tests.oracles.test_peft_kinds import KINDS, trained

Tensors = dict[str, torch.Tensor]
SHARE = {"sd15": 0.1, "sdxl": 0.05, "flux": 0.5}


def folders(place: Path) -> dict[str, Path]:
    """component -> its folder; a folder of one component is taken for the UNet's or the transformer's."""
    found = {path.parent.name: path.parent for path in place.glob("*/adapter_config.json")}
    return found or {"": place}


def load(place: Path, pipe: Any, alone: str) -> dict[Name, Update]:
    """What PEFT puts into the components' models."""
    models = {}
    for component, folder in folders(place).items():
        name = component or alone
        with complaints():
            models[name] = PeftModel.from_pretrained(getattr(pipe, name), str(folder))
    return {name: update for name, update in carried(models).items() if update.probe.any()}


def verdict(place: Path, architecture: str, alone: str = "unet") -> str:
    found = conform(open_adapter(place, architecture=architecture), programs()["peft"])
    assert_as_told(found, lambda: load(place, pipeline(architecture, zero=False), alone))
    return found.verdict


@pytest.mark.parametrize("architecture", ["sd15", "sdxl", "flux"])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_what_is_written_for_it(architecture: str, dora: bool, tmp_path: Path) -> None:
    """Convolutions, text encoders, ranks and alphas that differ, magnitudes."""
    source = kohya_file(
        tmp_path / "k.safetensors",
        architecture,
        share=SHARE[architecture],
        ranks=(2, 4),
        alphas=(1.0, 2.0, 4.0),
        dora=dora,
    )
    convert_file(source, None, tmp_path / "folder", program=programs()["peft"])
    assert verdict(tmp_path / "folder", architecture) == FULLY


def respelled(place: Path, change: Callable[[str], str]) -> None:
    file = place / "adapter_model.safetensors"
    save_file({change(key): tensor for key, tensor in load_file(file).items()}, file)
    config = json.loads((place / "adapter_config.json").read_text())
    for field in ("rank_pattern", "alpha_pattern"):
        config[field] = {}
    config["target_modules"] = ".*(to_q|to_k|to_v|q_proj|fc1)"
    (place / "adapter_config.json").write_text(json.dumps(config))


SPELLINGS: dict[str, tuple[str, Callable[[str], str], str]] = {
    # name: (which stems of kohya's, the change of a key, the verdict)
    "as written": (r"^lora_unet_.*_to_q$", lambda key: key, FULLY),
    "the component's name in front": (
        r"^lora_unet_.*_to_q$",
        lambda key: key.replace("base_model.model.", "base_model.model.unet."),
        NOT,
    ),
    "text_model., which today's CLIP has not": (
        r"^lora_te_.*_(q_proj|fc1)$",
        lambda key: key.replace("base_model.model.", "base_model.model.text_model."),
        NOT,
    ),
    "the encoder as written": (r"^lora_te_.*_(q_proj|fc1)$", lambda key: key, FULLY),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_one_component(name: str, tmp_path: Path) -> None:
    stems, change, expected = SPELLINGS[name]
    source = kohya_file(tmp_path / "k.safetensors", "sd15", only=lambda s: bool(re.match(stems, s)), alphas=(4.0,))
    convert_file(source, "peft", tmp_path / "folder")
    (place,) = folders(tmp_path / "folder").values()
    respelled(place, change)
    assert verdict(place, "sd15", "unet" if "unet" in stems else "text_encoder") == expected


def test_other_layouts_are_not_read(tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "k.safetensors", "sd15", share=0.1)
    assert verdict_of_a_file(source) == NOT
    convert_file(source, "diffusers", tmp_path / "d.safetensors")
    assert verdict_of_a_file(tmp_path / "d.safetensors") == NOT


def verdict_of_a_file(path: Path) -> str:
    found = conform(open_adapter(path), programs()["peft"])
    with pytest.raises(Exception, match=r"adapter_config|HFValidationError|not found|Can't find"):
        PeftModel.from_pretrained(pipeline("sd15").unet, str(path))
    return found.verdict


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_its_other_kinds(kind: str, tmp_path: Path) -> None:
    """LoHa, LoKr, IA3, OFT, BOFT: what PEFT saves it loads, every parameter, and so it is told."""
    model, _ = trained(kind)
    model.save_pretrained(tmp_path / "folder")
    found = conform(open_adapter(tmp_path / "folder"), programs()["peft"])
    again = PeftModel.from_pretrained(KINDS[kind][0](), str(tmp_path / "folder"))
    before, after = (dict(one.named_parameters()) for one in (model, again))
    assert all(torch.equal(after[name], before[name]) for name in before if "default" in name)
    assert found.fully
