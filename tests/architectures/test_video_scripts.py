"""Names and row orders of video models that diffusers' library has no converter for, written out a second time.

The lists are after diffusers' conversion scripts, and after what trainers and ComfyUI do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from loratool.architectures.hunyuan_video import SPEC
from loratool.core.naming import Naming
from tests.architectures.test_converters import numbered_checkpoint, rows_at_home
from tests.architectures.test_video_converters import size_of

torch = pytest.importorskip("torch")


def paths_of(naming: Naming) -> dict[str, list[str]]:
    return {name: [target.path for target in targets] for name, targets in naming.items()}


def written_out(kinds: Mapping[str, str | Sequence[str]], counts: Mapping[str, int]) -> dict[str, list[str]]:
    """Every name with its paths: `{}` in both is each number of a block, as many as `counts` says of its beginning."""
    found: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        paths = [kind] if isinstance(kind, str) else list(kind)
        many = next((count for start, count in counts.items() if name.startswith(start)), 1)
        for number in range(many):
            found[name.format(number)] = [path.format(number) for path in paths]
    return found


REFINER = {
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    **{
        f"txt_in.individual_token_refiner.blocks.{{}}.{name}": path
        if isinstance(path, list)
        else f"context_embedder.token_refiner.refiner_blocks.{{}}.{path}"
        for name, path in {
            "norm1": "norm1",
            "norm2": "norm2",
            "self_attn_qkv": [
                f"context_embedder.token_refiner.refiner_blocks.{{}}.attn.to_{part}" for part in ("q", "k", "v")
            ],
            "self_attn_proj": "attn.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "adaLN_modulation.1": "norm_out.linear",
        }.items()
    },
}

HUNYUAN_IMAGE: dict[str, str | Sequence[str]] = {
    **REFINER,
    "img_in.proj": "x_embedder.proj",
    "byt5_in.layernorm": "context_embedder_2.norm",
    "byt5_in.fc1": "context_embedder_2.linear_1",
    "byt5_in.fc2": "context_embedder_2.linear_2",
    "byt5_in.fc3": "context_embedder_2.linear_3",
    "time_in.mlp.0": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_guidance_embed.timestep_embedder.linear_2",
    "time_r_in.mlp.0": "time_guidance_embed.timestep_embedder_r.linear_1",
    "time_r_in.mlp.2": "time_guidance_embed.timestep_embedder_r.linear_2",
    "guidance_in.mlp.0": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_guidance_embed.guidance_embedder.linear_2",
    "double_blocks.{}.img_mod.linear": "transformer_blocks.{}.norm1.linear",
    "double_blocks.{}.txt_mod.linear": "transformer_blocks.{}.norm1_context.linear",
    "double_blocks.{}.img_attn_q": "transformer_blocks.{}.attn.to_q",
    "double_blocks.{}.img_attn_k": "transformer_blocks.{}.attn.to_k",
    "double_blocks.{}.img_attn_v": "transformer_blocks.{}.attn.to_v",
    "double_blocks.{}.img_attn_q_norm": "transformer_blocks.{}.attn.norm_q",
    "double_blocks.{}.img_attn_k_norm": "transformer_blocks.{}.attn.norm_k",
    "double_blocks.{}.img_attn_proj": "transformer_blocks.{}.attn.to_out.0",
    "double_blocks.{}.img_mlp.fc1": "transformer_blocks.{}.ff.net.0.proj",
    "double_blocks.{}.img_mlp.fc2": "transformer_blocks.{}.ff.net.2",
    "double_blocks.{}.txt_attn_q": "transformer_blocks.{}.attn.add_q_proj",
    "double_blocks.{}.txt_attn_k": "transformer_blocks.{}.attn.add_k_proj",
    "double_blocks.{}.txt_attn_v": "transformer_blocks.{}.attn.add_v_proj",
    "double_blocks.{}.txt_attn_q_norm": "transformer_blocks.{}.attn.norm_added_q",
    "double_blocks.{}.txt_attn_k_norm": "transformer_blocks.{}.attn.norm_added_k",
    "double_blocks.{}.txt_attn_proj": "transformer_blocks.{}.attn.to_add_out",
    "double_blocks.{}.txt_mlp.fc1": "transformer_blocks.{}.ff_context.net.0.proj",
    "double_blocks.{}.txt_mlp.fc2": "transformer_blocks.{}.ff_context.net.2",
    "single_blocks.{}.modulation.linear": "single_transformer_blocks.{}.norm.linear",
    "single_blocks.{}.linear1_q": "single_transformer_blocks.{}.attn.to_q",
    "single_blocks.{}.linear1_k": "single_transformer_blocks.{}.attn.to_k",
    "single_blocks.{}.linear1_v": "single_transformer_blocks.{}.attn.to_v",
    "single_blocks.{}.linear1_mlp": "single_transformer_blocks.{}.proj_mlp",
    "single_blocks.{}.q_norm": "single_transformer_blocks.{}.attn.norm_q",
    "single_blocks.{}.k_norm": "single_transformer_blocks.{}.attn.norm_k",
    "single_blocks.{}.linear2.fc": "single_transformer_blocks.{}.proj_out",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": ["norm_out.linear:shift", "norm_out.linear:scale"],
}
HUNYUAN_COUNTS = {"double_blocks.": 20, "single_blocks.": 40, "txt_in.individual_token_refiner.blocks.": 2}


def test_hunyuan_image_as_diffusers_script_says() -> None:
    """scripts/convert_hunyuan_image_to_diffusers.py of diffusers, which starts from the published names."""
    naming = size_of("hunyuan-image").naming("transformer", "parallel")
    assert paths_of(naming) == written_out(HUNYUAN_IMAGE, HUNYUAN_COUNTS)


def test_hunyuan_video_15_as_diffusers_script_says() -> None:
    """scripts/convert_hunyuan_video1_5_to_diffusers.py of diffusers; blocks and refiner as in HunyuanImage."""
    naming = size_of("hunyuan-video-15").naming("transformer", "native")
    same = ("img_in.", "byt5_in.", "txt_in.", "double_blocks.", "final_layer.")
    kinds = {name: path for name, path in HUNYUAN_IMAGE.items() if name.startswith(same)} | {
        "time_in.mlp.0": "time_embed.timestep_embedder.linear_1",
        "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
        "vision_in.proj.0": "image_embedder.norm_in",
        "vision_in.proj.1": "image_embedder.linear_1",
        "vision_in.proj.3": "image_embedder.linear_2",
        "vision_in.proj.4": "image_embedder.norm_out",
        "cond_type_embedding": "cond_type_embed",
    }
    assert paths_of(naming) == written_out(kinds, {**HUNYUAN_COUNTS, "double_blocks.": 54})


def test_hunyuan_video_15_fused_as_musubi_tuner_does_for_comfyui() -> None:
    """convert_hunyuan_video_1_5_lora_to_comfy.py: q, k, v in this order, layers of the MLP by number, `lin`."""
    namings = size_of("hunyuan-video-15").namings("transformer")
    for stream in ("img", "txt"):
        start = f"double_blocks.53.{stream}"
        parts = [namings["native"][f"{start}_attn_{part}"][0] for part in "qkv"]
        assert list(namings["comfyui"][f"{start}_attn.qkv"]) == parts
        for ours, theirs in (("_mlp.0", "_mlp.fc1"), ("_mlp.2", "_mlp.fc2"), ("_mod.lin", "_mod.linear")):
            assert namings["comfyui"][start + ours] == namings["native"][start + theirs]


def test_hunyuan_image_fused_as_in_hunyuan_video() -> None:
    """sd-scripts and ComfyUI fuse q, k, v and the MLP in the order in which the published names follow each other."""
    namings = size_of("hunyuan-image").namings("transformer")
    fused = {name: targets for name, targets in paths_of(namings["native"]).items() if len(targets) > 1}
    for name, paths in fused.items():
        if name.endswith("_attn_qkv") and name.startswith("double_blocks."):
            parts = [f"{name.removesuffix('qkv')}{part}" for part in "qkv"]
        elif name.endswith("linear1"):
            parts = [f"{name}_{part}" for part in ("q", "k", "v", "mlp")]
        else:
            assert paths == paths_of(namings["parallel"])[name]
            continue
        assert paths == [path for part in parts for path in paths_of(namings["parallel"])[part]], name
    assert len(fused) == 2 * 20 + 40 + 2 + 1


COMFYUI_HUNYUAN = {
    "img_in.proj": "img_in.proj",
    "time_in.in_layer": "time_in.mlp.0",
    "guidance_in.out_layer": "guidance_in.mlp.2",
    "vector_in.in_layer": "vector_in.in_layer",
    "txt_in.t_embedder.out_layer": "txt_in.t_embedder.mlp.2",
    "txt_in.c_embedder.in_layer": "txt_in.c_embedder.linear_1",
    "txt_in.individual_token_refiner.blocks.1.self_attn.qkv": "txt_in.individual_token_refiner.blocks.1.self_attn_qkv",
    "txt_in.individual_token_refiner.blocks.1.mlp.2": "txt_in.individual_token_refiner.blocks.1.mlp.fc2",
    "double_blocks.0.img_attn.qkv": "double_blocks.0.img_attn_qkv",
    "double_blocks.0.txt_attn.proj": "double_blocks.0.txt_attn_proj",
    "double_blocks.0.img_attn.norm.key_norm": "double_blocks.0.img_attn_k_norm",
    "double_blocks.0.txt_mlp.0": "double_blocks.0.txt_mlp.fc1",
    "double_blocks.0.img_mod.lin": "double_blocks.0.img_mod.linear",
    "single_blocks.39.modulation.lin": "single_blocks.39.modulation.linear",
    "single_blocks.39.norm.query_norm": "single_blocks.39.q_norm",
    "single_blocks.39.linear1": "single_blocks.39.linear1",
    "final_layer.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
}


def test_hunyuan_names_of_comfyui() -> None:
    """As ComfyUI renames the original's keys when it loads a checkpoint."""
    namings = size_of("hunyuan-video").namings("transformer")
    assert all(namings["comfyui"][ours] == namings["native"][theirs] for ours, theirs in COMFYUI_HUNYUAN.items())
    key = namings["comfyui"].home(namings["comfyui"]["double_blocks.0.img_attn.norm.key_norm"][0]).tensor_key
    assert key == "double_blocks.0.img_attn.norm.key_norm.scale"
    assert SPEC.width == 3072  # written into diffusers' converters


COGVIDEOX: dict[str, str | Sequence[str]] = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "ofs_embed.0": "ofs_embedding.linear_1",
    "ofs_embed.2": "ofs_embedding.linear_2",
    "mixins.patch_embed.proj": "patch_embed.proj",
    "mixins.patch_embed.text_proj": "patch_embed.text_proj",
    "transformer.layers.{}.input_layernorm": "transformer_blocks.{}.norm1.norm",
    "transformer.layers.{}.attention.query_key_value": [
        f"transformer_blocks.{{}}.attn1.to_{part}" for part in ("q", "k", "v")
    ],
    "transformer.layers.{}.attention.dense": "transformer_blocks.{}.attn1.to_out.0",
    "transformer.layers.{}.post_attention_layernorm": "transformer_blocks.{}.norm2.norm",
    "transformer.layers.{}.mlp.dense_h_to_4h": "transformer_blocks.{}.ff.net.0.proj",
    "transformer.layers.{}.mlp.dense_4h_to_h": "transformer_blocks.{}.ff.net.2",
    "mixins.adaln_layer.query_layernorm_list.{}": "transformer_blocks.{}.attn1.norm_q",
    "mixins.adaln_layer.key_layernorm_list.{}": "transformer_blocks.{}.attn1.norm_k",
    "mixins.adaln_layer.adaLN_modulations.{}.1": [
        "transformer_blocks.{}.norm1.linear:video",
        "transformer_blocks.{}.norm2.linear:video",
        "transformer_blocks.{}.norm1.linear:text",
        "transformer_blocks.{}.norm2.linear:text",
    ],
    "transformer.final_layernorm": "norm_final",
    "mixins.final_layer.norm_final": "norm_out.norm",
    "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
    "mixins.final_layer.linear": "proj_out",
}


def test_cogvideox_as_diffusers_script_says() -> None:
    """scripts/convert_cogvideox_to_diffusers.py of diffusers."""
    model = size_of("cogvideox", "CogVideoX 1.5 5B image-to-video")
    counts = {"transformer.layers.": 42, "mixins.adaln_layer.": 42}
    assert paths_of(model.naming("transformer", "native")) == written_out(COGVIDEOX, counts)


def test_cogvideox_modulations() -> None:
    """Of the original's twelve chunks diffusers' first norm has 0 to 2 and 6 to 8, the second 3 to 5 and 9 to 11."""
    namings = size_of("cogvideox").namings("transformer")
    state = numbered_checkpoint(namings["native"], "")
    chunks = state["mixins.adaln_layer.adaLN_modulations.0.1.weight"].chunk(12)
    for norm, parts in (("norm1", (0, 1, 2, 6, 7, 8)), ("norm2", (3, 4, 5, 9, 10, 11))):
        targets = namings["diffusers"][f"transformer_blocks.0.{norm}.linear"]
        ours = torch.cat([rows_at_home(state, "", namings["native"], target) for target in targets])
        assert torch.equal(ours, torch.cat([chunks[part] for part in parts]))


def test_connectors_of_ltx2() -> None:
    """scripts/convert_ltx2_to_diffusers.py of diffusers."""
    for title, projections in (("LTX-2", [""]), ("LTX-2.3", ["video_", "audio_"])):
        namings = size_of("ltx2", title).namings("connectors")
        renamed = {}
        for name, targets in namings["native"].items():
            path = name.removeprefix("diffusion_model.").replace("transformer_1d_blocks", "transformer_blocks")
            for kind in ("video", "audio"):
                path = path.replace(f"{kind}_embeddings_connector", f"{kind}_connector")
            for kind in projections:
                name_of_text = "text_proj_in" if not kind else f"{kind}text_proj_in"
                path = path.replace(f"text_embedding_projection.{kind}aggregate_embed", name_of_text)
            renamed[path.replace("q_norm", "norm_q").replace("k_norm", "norm_k")] = targets
        assert renamed == dict(namings["diffusers"])
