"""`bake --format` against diffusers, which reads what was spelled anew: its converters for files of one piece must give
back the very weights of the folder, at full width by name and shape, and of small models bit for bit."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders import single_file_utils as converters
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from loratool.core.registry import architectures
from loratool.core.tensor import LazyTensor
from loratool.files.checkpoint import read_checkpoint
from loratool.ops.bake_file import bake_file
from loratool.ops.bake_task import Options
from loratool.ops.inputs import Asked
from loratool.ops.respell import respelled
from tests.oracles.models import Weights, complaints, kohya_file, parameters, pipeline
from tests.oracles.single_files import absent, from_single_file

State = dict[str, torch.Tensor]


def kind(architecture: str, name: str) -> Any:
    return next(one for one in architectures()[architecture].checkpoints if one.id == name)


def vae(latent: int, quant: bool, widths: tuple[int, ...], groups: int = 32) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=latent,
        norm_num_groups=groups,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )


# -- at full width: names and shapes ----------------------------------------------------------------------------------


def clip(kind: type, layers: int, width: int, **more: Any) -> Any:
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=8, **more
    )
    return kind(config)


def sd15_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)


def sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


WIDTHS = (128, 256, 512, 512)


def from_unet(state: State, model: Any) -> State:
    return dict(converters.convert_ldm_unet_checkpoint(state, dict(model.config)))


def from_vae(state: State, model: Any) -> State:
    return dict(converters.convert_ldm_vae_checkpoint(state, dict(model.config)))


def from_clip(state: State, model: Any) -> State:
    return dict(converters.convert_ldm_clip_checkpoint(state))


def from_comfyui_clip(state: State, model: Any) -> State:
    return dict(converters.convert_ldm_clip_checkpoint(state, "text_encoders.clip_l.transformer."))


def from_open_clip(state: State, model: Any) -> State:
    return dict(converters.convert_open_clip_checkpoint(model, state, prefix="conditioner.embedders.1.model."))


def from_flux(state: State, model: Any) -> State:
    return dict(converters.convert_flux_transformer_checkpoint_to_diffusers(dict(state)))


Back = Callable[[State, Any], State]

FULL: Mapping[str, tuple[str, str, str, Callable[[], Any], Back]] = {
    "sd15-unet": ("sd15", "ldm", "unet", sd15_unet, from_unet),
    "sd15-vae": ("sd15", "ldm", "vae", lambda: vae(4, True, WIDTHS), from_vae),
    "sd15-clip": ("sd15", "ldm", "text_encoder", lambda: clip(CLIPTextModel, 12, 768), from_clip),
    "sdxl-unet": ("sdxl", "sgm", "unet", sdxl_unet, from_unet),
    "sdxl-vae": ("sdxl", "sgm", "vae", lambda: vae(4, True, WIDTHS), from_vae),
    "sdxl-clip": ("sdxl", "sgm", "text_encoder", lambda: clip(CLIPTextModel, 12, 768), from_clip),
    "sdxl-open-clip": (
        "sdxl",
        "sgm",
        "text_encoder_2",
        lambda: clip(CLIPTextModelWithProjection, 32, 1280, projection_dim=1280),
        from_open_clip,
    ),
    "flux-transformer": (
        "flux",
        "comfyui",
        "transformer",
        lambda: FluxTransformer2DModel(guidance_embeds=True),
        from_flux,
    ),
    "flux-schnell": ("flux", "comfyui", "transformer", FluxTransformer2DModel, from_flux),
    "flux-vae": ("flux", "comfyui", "vae", lambda: vae(16, False, WIDTHS), from_vae),
    "flux-clip": ("flux", "comfyui", "text_encoder", lambda: clip(CLIPTextModel, 12, 768), from_comfyui_clip),
}


def without_values(state: Mapping[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {key: LazyTensor.computed(tuple(one.shape), "F16", torch.Tensor) for key, one in state.items()}


def short(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by key; transformers 5.6 and later call a text model's parts without `text_model.`."""
    return {key.removeprefix("text_model."): tuple(one.shape) for key, one in state.items()}


@pytest.mark.parametrize("case", FULL)
def test_every_name_and_shape_of_the_real_model_is_one_that_diffusers_reads(case: str) -> None:
    architecture, target, component, make, back = FULL[case]
    with torch.device("meta"), complaints():
        model = make()
    state = model.state_dict()
    table = architectures()[architecture]
    made = respelled("a folder", {component: without_values(state)}, table, kind(architecture, target))
    assert not made.left_out
    prefix = kind(architecture, target).voice(component).prefix
    assert all(key.startswith(prefix) for key in made.tensors)
    found = back({key: torch.empty(one.shape, device="meta") for key, one in made.tensors.items()}, model)
    assert short(found) == short(state)
    again = respelled("a file", {"": made.tensors}, table, kind(architecture, "diffusers"))
    assert short(again.tensors) == short(state)


# -- small models: every bit ------------------------------------------------------------------------------------------

SOME = r"_attn\d?_|text_projection|te\d?_\w+_layers_\d_|skip|linear\d|adaLN|conv"
"""Modules of the LoRA: some of every kind."""

FORMATS = {"sd15": "ldm", "sdxl": "sgm", "flux": "comfyui"}


class Model:
    """A small pipeline with a VAE as a folder, a LoRA for it, and both baked with and without another spelling."""

    def __init__(self, architecture: str, folder: Path) -> None:
        self.architecture, self.folder = architecture, folder
        self.pipe = pipeline(architecture, zero=False)
        torch.manual_seed(5)
        made = vae(16, False, (8, 16, 32, 32), 4) if architecture == "flux" else vae(4, True, (8, 16, 32, 32), 4)
        self.pipe.register_modules(vae=made)
        self.base, self.lora = folder / "base", folder / "lora.safetensors"
        with complaints():
            self.pipe.save_pretrained(self.base)
        some = re.compile(SOME)
        kohya_file(self.lora, architecture, only=some.search, ranks=(2,), alphas=(1.0,), size=0.05)
        self.baked = self.bake("baked", self.base)

    def bake(self, name: str, base: Path, **options: Any) -> Path:
        bake_file(base, [Asked(str(self.lora), 0.8)], self.folder / name, Options(**options))
        return self.folder / name

    def loaded(self, path: Path, **given: Any) -> Any:
        """What diffusers makes of a folder or of a file."""
        if path.is_dir():
            with complaints():
                return type(self.pipe).from_pretrained(path, local_files_only=True, **absent(self.pipe), **given)
        return from_single_file(self.pipe, path, self.base, **given)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def model(architecture: str) -> Model:
        if architecture not in made:
            made[architecture] = Model(architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return model


def everything(pipe: Any) -> Weights:
    """The parameters of all components, those of the VAE among them."""
    vae = {("vae", name): parameter.detach().clone() for name, parameter in pipe.vae.named_parameters()}
    return parameters(pipe) | vae


@pytest.mark.parametrize("architecture", FORMATS)
def test_a_folder_baked_into_one_file_is_what_diffusers_loads_from_the_baked_folder(
    architecture: str, models: Callable[[str], Model]
) -> None:
    model = models(architecture)
    path = model.bake("one.safetensors", model.base, format=FORMATS[architecture])
    expected, base = everything(model.loaded(model.baked)), everything(model.pipe)
    found = everything(model.loaded(path))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert any(not torch.equal(found[key], base[key]) for key in base)


@pytest.mark.parametrize("architecture", FORMATS)
def test_every_tensor_comes_back_under_its_old_name(architecture: str, models: Callable[[str], Model]) -> None:
    model = models(architecture)
    table, folder = architectures()[architecture], read_checkpoint(model.base)
    there = respelled("base", folder.components, table, kind(architecture, FORMATS[architecture]))
    for component, tensors in folder.components.items():
        prefix = kind(architecture, FORMATS[architecture]).voice(component).prefix
        own = {key: one for key, one in there.tensors.items() if key.startswith(prefix)}
        spelling = "diffusers" if any(key.startswith("text_model.") for key in tensors) else "diffusers-short"
        back = respelled("file", {"": own}, table, kind(architecture, spelling)).tensors
        assert back.keys() == tensors.keys(), component
        for key, tensor in tensors.items():
            assert back[key].shape == tensor.shape and back[key].dtype == tensor.dtype
            assert bytes(back[key].read()) == bytes(tensor.read()), f"{component}: {key}"


def test_a_bare_transformer_becomes_a_file_of_bfl_and_that_one_of_comfyui(models: Callable[[str], Model]) -> None:
    model = models("flux")
    bfl = model.bake("bfl.safetensors", model.base / "transformer", format="bfl", allow_unmatched=True)
    given = {"text_encoder": model.loaded(model.baked).text_encoder, "vae": model.pipe.vae}
    expected = parameters(model.loaded(model.baked))
    found = parameters(model.loaded(bfl, **given))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    # From file to file only the prefix is another: as if it were baked there.
    plain = read_checkpoint(model.bake("plain.safetensors", bfl, allow_unmatched=True)).keys
    prefixed = read_checkpoint(model.bake("p.safetensors", bfl, format="comfyui", allow_unmatched=True)).keys
    assert {f"model.diffusion_model.{key}" for key in plain} == set(prefixed)
    for key, tensor in plain.items():
        assert bytes(prefixed[f"model.diffusion_model.{key}"].read()) == bytes(tensor.read())
