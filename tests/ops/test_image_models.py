"""Conversion of LoRAs for image models, there and back; merges of sizes; and which model and size a file is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratool.core.adapter import Bundle
from loratool.core.architecture import Architecture
from loratool.core.detect import detect
from loratool.core.errors import FormatError
from loratool.core.registry import architectures, layouts
from loratool.core.tensor import Held, LazyTensor
from loratool.files.bundle import read_bundle, write_bundle
from loratool.merging.concat import METHOD as CONCAT
from loratool.ops.convert_file import convert_file
from loratool.ops.inputs import Asked
from loratool.ops.merge_files import merge_files
from loratool.ops.open import open_adapter
from tests.builders import contents, pair
from tests.ops.test_video_models import SUFFIXES, assert_resolved, trained

MODELS = (
    "sd21",
    "sdxl-refiner",
    "sd3",
    "chroma",
    "flux2",
    "lumina2",
    "z-image",
    "qwen-image",
    "pixart",
    "auraflow",
    "sana",
    "hidream",
)
PAIRS = [
    (name, before, after)
    for name in MODELS
    for before in ("kohya", "comfyui", "diffusers")
    for after in ("kohya", "comfyui", "diffusers", "peft")
    if before != after
]


@pytest.mark.parametrize(("identifier", "before", "after"), PAIRS, ids=["-".join(one) for one in PAIRS])
def test_there_and_back(tmp_path: Path, identifier: str, before: str, after: str) -> None:
    """The update of every weight is the same bit for bit, and converting back gives the file back."""
    model = architectures()[identifier]
    first, middle, last = (str(tmp_path / name) for name in ("a.safetensors", "b", "c.safetensors"))
    middle = middle if layouts()[after].folder else f"{middle}.safetensors"
    write_bundle(first, trained(model, before, after))
    there = convert_file(first, after, middle, architecture=identifier)
    assert there.proof is not None and there.proof.worst == 0.0 and there.proof.bitwise == there.proof.compared
    assert convert_file(middle, before, last, architecture=identifier).returned
    assert contents(read_bundle(last)) == contents(read_bundle(first))


@pytest.mark.parametrize("identifier", [*MODELS, "flux"])
def test_voices_that_are_read_name_what_they_should(identifier: str) -> None:
    for model in architectures()[identifier].sizes:
        for layout, components in model.reads.items():
            separator = layouts()[layout].separator
            resolve = model.resolver(layouts()[layout].voices(model), separator)
            for component, voices in components.items():
                for voice in voices:
                    assert_resolved(model, component, voice, separator, resolve)


# -- which model, and which size -------------------------------------------------------------------------------------


def whole(model: Architecture, layout: str) -> Bundle:
    """A LoRA on every linear layer of the first component, without a header."""
    component, voice = next(iter(model.writes[layout].items()))
    down, up = SUFFIXES[layout]
    tensors: dict[str, LazyTensor] = {}
    for name, targets in model.naming(component, voice.naming).items():
        if len(targets[0].shape) == 2:
            stem = voice.prefix + name.replace(".", layouts()[layout].separator)
            rows = sum(target.rows for target in targets)
            tensors[stem + down] = LazyTensor((4, targets[0].shape[1]), "F32", Held(b""))
            tensors[stem + up] = LazyTensor((rows, 4), "F32", Held(b""))
    return Bundle(tensors)


SAME_LINEARS = {
    "FLUX.1 schnell": "FLUX.1",  # it lacks an embedder
    "Sana 1.5 1.6B": "Sana 1.6B",  # norms apart
}
"""Sizes whose linear layers are all those of a size before them."""

SIZES = [
    (size, layout)
    for name in ("sd15", "sdxl", "flux", *MODELS)
    for size in architectures()[name].sizes
    for layout in SUFFIXES
]


@pytest.mark.parametrize(("size", "layout"), SIZES, ids=[f"{size.title}-{layout}" for size, layout in SIZES])
def test_every_size_is_recognised(size: Architecture, layout: str) -> None:
    """With all tables present and no header, by names and shapes alone."""
    found = detect(whole(size, layout))
    assert found is not None
    assert (found.best.layout.id, found.best.architecture.id, found.tie) == (layout, size.id, ())
    assert found.best.architecture.title == SAME_LINEARS.get(size.title, size.title)
    assert found.best.resolved == found.best.fitting == 1


def test_the_header_tells_kin_apart() -> None:
    """Chroma's attention is Flux' own."""
    tensors = {
        key: tensor for key, tensor in whole(architectures()["chroma"], "kohya").tensors.items() if "attn" in key
    }
    plain = detect(Bundle(tensors))
    told = detect(Bundle(tensors, {"ss_base_model_version": "chroma"}))
    assert plain is not None and told is not None
    assert (plain.best.architecture.id, "Chroma" in plain.others) == ("flux", True)
    assert (told.best.architecture.id, told.others) == ("chroma", ())


# -- merges of sizes ---------------------------------------------------------------------------------------------------


def lora(path: Path, stem: str, shape: tuple[int, int], seed: int) -> Asked:
    factors = pair(shape, 2, "F32", seed)
    tensors = {f"{stem}.lora_A.weight": factors["down"], f"{stem}.lora_B.weight": factors["up"]}
    write_bundle(str(path), Bundle(tensors))
    return Asked(str(path))


def test_sizes_that_share_their_targets_are_merged(tmp_path: Path) -> None:
    """A LoRA of Fill, told by its wide embedder, and one of any size, in both orders."""
    fill = lora(tmp_path / "fill.safetensors", "transformer.x_embedder", (3072, 384), 1)
    block = "transformer.single_transformer_blocks.0.norm.linear"
    dev = lora(tmp_path / "dev.safetensors", block, (9216, 3072), 2)
    for number, asked in enumerate(([fill, dev], [dev, fill])):
        out = tmp_path / f"{number}.safetensors"
        report = merge_files(asked, out, CONCAT, to="kohya", architecture="flux")
        assert (report.architecture, report.architecture_title) == ("flux", "FLUX.1 Fill")
        assert {module.targets[0].path for module in open_adapter(out).modules} == {
            "x_embedder",
            "single_transformer_blocks.0.norm.linear",
        }


def test_sizes_that_differ_are_not_merged(tmp_path: Path) -> None:
    stem = "transformer.transformer_blocks.0.norm1_context.linear"
    medium = lora(tmp_path / "medium.safetensors", stem, (9216, 1536), 1)
    large = lora(tmp_path / "large.safetensors", stem, (14592, 2432), 2)
    with pytest.raises(FormatError, match=r"Stable Diffusion 3.5 Large, .* Stable Diffusion 3 Medium"):
        merge_files([medium, large], tmp_path / "out.safetensors", CONCAT, architecture="sd3")


@pytest.mark.parametrize("wrapper", ["", "model.", "model.model."])
def test_a_language_model_is_no_encoder_of_an_image_model(wrapper: str) -> None:
    """Tables with Llama or Qwen as an encoder must not take the PEFT files of these models."""
    tensors: dict[str, LazyTensor] = {}
    for layer in range(32):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            stem = f"base_model.model.{wrapper}layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = LazyTensor((8, 4096), "BF16", Held(b""))
            tensors[f"{stem}.lora_B.weight"] = LazyTensor((4096, 8), "BF16", Held(b""))
    found = detect(Bundle(tensors))
    assert found is not None and (found.best.architecture.id, found.tie) == ("generic", ())
