"""Names and row orders of video models and their kin against diffusers' own converters, for checkpoints and for LoRAs.

As in `test_converters`: every row a different number, and what a converter makes of it must be the rows that our
canonical naming says. Where diffusers' library has no converter, a second list, written out here, takes its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from loratool.architectures.hunyuan_video import SPEC
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
        for title in ("", "Wan 2.1/2.2 14B text-to-video", "Wan 2.2 5B", "Wan 2.1 1.3B")
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


# -- what the library has no converter for: written out a second time -----------------------------------------------


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
