"""Other spellings of a checkpoint: every tensor lands once under its new name, or the whole is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from loratool.core.architecture import Checkpoint
from loratool.core.errors import FormatError
from loratool.core.registry import architectures
from loratool.core.tensor import LazyTensor
from loratool.files.checkpoint import read_checkpoint
from loratool.ops.respell import Respelled, one_copy, respelled
from tests.bakes import noise, save
from tests.checkpoints import checkpoint_shapes

BFL = "double_blocks.0.img_attn.qkv"
FLUX = "transformer_blocks.0.attn"
CLIP_G = "text_model.encoder.layers.0.self_attn"
OPEN_CLIP = "conditioner.embedders.1.model.transformer.resblocks.0.attn"

Parts = Mapping[str, Mapping[str, torch.Tensor]]


def kind(model: str, name: str) -> Checkpoint:
    return next(one for one in architectures()[model].checkpoints if one.id == name)


def spelled(model: str, parts: Parts, name: str) -> Respelled:
    lazy = {
        folder: {key: LazyTensor.from_torch(one) for key, one in tensors.items()} for folder, tensors in parts.items()
    }
    return respelled("model", lazy, architectures()[model], kind(model, name))


def values(made: Respelled) -> dict[str, torch.Tensor]:
    return {key: tensor.load().clone() for key, tensor in made.tensors.items()}


def refused(model: str, parts: Parts, name: str, words: str) -> FormatError:
    with pytest.raises(FormatError, match=words) as caught:
        spelled(model, parts, name)
    assert caught.value.file == "model"
    return caught.value


@pytest.mark.parametrize(
    ("model", "before", "after"),
    [
        ("sd15", "diffusers", "ldm"),
        ("sd15", "diffusers-short", "ldm"),
        ("sdxl", "diffusers", "sgm"),
        ("sdxl", "sgm", "diffusers-short"),
        ("flux", "diffusers", "comfyui"),
        ("flux", "comfyui", "diffusers"),
    ],
)
def test_all_weights_of_the_real_model_land_with_their_shapes(model: str, before: str, after: str) -> None:
    shapes = checkpoint_shapes(model, before)
    one_file = {"": {key: shape for part in shapes.values() for key, shape in part.items()}}
    parts = shapes if kind(model, before).folder else one_file
    lazy = {
        folder: {key: LazyTensor.computed(shape, "F16", torch.Tensor) for key, shape in part.items()}
        for folder, part in parts.items()
    }
    table = architectures()[model]
    if kind(model, after).folder:  # the components of a folder have the same keys: one after the other
        found = {}
        for component, voice in kind(model, before).voices.items():
            own = {key: one for key, one in lazy[""].items() if key.startswith(voice.prefix)}
            found[component] = respelled("model", {"": own}, table, kind(model, after)).tensors
        expected = checkpoint_shapes(model, after)
        assert {c: {k: t.shape for k, t in one.items()} for c, one in found.items()} == expected
        return
    made = respelled("model", lazy, table, kind(model, after))
    expected_all = {key: shape for part in checkpoint_shapes(model, after).values() for key, shape in part.items()}
    assert {key: one.shape for key, one in made.tensors.items()} == expected_all
    assert made.left_out == ()


def test_rows_are_put_together_in_the_order_of_the_fused_weight_and_its_bias() -> None:
    q, k, v = (noise(4, 4, seed=at) for at in range(3))
    biases = [noise(4, seed=at) for at in range(3, 6)]
    tensors = {f"{FLUX}.to_{x}.weight": one for x, one in zip("kvq", (k, v, q), strict=True)}
    tensors |= {f"{FLUX}.to_{x}.bias": one for x, one in zip("qkv", biases, strict=True)}
    made = spelled("flux", {"": tensors}, "bfl")
    found = values(made)
    assert torch.equal(found[f"{BFL}.weight"], torch.cat([q, k, v]))
    assert torch.equal(found[f"{BFL}.bias"], torch.cat(biases))
    assert len(found) == 2
    back = values(spelled("flux", {"": found}, "diffusers"))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_shift_and_scale_change_places() -> None:
    weight = noise(8, 4)
    made = values(spelled("flux", {"transformer": {"norm_out.linear.weight": weight}}, "bfl"))
    assert torch.equal(made["final_layer.adaLN_modulation.1.weight"], torch.cat([weight[4:], weight[:4]]))


def test_open_clip_fuses_in_proj_and_turns_its_projection() -> None:
    encoder = {
        f"{CLIP_G}.{x}_proj.{kind}": noise(4, *size) for x in "qkv" for kind, size in (("weight", [4]), ("bias", []))
    }
    encoder |= {"text_projection.weight": noise(6, 4), "text_model.embeddings.position_embedding.weight": noise(7, 4)}
    found = values(spelled("sdxl", {"text_encoder_2": encoder}, "sgm"))
    prefix = "conditioner.embedders.1.model"
    assert found.keys() == {
        f"{OPEN_CLIP}.in_proj_weight",
        f"{OPEN_CLIP}.in_proj_bias",
        f"{prefix}.text_projection",
        f"{prefix}.positional_embedding",
    }
    assert torch.equal(found[f"{prefix}.text_projection"], encoder["text_projection.weight"].T)


def test_the_attention_of_the_vae_becomes_convolutions_also_under_its_old_names() -> None:
    weight, bias = noise(4, 4), noise(4)
    for old in ("to_q", "query"):
        rest = {"decoder.mid_block.attentions.0.group_norm.weight": noise(4)}
        # One more old name, so that the old spelling has most keys.
        rest |= {"decoder.mid_block.attentions.0.proj_attn.weight": noise(4, 4)} if old == "query" else {}
        name = f"decoder.mid_block.attentions.0.{old}"
        vae = {f"{name}.weight": weight, f"{name}.bias": bias, **rest}
        found = values(spelled("sd15", {"vae": vae}, "ldm"))
        assert torch.equal(found["first_stage_model.decoder.mid.attn_1.q.weight"], weight.reshape(4, 4, 1, 1))
        assert torch.equal(found["first_stage_model.decoder.mid.attn_1.q.bias"], bias)
        assert len(found) == len(vae)


# -- what no table names ----------------------------------------------------------------------------------------------


def test_constants_go_where_the_names_stay_and_are_told_where_they_do_not() -> None:
    ids, scale = torch.arange(7).unsqueeze(0), torch.tensor(4.6)
    key = "text_model.embeddings.position_ids"
    weight = {"text_model.final_layer_norm.weight": noise(4)}
    made = spelled("sd15", {"text_encoder": {**weight, key: ids}}, "ldm")
    assert torch.equal(values(made)[f"cond_stage_model.transformer.{key}"], ids)
    assert made.left_out == ()
    made = spelled("sdxl", {"text_encoder_2": {**weight, key: ids, "logit_scale": scale}}, "sgm")
    assert set(made.tensors) == {"conditioner.embedders.1.model.ln_final.weight"}
    assert made.left_out == (f"text_encoder_2/{key}", "text_encoder_2/logit_scale")


def test_the_tied_embedding_of_t5_stays() -> None:
    t5 = {"shared.weight": noise(8, 4), "encoder.embed_tokens.weight": noise(8, 4)}
    assert set(spelled("flux", {"text_encoder_2": t5}, "comfyui").tensors) == {
        f"text_encoders.t5xxl.transformer.{key}" for key in t5
    }


def test_names_that_only_get_another_prefix_take_everything_along() -> None:
    tensors = {f"{BFL}.weight": noise(12, 4), "scaled_fp8": torch.zeros(2), "more.of.a.variant": noise(3)}
    assert set(spelled("flux", {"": tensors}, "comfyui").tensors) == {f"model.diffusion_model.{key}" for key in tensors}


@pytest.mark.parametrize(
    ("folder", "extra"), [("unet", "mystery.weight"), ("text_encoder", "text_model.encoder.layers.12.mlp.fc1.weight")]
)
def test_a_tensor_without_a_name_is_refused(folder: str, extra: str) -> None:
    parts = {
        "unet": {"conv_in.weight": noise(4, 4, 3, 3)},
        "text_encoder": {"text_model.final_layer_norm.weight": noise(4)},
    }
    spelled("sd15", parts, "ldm")
    parts[folder][extra] = noise(2, 2)
    error = refused("sd15", parts, "ldm", "1 tensor has no name in ldm")
    assert f"{folder}/{extra}" in error.message
    assert error.hint is not None and "without --format" in error.hint


def test_a_component_that_is_no_part_of_the_model() -> None:
    unet = {"conv_in.weight": noise(4, 4, 3, 3)}
    refused("sd15", {"unet": unet, "image_encoder": {"a": noise(1)}}, "ldm", "no name in ldm: image_encoder/a")


def test_a_spelling_for_one_part_refuses_the_others() -> None:
    parts = {"transformer": {"proj_out.weight": noise(2, 4)}, "vae": {"decoder.conv_in.weight": noise(4, 4, 3, 3)}}
    error = refused("flux", parts, "bfl", "for transformer alone: it has no place for vae")
    assert error.hint == "name model/transformer as --base"


# -- what cannot be fused ---------------------------------------------------------------------------------------------


def test_a_part_of_a_fused_weight_that_is_missing() -> None:
    tensors = {f"{FLUX}.to_{x}.weight": noise(4, 4) for x in "qv"}
    error = refused("flux", {"": tensors}, "bfl", f"belongs to {BFL} with {FLUX}.to_k, which is not there")
    assert error.key == f"{FLUX}.to_q.weight"


def test_parts_of_two_dtypes() -> None:
    tensors = {f"{FLUX}.to_{x}.weight": noise(4, 4) for x in "qkv"}
    tensors[f"{FLUX}.to_k.weight"] = tensors[f"{FLUX}.to_k.weight"].half()
    refused("flux", {"": tensors}, "bfl", "cannot be put into .* with the others")


def test_rows_that_do_not_fit_the_model() -> None:
    refused("flux", {"": {f"{BFL}.weight": noise(10, 4)}}, "diffusers", "has 10 rows, which cannot be dealt to 3 parts")


def test_scales_of_fp8_go_with_whole_weights_only() -> None:
    eight = noise(12, 4).to(torch.float8_e4m3fn)
    whole = {f"{BFL}.weight": eight, f"{BFL}.scale_weight": torch.tensor(2.0), f"{BFL}.scale_input": torch.tensor(1.0)}
    assert set(spelled("flux", {"": whole}, "comfyui").tensors) == {f"model.diffusion_model.{key}" for key in whole}
    refused("flux", {"": whole}, "diffusers", "is a scale of fp8")
    parts = {
        f"{FLUX}.to_{x}.{kind}": one for x in "qkv" for kind, one in (("weight", eight), ("scale_weight", noise()))
    }
    refused("flux", {"": parts}, "bfl", "is a scale of fp8")


def test_a_relative_with_the_same_names_is_refused() -> None:
    """Stable Diffusion 2 has the names of 1, but its text encoder is spelled in another way in files."""
    unet = {"conv_in.weight": noise(4, 4, 3, 3), "down_blocks.0.attentions.0.proj_in.weight": noise(4, 4, 1, 1)}
    spelled("sd15", {"unet": unet}, "ldm")
    unet["down_blocks.0.attentions.0.proj_in.weight"] = noise(4, 4)
    refused("sd15", {"unet": unet}, "ldm", r"is \[4, 4\], expected 4 dimensions as in Stable Diffusion 1.x")


def test_a_relative_with_fewer_blocks_is_refused() -> None:
    """ldm counts blocks through all levels, and those of the decoder backwards: other numbers, had it fewer."""
    small = {key: noise(4, 4, 3, 3) for key in ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight")}
    spelled("sd15", {"unet": small}, "ldm")
    small["down_blocks.0.downsamplers.0.conv.weight"] = noise(4, 4, 3, 3)
    refused("sd15", {"unet": small}, "ldm", r"would be input_blocks.3 in ldm, but there is no input_blocks.2")
    vae = {f"decoder.up_blocks.{level}.resnets.0.conv1.weight": noise(4, 4, 3, 3) for level in range(3)}
    refused("sd15", {"vae": vae}, "ldm", r"would be decoder.up.3 in ldm, but there is no decoder.up.0")
    vae["decoder.up_blocks.3.resnets.0.conv1.weight"] = noise(4, 4, 3, 3)
    spelled("sd15", {"vae": vae}, "ldm")


def test_two_tensors_of_one_new_name() -> None:
    """The text encoders of SDXL have the same names in a folder."""
    norms = (
        "conditioner.embedders.0.transformer.text_model.final_layer_norm",
        "conditioner.embedders.1.model.ln_final",
    )
    parts = {"": {f"{norm}.weight": noise(4) for norm in norms}}
    refused("sdxl", parts, "diffusers", "would be called text_model.final_layer_norm.weight, as another tensor is")


# -- copies -----------------------------------------------------------------------------------------------------------


def folder_with(path: Path, *names: str) -> Path:
    for name in names:
        save(path / "unet" / f"{name}.safetensors", {"conv_in.weight": noise(4, 4, 3, 3)})
    return path


def test_of_several_copies_the_one_without_a_variant_is_taken(tmp_path: Path) -> None:
    plain = "diffusion_pytorch_model"
    folder = folder_with(tmp_path / "three", plain, f"{plain}.fp16", f"{plain}.non_ema")
    save(folder / "safety_checker" / "model.safetensors", {"a": noise(1)})
    found, told = one_copy(read_checkpoint(folder))
    assert [file.name for one in found.sets for file in one.files] == [f"unet/{plain}.safetensors"]
    assert told == (
        "left out: safety_checker, which is no part of such a file",
        f"of 3 copies of the weights of unet unet/{plain}.safetensors is taken",
    )
    found, told = one_copy(read_checkpoint(folder_with(tmp_path / "one", f"{plain}.fp16")))
    assert (len(found.sets), told) == (1, ())
    with pytest.raises(FormatError, match="2 copies of the weights of unet"):
        one_copy(read_checkpoint(folder_with(tmp_path / "none", f"{plain}.fp16", f"{plain}.bf16")))


def test_components_that_the_index_does_not_name_are_left_out(tmp_path: Path) -> None:
    """The published SDXL has a second VAE beside that of the pipeline."""
    folder = folder_with(tmp_path, "diffusion_pytorch_model")
    save(folder / "vae_1_0" / "diffusion_pytorch_model.safetensors", {"decoder.conv_in.weight": noise(4, 4, 3, 3)})
    (folder / "model_index.json").write_text('{"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"]}')
    found, told = one_copy(read_checkpoint(folder))
    assert [one.folder for one in found.sets] == ["unet"]
    assert told == ("left out: vae_1_0, which model_index.json does not name",)
