"""cloneofsimo's first files: pickled lists of factors, up and down in turn, without any name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratool.core.errors import LoratoolError
from loratool.core.registry import architectures, layouts
from loratool.ops.convert_file import convert_file
from loratool.ops.open import open_adapter

LAYOUT = layouts()["cloneofsimo"]
ATTENTION = [f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")]
WITH_GEGLU = [*ATTENTION[:4], "ff.net.0.proj", *ATTENTION[4:]]
CLIP = ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj"]


def traversal(inside: list[str]) -> list[str]:
    """The modules of a UNet in the order in which diffusers of early 2023 registered them: down, up, middle."""
    blocks = [f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)]
    blocks += [f"up_blocks.{i}.attentions.{j}" for i in range(1, 4) for j in range(3)]
    return [f"{block}.transformer_blocks.0.{name}" for block in [*blocks, "mid_block.attentions.0"] for name in inside]


LISTS = {
    "unet": ("unet", traversal(WITH_GEGLU), 144),
    "unet of the first version": ("unet", traversal(ATTENTION), 128),
    "text encoder": ("text_encoder", [f"text_model.encoder.layers.{i}.{one}" for i in range(12) for one in CLIP], 48),
}


def factors(component: str, names: list[str]) -> list[torch.Tensor]:
    """What `save_lora_weight` puts into its list, for the shapes of the real model."""
    table = architectures()["sd15"]
    canonical = table.naming(component, next(iter(table.components[component]())))
    made = []
    for number, name in enumerate(names):
        out, columns = canonical[name][0].shape[:2]
        made += [torch.full((out, 4), float(number)), torch.full((4, columns), float(number))]
    return made


@pytest.mark.parametrize("kind", LISTS)
def test_positions_are_names(tmp_path: Path, kind: str) -> None:
    component, names, count = LISTS[kind]
    assert len(names) == count
    torch.save(factors(component, names), tmp_path / "lora.pt")
    adapter = open_adapter(tmp_path / "lora.pt")
    assert (adapter.layout, adapter.architecture.id, adapter.components) == ("cloneofsimo", "sd15", (component,))
    assert [module.targets[0].path.removesuffix(".weight") for module in adapter.modules] == names
    for number, module in enumerate(adapter.modules):
        assert {factor.numbers()[0] for factor in module.factors.values()} == {float(number)}
    done = convert_file(tmp_path / "lora.pt", "kohya", tmp_path / "kohya.safetensors")
    assert done.modules_after == count and done.proof is not None and done.proof.bitwise == count


@pytest.mark.parametrize("count", [2, 287, 290, 94])
def test_a_list_of_another_length_is_not_guessed_at(tmp_path: Path, count: int) -> None:
    made = [*factors("unet", LISTS["unet"][1]), torch.ones(320, 4), torch.ones(4, 320)]
    torch.save(made[:count], tmp_path / "lora.pt")
    with pytest.raises(LoratoolError):
        open_adapter(tmp_path / "lora.pt")


def test_a_number_among_names_is_no_list() -> None:
    parsed = LAYOUT.parse(["unet:0:up", "unet:0:down", "1", "0"])
    assert list(parsed.groups) == ["unet:0", "0"]
    assert not LAYOUT.resolve("7 modules: 0", architectures()["sd15"], {})
