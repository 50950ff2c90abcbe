"""Baking against diffusers: every weight is what `fuse_lora` makes of it, and what is loaded from the baked checkpoint
gives what the base gives with the LoRA loaded at run time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from safetensors.torch import load_file

from loratool.ops.bake_file import bake_file
from loratool.ops.bake_task import Options
from loratool.ops.convert_file import convert_file
from loratool.ops.inputs import Asked
from tests.oracles.models import (
    Weights,
    complaints,
    components,
    kohya_file,
    one_thread,
    parameters,
    pipeline,
    saved,
    trained,
)
from tests.oracles.single_files import OTHERS, absent, from_single_file, single_file

STRENGTH, SECOND = 0.8, -0.45
Used = tuple[str, float]

SIZE = 0.05
"""Updates of about the size of the weights."""

CHECKPOINTS = {
    "sd15": ("ldm", "folder", "shards"),
    "sdxl": ("sgm", "folder", "shards"),
    "flux": ("bfl", "comfyui", "folder", "shards"),
}
"""Kinds of checkpoints: those of the tables for single files; `comfyui` is BFL's with `model.diffusion_model.`."""

CHOSEN = {
    "sd15": r"",
    "sdxl": r"text_projection|te[12]_\w+_layers_(0|31)_|_(in|out)put_blocks_[148]_\w*(_emb_|_0_attn2|skip|layers_2)"
    r"|_blocks_[35]_\w+(op|conv)$|middle_block_1_transformer_blocks_9|label_emb|unet_out_",
    "flux": r"",
}
"""Which Linears and convolutions kohya's file has: each of SDXL's 1000 would cost PEFT its time."""

FOLDERS = ("folder", "shards")
SHARD = {"sd15": "8MB", "sdxl": "4MB", "flux": "200KB"}
EVERY = [(architecture, kind) for architecture, kinds in CHECKPOINTS.items() for kind in kinds]
ALONE = [(architecture, kind, "kohya") for architecture, kind in EVERY]
ALONE += [(a, kind, "diffusers") for a, kind in EVERY if a != "sdxl" and kind != "shards"]
"""Checkpoints and the one adapter that is baked into them."""

each_checkpoint = pytest.mark.parametrize(("architecture", "kind"), EVERY)
each_architecture = pytest.mark.parametrize("architecture", list(CHECKPOINTS))

ENCODER = {"target_modules": ["q_proj", "v_proj", "fc1"], "r": 3, "lora_alpha": 5}
UNET = {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "r": 4, "lora_alpha": 6, "rank_pattern": {"to_k": 2}}
TRANSFORMER = {
    "target_modules": ["to_q", "to_v", "add_k_proj", "proj_mlp", "norm1.linear"],
    "r": 4,
    "lora_alpha": 3,
    "alpha_pattern": {"to_q": 1},
}
TRAININGS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "sd15": {"unet": UNET, "text_encoder": ENCODER},
    "sdxl": {
        "unet": {**UNET, "target_modules": ["attn2.to_q", "attn2.to_k"], "use_rslora": True},
        "text_encoder": ENCODER,
        "text_encoder_2": {**ENCODER, "target_modules": ["q_proj", "v_proj", "text_projection"]},
    },
    "flux": {"transformer": TRANSFORMER, "text_encoder": ENCODER},
}


@dataclass(frozen=True)
class Lora:
    """One adapter: the file that is baked, and that which diffusers loads."""

    baked: Path
    loaded: Path


@dataclass(frozen=True)
class RunTime:
    """What diffusers makes of adapters: the picture with them loaded, and then every parameter with them fused."""

    picture: torch.Tensor
    weights: Weights
    encoder: Any


class Model:
    """One small model, its checkpoints and its adapters, each made when it is first asked for."""

    def __init__(self, architecture: str, folder: Path) -> None:
        self.architecture, self.folder = architecture, folder
        self.checkpoint = cache(self._checkpoint)
        self.at_run_time = cache(self._at_run_time)
        self.baked = cache(self._baked)

    @cached_property
    def base(self) -> Any:
        """The base, which nobody may change."""
        return pipeline(self.architecture, zero=False)

    @cached_property
    def parameters(self) -> Weights:
        """Those of the base."""
        return parameters(self.base)

    @cached_property
    def picture(self) -> torch.Tensor:
        """What the base makes."""
        return generated(self.base)

    def _checkpoint(self, kind: str) -> Path:
        """The base as a checkpoint."""
        path = self.folder / kind
        if kind not in FOLDERS:
            return single_file(self.base, self.architecture, kind, path.with_suffix(".safetensors"))
        size = {"max_shard_size": SHARD[self.architecture]} if kind == "shards" else {}
        with complaints():
            self.base.save_pretrained(path, **size)
        return path

    @cached_property
    def loras(self) -> Mapping[str, Lora]:
        """`kohya`: fused where kohya fuses; `dora`: the same with magnitudes; `diffusers`: what diffusers writes."""
        source, loaded = self.folder / "kohya.safetensors", self.folder / "loaded.safetensors"
        chosen = re.compile(CHOSEN[self.architecture])
        options: dict[str, Any] = {"only": chosen.search, "ranks": (2, 4), "alphas": (1.0, 3.0), "size": SIZE}
        kohya_file(source, self.architecture, **options)
        convert_file(source, "diffusers", loaded, architecture=self.architecture)
        pipe, configs = pipeline(self.architecture), TRAININGS[self.architecture]
        trained(pipe, configs, seed=1)
        for component in configs:
            for name, parameter in getattr(pipe, component).named_parameters():
                if ".lora_B." in name:
                    parameter.data *= 10 * SIZE
        own = saved(pipe, self.folder / "own", configs, metadata=True)
        dora, as_dora = self.folder / "dora.safetensors", self.folder / "dora-loaded.safetensors"
        kohya_file(dora, self.architecture, **options, dora=True, seed=2)
        convert_file(dora, "diffusers", as_dora, architecture=self.architecture)
        return {"kohya": Lora(source, loaded), "diffusers": Lora(own, own), "dora": Lora(dora, as_dora)}

    def _at_run_time(self, *used: Used) -> RunTime:
        """The base with adapters at these strengths in diffusers."""
        pipe, names = pipeline(self.architecture, zero=False), [name for name, _ in used]
        with complaints(), one_thread():
            for name in names:
                pipe.load_lora_weights(str(self.loras[name].loaded), adapter_name=name)
            pipe.set_adapters(names, [strength for _, strength in used])
            picture = generated(pipe)
            pipe.fuse_lora(components=components(pipe), adapter_names=names)
            return RunTime(picture, parameters(pipe), pipe.text_encoder)

    def _baked(self, kind: str, *used: Used) -> Path:
        """A checkpoint with adapters baked into it; returns where it is."""
        path = self.folder / "-".join(["baked", kind, *(name for name, _ in used)])
        path = path if kind in FOLDERS else path.with_suffix(".safetensors")
        asked = [Asked(str(self.loras[name].baked), strength) for name, strength in used]
        report = bake_file(self.checkpoint(kind), asked, path, Options(allow_unmatched=kind == "bfl"))
        # BFL's file is a transformer alone.
        assert all(kind == "bfl" and "text_encoder" in one.reason for one in report.unmatched)
        return path

    def read(self, kind: str, path: Path, encoder: Any = None) -> Any:
        """The pipeline that diffusers loads from a checkpoint, `encoder` beside a bare transformer."""
        base = self.base
        if kind in FOLDERS:
            with complaints():
                return type(base).from_pretrained(path, local_files_only=True, **absent(base))
        given = {"text_encoder_2": None} if self.architecture == "flux" else {}
        if kind == "bfl":
            given["text_encoder"] = encoder or base.text_encoder
        return from_single_file(base, path, self.checkpoint("folder"), **given)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """The small models by architecture."""
    made: dict[str, Model] = {}

    def model(architecture: str) -> Model:
        if architecture not in made:
            made[architecture] = Model(architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return model


def assert_equal(found: Weights, expected: Weights, base: Weights) -> None:
    """The same parameters but for float32's rounding; those that nothing was added to bit for bit."""
    assert found.keys() == expected.keys()
    for key, wanted in expected.items():
        if torch.equal(wanted, base[key]):
            assert torch.equal(found[key], wanted), f"{'.'.join(key)} was touched"
            continue
        error = (found[key].double() - wanted.double()).abs().max() / wanted.double().abs().max()
        assert error <= 5e-7, f"{'.'.join(key)}: differs by {error:.2g}"


def held(kind: str, weights: Weights, base: Weights) -> Weights:
    """`weights` where a kind of checkpoint holds them, the base's elsewhere: BFL's file is a transformer alone."""
    return {key: one if kind != "bfl" or key[0] == "transformer" else base[key] for key, one in weights.items()}


@each_checkpoint
def test_diffusers_reads_the_base_to_its_very_weights(
    architecture: str, kind: str, models: Callable[[str], Model]
) -> None:
    """Nothing is baked yet: the checkpoints of these tests are what they are said to be."""
    model = models(architecture)
    path = model.checkpoint(kind)
    found, expected = parameters(model.read(kind, path)), model.parameters
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    if kind == "shards":
        assert len(list(path.rglob("*-of-*.safetensors"))) > 3


@pytest.mark.parametrize(("architecture", "kind", "lora"), ALONE)
def test_every_weight_is_what_diffusers_fuses_and_the_picture_that_at_run_time(
    architecture: str, kind: str, lora: str, models: Callable[[str], Model]
) -> None:
    model = models(architecture)
    base = model.parameters
    path = model.baked(kind, (lora, STRENGTH))
    expected = model.at_run_time((lora, STRENGTH))
    pipe = model.read(kind, path, expected.encoder)
    assert_equal(held(kind, parameters(pipe), base), held(kind, expected.weights, base), base)
    assert_rest_is_kept(model.checkpoint(kind), path)
    assert distance(model.picture, expected.picture) > 0.02
    assert distance(generated(pipe), expected.picture) < 2e-5


@each_architecture
def test_two_adapters_are_what_diffusers_makes_of_two(architecture: str, models: Callable[[str], Model]) -> None:
    model, kind = models(architecture), CHECKPOINTS[architecture][0]
    used, base = (("kohya", STRENGTH), ("diffusers", SECOND)), model.parameters
    expected = model.at_run_time(*used)
    pipe = model.read(kind, model.baked(kind, *used), expected.encoder)
    assert_equal(held(kind, parameters(pipe), base), held(kind, expected.weights, base), base)
    assert distance(generated(pipe), expected.picture) < 2e-5


@pytest.mark.parametrize(("architecture", "kind"), [("sd15", "ldm"), ("flux", "bfl"), ("flux", "folder")])
def test_dora_is_what_diffusers_makes_of_it(architecture: str, kind: str, models: Callable[[str], Model]) -> None:
    """Magnitudes over fused q, k, v in fused weights and in parts of it; at strength 1, as peft has another idea of
    less: it scales the update inside the norm, not the change."""
    model = models(architecture)
    base = model.parameters
    expected = model.at_run_time(("dora", 1.0))
    pipe = model.read(kind, model.baked(kind, ("dora", 1.0)), expected.encoder)
    assert_equal(held(kind, parameters(pipe), base), held(kind, expected.weights, base), base)
    assert distance(generated(pipe), expected.picture) < 2e-5


def assert_rest_is_kept(base: Path, baked: Path) -> None:
    """What is no weight of the model is there, the same: other tensors of a file, other files of a folder."""
    if base.is_file():
        before, after = load_file(base), load_file(baked)
        assert list(before) == list(after)
        others = [key for key in before if any(key in rest for rest in OTHERS.values())]
        assert all(torch.equal(before[key], after[key]) for key in others)
        assert {key: one.dtype for key, one in before.items()} == {key: one.dtype for key, one in after.items()}
        return
    files = {path.relative_to(base) for path in base.rglob("*") if path.is_file()}
    assert files == {path.relative_to(baked) for path in baked.rglob("*") if path.is_file()}
    for name in files:
        if name.suffix != ".safetensors":
            assert (base / name).read_bytes() == (baked / name).read_bytes(), name


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative distance of two pictures."""
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def generated(pipe: Any) -> torch.Tensor:
    """What a pipeline makes of one prompt and one noise, in two steps; the text encoders take part."""
    with one_thread(), complaints():
        return _generated(pipe)


def _generated(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    tokens = torch.tensor([[1, *range(5, 18), 2, 2]])
    noise = torch.Generator().manual_seed(3)
    encoded = pipe.text_encoder(tokens)
    common = {"num_inference_steps": 2, "output_type": "latent"}
    if hasattr(pipe, "transformer"):
        return pipe(
            prompt_embeds=torch.randn(1, 6, 40, generator=noise),
            pooled_prompt_embeds=encoded.pooler_output,
            latents=torch.randn(1, 16, 16, generator=noise),
            height=64,
            width=64,
            **common,
        ).images
    prompt = {"prompt_embeds": encoded.last_hidden_state, "negative_prompt_embeds": -encoded.last_hidden_state}
    if hasattr(pipe, "text_encoder_2"):
        second = pipe.text_encoder_2(tokens, output_hidden_states=True)
        embedded = torch.cat([encoded.last_hidden_state, second.hidden_states[-2]], -1)
        prompt = {"prompt_embeds": embedded, "negative_prompt_embeds": -embedded}
        prompt |= {"pooled_prompt_embeds": second.text_embeds, "negative_pooled_prompt_embeds": -second.text_embeds}
    latents = torch.randn(1, 4, 8, 8, generator=noise)
    return pipe(**prompt, latents=latents, guidance_scale=3.0, **common).images
