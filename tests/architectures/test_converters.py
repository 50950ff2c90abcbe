"""Our names and row orders against diffusers' own converters.

Each checkpoint is written in one of our namings, every row a different number. What a converter makes
of it must be the rows that `Naming.home` points at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

from fixtures import make_schemas
from loratool.architectures import flux, sd15, sdxl
from loratool.architectures._clip import ClipText, open_clip_namings
from loratool.core.architecture import Architecture
from loratool.core.naming import Naming
from loratool.core.target import Target

torch = pytest.importorskip("torch")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any


class Numbers:
    """Columns of numbers, none of which occurs twice."""

    def __init__(self) -> None:
        self._next = 0

    def column(self, targets: Sequence[Target]) -> Tensor:
        """A column as long as the rows of `targets` together."""
        first, self._next = self._next, self._next + sum(target.rows for target in targets)
        column: Tensor = torch.arange(first, self._next, dtype=torch.float64).unsqueeze(1)
        return column


def numbered_checkpoint(naming: Naming, prefix: str) -> dict[str, Tensor]:
    """One tensor for each name, of the right rows; columns (which no naming cuts) are one, save where transposed."""
    numbers = Numbers()
    checkpoint: dict[str, Tensor] = {}
    for targets in naming.values():
        home = naming.home(targets[0])
        tensor = numbers.column(targets)
        if home.transposed:
            tensor = tensor.T.expand(targets[0].shape[1], -1)
        checkpoint[prefix + home.tensor_key] = tensor
        if home.tensor_key.endswith(".weight"):
            bias = prefix + home.tensor_key.removesuffix("weight") + "bias"
            checkpoint[bias] = numbers.column(targets)[:, 0]
    return checkpoint


def rows_at_home(checkpoint: dict[str, Tensor], prefix: str, naming: Naming, target: Target) -> Tensor:
    home = naming.home(target)
    tensor = checkpoint[prefix + home.tensor_key]
    tensor = tensor.T if home.transposed else tensor
    return tensor[home.first_row : home.first_row + target.rows]


def assert_converted(
    checkpoint: dict[str, Tensor], prefix: str, naming: Naming, canonical: Naming, converted: dict[str, Tensor]
) -> None:
    weights = {key for key in converted if key.endswith(".weight")}
    assert weights == {f"{name}.weight" for name in canonical}
    for name, targets in canonical.items():
        ours = torch.cat([rows_at_home(checkpoint, prefix, naming, target) for target in targets])
        assert torch.equal(converted[f"{name}.weight"], ours), name


@pytest.mark.parametrize(
    ("architecture", "config"),
    [(sd15.ARCHITECTURE, make_schemas.SD15_UNET), (sdxl.ARCHITECTURE, make_schemas.SDXL_UNET)],
    ids=["sd15", "sdxl"],
)
def test_ldm_unet(architecture: Architecture, config: dict[str, Any]) -> None:
    voice = architecture.checkpoints[0].voices["unet"]
    naming = architecture.naming("unet", voice.naming)
    checkpoint = numbered_checkpoint(naming, voice.prefix)
    converted = single_file.convert_ldm_unet_checkpoint(dict(checkpoint), config)
    assert_converted(checkpoint, voice.prefix, naming, architecture.naming("unet", "diffusers"), converted)


@pytest.mark.parametrize("architecture", [sd15.ARCHITECTURE, sdxl.ARCHITECTURE], ids=["sd15", "sdxl"])
def test_ldm_clip(architecture: Architecture) -> None:
    voice = architecture.checkpoints[0].voices["text_encoder"]
    naming = architecture.naming("text_encoder", voice.naming)
    checkpoint = numbered_checkpoint(naming, voice.prefix)
    converted = single_file.convert_ldm_clip_checkpoint(dict(checkpoint))
    assert_converted(checkpoint, voice.prefix, naming, architecture.naming("text_encoder", "hf"), converted)


def test_open_clip() -> None:
    voice = sdxl.ARCHITECTURE.checkpoints[0].voices["text_encoder_2"]
    namings = sdxl.ARCHITECTURE.namings("text_encoder_2")
    checkpoint = numbered_checkpoint(namings[voice.naming], voice.prefix)
    converted = single_file.convert_open_clip_checkpoint(None, dict(checkpoint), prefix=voice.prefix)
    assert_converted(checkpoint, voice.prefix, namings[voice.naming], namings["hf"], converted)


def test_open_clip_whole_tensors() -> None:
    """With a projection that is not square, so that a forgotten transposition shows in the shapes as well."""
    spec = ClipText(layers=2, width=6, mlp=10, projection=4, vocabulary=7, positions=5)
    namings = open_clip_namings(spec, "text_encoder_2")
    naming = namings["openclip"]
    checkpoint: dict[str, Tensor] = {}
    for targets in naming.values():
        home = naming.home(targets[0])
        tensor = torch.randn(sum(target.rows for target in targets), *targets[0].shape[1:])
        checkpoint[home.tensor_key] = tensor.T.contiguous() if home.transposed else tensor
    converted = single_file.convert_open_clip_checkpoint(None, dict(checkpoint), prefix="")
    assert_converted(checkpoint, "", naming, namings["hf"], converted)
    for name, (target,) in namings["hf"].items():
        assert tuple(converted[f"{name}.weight"].shape) == target.shape, name


@pytest.mark.parametrize("checkpoint_id", ["bfl", "comfyui"])
def test_bfl_transformer(checkpoint_id: str) -> None:
    voices = {checkpoint.id: checkpoint.voices for checkpoint in flux.ARCHITECTURE.checkpoints}
    voice = voices[checkpoint_id]["transformer"]
    namings = flux.ARCHITECTURE.namings("transformer")
    checkpoint = numbered_checkpoint(namings[voice.naming], voice.prefix)
    converted = single_file.convert_flux_transformer_checkpoint_to_diffusers(dict(checkpoint))
    assert_converted(checkpoint, voice.prefix, namings[voice.naming], namings["diffusers"], converted)


def test_comfyui_t5() -> None:
    voice = {checkpoint.id: checkpoint.voices for checkpoint in flux.ARCHITECTURE.checkpoints}["comfyui"][
        "text_encoder_2"
    ]
    naming = flux.ARCHITECTURE.naming("text_encoder_2", voice.naming)
    checkpoint = {voice.prefix + naming.home(target).tensor_key: torch.empty(0) for (target,) in naming.values()}
    converted = single_file.convert_sd3_t5_checkpoint_to_diffusers(checkpoint)
    assert set(converted) == {f"{name}.weight" for name in naming}


def test_kohya_flux_lora() -> None:
    """The written voice of kohya, row order included, as diffusers' LoRA loader understands it."""
    voice = flux.ARCHITECTURE.writes["kohya"]["transformer"]
    namings = flux.ARCHITECTURE.namings("transformer")
    naming = namings[voice.naming]
    ups, lora, numbers = {}, {}, Numbers()
    for name, targets in naming.items():
        if len(targets[0].shape) == 1:
            continue  # the loader knows of no norms
        stem = f"{voice.prefix}{name}".replace(".", "_")
        up = numbers.column(targets)
        ups[naming.home(targets[0]).tensor_key] = up
        lora[f"{stem}.lora_up.weight"] = up
        lora[f"{stem}.lora_down.weight"] = torch.ones(1, 1, dtype=torch.float64)
    converted = conversion._convert_kohya_flux_lora_to_diffusers(lora)
    suffix = ".lora_B.weight"
    loaded = {
        key.removeprefix("transformer.").removesuffix(suffix): tensor
        for key, tensor in converted.items()
        if key.endswith(suffix)
    }
    linears = {name: targets for name, targets in namings["diffusers"].items() if len(targets[0].shape) > 1}
    assert set(loaded) == set(linears)
    for name, targets in linears.items():
        ours = torch.cat([rows_at_home(ups, "", naming, target) for target in targets])
        assert torch.equal(loaded[name], ours), name


def test_kohya_sdxl_lora() -> None:
    """The written voice of kohya, for the attention that diffusers' LoRA loader maps."""
    diffusers = pytest.importorskip("diffusers")
    voice = sdxl.ARCHITECTURE.writes["kohya"]["unet"]
    numbers = Numbers()
    lora, expected = {}, {}
    for name, (target,) in sdxl.ARCHITECTURE.naming("unet", voice.naming).items():
        if len(target.shape) != 2 or ".attentions." not in target.path:
            continue
        stem = f"{voice.prefix}{name}".replace(".", "_")
        up = numbers.column([target])
        lora[f"{stem}.lora_up.weight"] = up
        lora[f"{stem}.lora_down.weight"] = torch.ones(1, 1, dtype=torch.float64)
        expected[target.path] = up
    with torch.device("meta"):
        config = diffusers.UNet2DConditionModel(**make_schemas.SDXL_UNET).config
    mapped = conversion._maybe_map_sgm_blocks_to_diffusers(lora, config)
    converted, _ = conversion._convert_non_diffusers_lora_to_diffusers(mapped)
    loaded = {module_path(key): tensor for key, tensor in converted.items() if key.endswith(".up.weight")}
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[path], up) for path, up in expected.items())


def module_path(old_key: str) -> str:
    """The module of a key such as `unet.mid_block.(...).attn1.processor.to_out_lora.up.weight`."""
    path = old_key.removeprefix("unet.").removesuffix(".lora.up.weight")
    if path.endswith("_lora.up.weight"):
        path = path.removesuffix("_lora.up.weight").replace(".processor", "")
        path = path + ".0" if path.endswith("to_out") else path
    return path
