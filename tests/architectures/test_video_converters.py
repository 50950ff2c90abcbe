"""Names and row orders of video models and their kin against diffusers' own converters, for checkpoints and for LoRAs.

As in `test_converters`: every row a different number, and what a converter makes of it must be the rows that our
canonical naming says. `test_video_scripts` has what the library has no converter for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from loratool.core.architecture import Architecture, Voice
from loratool.core.naming import Naming
from loratool.core.registry import architectures
from tests.architectures.test_converters import Numbers, assert_converted, numbered_checkpoint, rows_at_home

torch = pytest.importorskip("torch")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any

State = dict[str, Tensor]


def size_of(identifier: str, title: str = "") -> Architecture:
    sizes = architectures()[identifier].sizes
    return next(size for size in sizes if not title or size.title == title)


def checkpoint_voice(architecture: Architecture, checkpoint: str, component: str = "transformer") -> Voice:
    return {one.id: one.voices for one in architecture.checkpoints}[checkpoint][component]


# -- checkpoints ----------------------------------------------------------------------------------------------------


class Kept(dict[str, Tensor]):
    """A checkpoint that keeps what is popped: diffusers 0.42 tells Cosmos 1 by a key that it has popped already."""

    def pop(self, key: str, *_: Any) -> Tensor:
        return self[key]


CHECKPOINTS = [
    *(
        ("wan", title, checkpoint, "convert_wan_transformer_to_diffusers")
        for title in ("", "Wan 2.1/2.2 14B text-to-video", "Wan 2.2 5B", "Wan 2.1 1.3B", "Wan 2.1 VACE 1.3B")
        for checkpoint in ("native", "comfyui")
    ),
    ("hunyuan-video", "", "native", "convert_hunyuan_video_transformer_to_diffusers"),
    ("ltx-video", "", "native", "convert_ltx_transformer_checkpoint_to_diffusers"),
    ("ltx-video", "LTX-Video 2B", "bare", "convert_ltx_transformer_checkpoint_to_diffusers"),
    ("ltx2", "", "native", "convert_ltx2_transformer_to_diffusers"),
    *(
        ("cosmos", title, "native", "convert_cosmos_transformer_checkpoint_to_diffusers")
        for title in ("", "Cosmos-Predict2 2B text-to-image")
    ),
    *(
        ("cosmos1", title, "native", "convert_cosmos_transformer_checkpoint_to_diffusers")
        for title in ("", "Cosmos 1 7B text-to-world")
    ),
    ("anima", "", "native", "convert_cosmos_transformer_checkpoint_to_diffusers"),
    ("krea2", "", "native", "convert_krea2_transformer_checkpoint_to_diffusers"),
    ("krea2", "", "comfyui", "convert_krea2_transformer_checkpoint_to_diffusers"),
]


@pytest.mark.parametrize(
    ("identifier", "title", "checkpoint", "converter"),
    CHECKPOINTS,
    ids=[f"{title or identifier}-{checkpoint}" for identifier, title, checkpoint, _ in CHECKPOINTS],
)
def test_checkpoint(identifier: str, title: str, checkpoint: str, converter: str) -> None:
    model = size_of(identifier, title)
    voice = checkpoint_voice(model, checkpoint)
    naming = model.naming("transformer", voice.naming)
    state = numbered_checkpoint(naming, voice.prefix)
    converted = getattr(single_file, converter)(Kept(state) if identifier == "cosmos1" else dict(state))
    assert_converted(state, voice.prefix, naming, model.naming("transformer", "diffusers"), converted)


# -- LoRAs ----------------------------------------------------------------------------------------------------------


def linears(naming: Naming) -> list[str]:
    """The names whose weights a LoRA pair can update in a program that knows no convolution: two dimensions."""
    return [name for name, targets in naming.items() if len(targets[0].shape) == 2]


class Pairs:
    """A LoRA of rank 1 in one voice, every row of every up and every down another number, alpha 1 where asked for."""

    def __init__(self, naming: Naming, voice: Voice, names: Iterable[str], kohya: bool = False) -> None:
        self.naming, self.state, self.ups = naming, {}, {}
        self.downs: dict[str, float] = {}
        numbers = Numbers()
        for index, name in enumerate(names):
            up, down = numbers.column(naming[name]), torch.full((1, 1), float(index), dtype=torch.float64)
            stem = voice.prefix + (name.replace(".", "_") if kohya else name)
            self.state[f"{stem}.{'lora_up' if kohya else 'lora_B'}.weight"] = up
            self.state[f"{stem}.{'lora_down' if kohya else 'lora_A'}.weight"] = down
            if kohya:
                self.state[f"{stem}.alpha"] = torch.tensor(1.0)
            self.ups[naming.home(naming[name][0]).tensor_key], self.downs[name] = up, float(index)

    def assert_loaded(
        self, canonical: Naming, converted: Mapping[str, Tensor], prefix: str = "transformer.", strange: str = "(?!)"
    ) -> None:
        """What diffusers made of the pairs are those of our canonical names; not the downs of `strange` ones."""
        homes = {target: name for name in self.downs for target in self.naming[name]}
        expected = {name: targets for name, targets in canonical.items() if targets[0] in homes}
        assert expected
        assert converted.keys() == {f"{prefix}{name}.lora_{side}.weight" for name in expected for side in "AB"}
        for name, targets in expected.items():
            ours = torch.cat([rows_at_home(self.ups, "", self.naming, target) for target in targets])
            assert torch.equal(converted[f"{prefix}{name}.lora_B.weight"], ours), name
            if not re.search(strange, name):
                down = converted[f"{prefix}{name}.lora_A.weight"]
                assert down.tolist() == [[self.downs[homes[target]]] for target in targets[:1]], name


def pairs(
    identifier: str, layout: str, keep: Callable[[str], bool], title: str = "", naming: str = "", prefix: str = ""
) -> tuple[Architecture, Pairs]:
    model = size_of(identifier, title)
    written = model.writes[layout]["transformer"]
    voice = Voice(prefix or written.prefix, naming or written.naming)
    assert voice in [spoken for _, spoken in model.voices(layout)], "only voices that we have prove something"
    table = model.naming("transformer", voice.naming)
    return model, Pairs(table, voice, filter(keep, linears(table)), kohya=layout == "kohya")


@pytest.mark.parametrize("title", ["", "Wan 2.1/2.2 14B text-to-video", "Wan 2.2 5B", "Wan 2.1 1.3B"])
def test_wan_lora(title: str) -> None:
    model, lora = pairs("wan", "comfyui", lambda name: True, title)
    converted = conversion._convert_non_diffusers_wan_lora_to_diffusers(lora.state)
    lora.assert_loaded(model.naming("transformer", "diffusers"), converted)


@pytest.mark.parametrize("title", ["", "Wan 2.2 14B image-to-video", "Wan 2.1 1.3B"])
def test_musubi_wan_lora(title: str) -> None:
    """musubi-tuner trains blocks only, and this converter knows nothing else."""
    model, lora = pairs("wan", "kohya", lambda name: name.startswith("blocks."), title)
    converted = conversion._convert_musubi_wan_lora_to_diffusers(lora.state)
    lora.assert_loaded(model.naming("transformer", "diffusers"), converted)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer."])
def test_hunyuan_video_lora(prefix: str) -> None:
    """Without the refiner's attention, whose down this converter cuts in three (diffusers 0.42) as if it were fused.

    It also swaps the halves of the last modulation's down, which has none; its up is right.
    """
    model, lora = pairs(
        "hunyuan-video", "comfyui", lambda name: "self_attn_qkv" not in name, naming="native", prefix=prefix
    )
    last = [key for key in lora.state if "final_layer.adaLN_modulation" in key and "lora_A" in key]
    lora.state |= {key: torch.zeros(2, 1, dtype=torch.float64) for key in last}
    converted = conversion._convert_hunyuan_video_lora_to_diffusers(dict(lora.state))
    lora.assert_loaded(model.naming("transformer", "diffusers"), converted, strange="^norm_out")


def test_hunyuan_video_refiner_lora() -> None:
    """The refiner's attention as diffusers means it: the ups of q, k and v."""
    model, lora = pairs(
        "hunyuan-video", "comfyui", lambda name: "self_attn_qkv" in name, naming="native", prefix="diffusion_model."
    )
    lora.state = {
        key: value if "lora_B" in key else torch.arange(3, dtype=torch.float64).unsqueeze(1)
        for key, value in lora.state.items()
    }
    converted = conversion._convert_hunyuan_video_lora_to_diffusers(dict(lora.state))
    lora.assert_loaded(model.naming("transformer", "diffusers"), converted, strange="")


def test_ltx_video_lora() -> None:
    """The converter changes the prefix only: it is right for the blocks, where both spellings are the same."""
    model, lora = pairs("ltx-video", "comfyui", lambda name: name.startswith("transformer_blocks."))
    converted = conversion._convert_non_diffusers_ltxv_lora_to_diffusers(lora.state)
    lora.assert_loaded(model.naming("transformer", "diffusers"), converted)


@pytest.mark.parametrize("title", ["LTX-2", "LTX-2.3"])
def test_ltx2_lora(title: str) -> None:
    model, lora = pairs("ltx2", "comfyui", lambda name: True, title)
    converted = conversion._convert_non_diffusers_ltx2_lora_to_diffusers(lora.state)
    lora.assert_loaded(model.naming("transformer", "diffusers"), converted)


def test_ltx2_connector_lora() -> None:
    model = size_of("ltx2")
    voice = model.writes["comfyui"]["connectors"]
    naming = model.naming("connectors", voice.naming)
    lora = Pairs(naming, voice, ["text_embedding_projection.aggregate_embed"])
    converted = conversion._convert_non_diffusers_ltx2_lora_to_diffusers(lora.state, "text_embedding_projection")
    lora.assert_loaded(model.naming("connectors", "diffusers"), converted, "connectors.")


def test_anima_lora() -> None:
    model, lora = pairs("anima", "comfyui", lambda name: True)
    converted = conversion._convert_non_diffusers_anima_lora_to_diffusers(lora.state)
    lora.assert_loaded(model.naming("transformer", "diffusers"), converted)


def test_anima_conditioner_lora() -> None:
    model = size_of("anima")
    voice = model.writes["comfyui"]["text_conditioner"]
    naming = model.naming("text_conditioner", voice.naming)
    lora = Pairs(naming, voice, linears(naming))
    converted = conversion._convert_non_diffusers_anima_lora_to_diffusers(lora.state)
    written = model.writes["diffusers"]["text_conditioner"]
    lora.assert_loaded(naming, converted, written.prefix)


@pytest.mark.parametrize(("layout", "prefix"), [("comfyui", "diffusion_model."), ("peft", "base_model.model.")])
def test_krea2_lora(layout: str, prefix: str) -> None:
    model, lora = pairs("krea2", layout, lambda name: True, naming="native", prefix=prefix)
    converted = conversion._convert_non_diffusers_krea2_lora_to_diffusers(lora.state)
    lora.assert_loaded(model.naming("transformer", "diffusers"), converted)
