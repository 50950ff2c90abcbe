"""Models that share names and shapes: the one whose blocks end where the file's do, the older one, or an honest tie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from loratool.core import detect as detect_module
from loratool.core.adapter import Bundle
from loratool.core.architecture import Architecture
from loratool.core.detect import Detection, detect
from loratool.core.registry import architectures
from loratool.core.tensor import Held, LazyTensor

PEFT_PAIR = (".lora_A.weight", ".lora_B.weight")
KOHYA_PAIR = (".lora_down.weight", ".lora_up.weight")


def empty(shape: tuple[int, ...]) -> LazyTensor:
    return LazyTensor(shape, "F32", Held(b""))


def lora(
    size: Architecture, layout: str, keep: Callable[[str], bool], metadata: Mapping[str, str] | None = None
) -> Bundle:
    """A LoRA of one size of a model, as a layout writes it, for the canonical or native names that `keep` wants."""
    tensors: dict[str, LazyTensor] = {}
    for component, voice in size.writes[layout].items():
        for name, targets in size.naming(component, voice.naming).items():
            if len(targets[0].shape) != 2 or not keep(name):
                continue
            stem = voice.prefix + (name.replace(".", "_") if layout == "kohya" else name)
            down, up = KOHYA_PAIR if layout == "kohya" else PEFT_PAIR
            tensors[stem + down] = empty((4, targets[0].shape[1]))
            tensors[stem + up] = empty((sum(target.rows for target in targets), 4))
    return Bundle(tensors, dict(metadata or {}))


def found(bundle: Bundle) -> Detection:
    detection = detect(bundle)
    assert detection is not None
    return detection


def blocks_only(name: str) -> bool:
    return "blocks." in name


def attention(name: str) -> bool:
    return ".attn" in name or "_attn" in name


MODELS = (
    "wan",
    "hunyuan-video",
    "hunyuan-video-15",
    "hunyuan-image",
    "ltx-video",
    "ltx2",
    "cogvideox",
    "cosmos",
    "cosmos1",
    "anima",
    "krea2",
)
SIZES = [
    (name, size.title, layout) for name in MODELS for size in architectures()[name].sizes for layout in size.writes
]


@pytest.mark.parametrize(("identifier", "title", "layout"), SIZES, ids=[f"{t}-{layout}" for _, t, layout in SIZES])
def test_every_size_in_every_layout(identifier: str, title: str, layout: str) -> None:
    size = next(one for one in architectures()[identifier].sizes if one.title == title)
    detection = found(lora(size, layout, lambda name: True))
    best = detection.best
    if title == "Cosmos-Predict2 2B text-to-image":
        assert best.architecture.title == "Anima"  # the very same transformer: nothing can tell
        return
    if layout != "comfyui" and title in (
        "Cosmos 1 14B",
        "Cosmos 1 14B text-to-world",
        "Cosmos-Predict2 14B text-to-image",
    ):
        assert set(detection.tie) == {"cosmos", "cosmos1"}  # in diffusers' names 1 and 2 are the same
        return
    assert (best.architecture.id, best.layout.id, best.resolved) == (identifier, layout, 1.0)
    assert best.fitting == 1.0


@pytest.mark.parametrize(
    ("identifier", "title", "blocks"),
    [
        ("wan", "Wan 2.1/2.2 14B", 40),
        ("wan", "Wan 2.2 5B", 30),
        ("wan", "Wan 2.1 1.3B", 30),
        ("ltx-video", "LTX-Video 2B", 28),
    ],
)
def test_sizes_are_told_apart_by_shape(identifier: str, title: str, blocks: int) -> None:
    size = next(one for one in architectures()[identifier].sizes if one.title == title)
    best = found(lora(size, "comfyui", lambda name: blocks_only(name) and "k_img" not in name)).best
    assert best.architecture.title == title
    assert best.architecture.blocks is not None
    assert len(best.architecture.blocks.lists[0]) == blocks


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("identifier", ["flux", "hunyuan-video"])
def test_flux_and_hunyuan_video_by_how_many_blocks_there_are(identifier: str, layout: str) -> None:
    """Both are 3072 wide, and the blocks of both have the same names; 19 and 38 blocks against 20 and 40."""
    keep: Callable[[str], bool] = attention if layout != "kohya" else lambda name: "attn" in name or "linear" in name
    assert found(lora(architectures()[identifier], layout, keep)).best.architecture.id == identifier


def test_what_is_in_both_is_a_tie() -> None:
    bundle = lora(architectures()["flux"], "diffusers", lambda name: name.startswith("transformer_blocks.7.attn"))
    assert set(found(bundle).tie) >= {"flux", "hunyuan-video"}


def test_the_header_decides() -> None:
    facts = architectures()["hunyuan-video"].facts
    bundle = lora(
        architectures()["flux"], "diffusers", lambda name: name.startswith("transformer_blocks.7.attn"), facts
    )
    assert found(bundle).best.architecture.id == "hunyuan-video"


def test_what_anima_and_cosmos_share_is_taken_for_anima() -> None:
    detection = found(lora(architectures()["anima"], "comfyui", lambda name: ".mlp.layer" in name))
    assert detection.best.architecture.id == "anima"
    assert detection.others == ("Cosmos-Predict2/2.5 2B",)
    with_adapter = found(lora(architectures()["anima"], "comfyui", blocks_only))
    assert (with_adapter.best.architecture.id, with_adapter.others) == ("anima", ())


def test_what_ltx_video_and_ltx_2_share_is_taken_for_ltx_video() -> None:
    detection = found(
        lora(
            architectures()["ltx2"],
            "comfyui",
            lambda name: name.startswith("transformer_blocks.") and (".attn1." in name or ".attn2." in name),
        )
    )
    assert detection.best.architecture.id == "ltx-video"
    assert detection.others == ("LTX-2",)
    with_sound = found(lora(architectures()["ltx2"], "comfyui", lambda name: "attn" in name))
    assert with_sound.best.architecture.id == "ltx2"


def test_wan_fun_and_diffsynth(tmp_path: Path) -> None:
    """VideoX-Fun's second underscore; DiffSynth-Studio's bare names."""
    own = lora(architectures()["wan"], "kohya", blocks_only)
    fun = Bundle({key.replace("lora_unet_", "lora_unet__"): tensor for key, tensor in own.tensors.items()}, {})
    assert (found(fun).best.architecture.id, found(fun).best.layout.id) == ("wan", "kohya")
    own = lora(architectures()["wan"], "comfyui", blocks_only)
    bare = Bundle({key.removeprefix("diffusion_model."): tensor for key, tensor in own.tensors.items()}, {})
    assert (found(bare).best.architecture.id, found(bare).best.layout.id) == ("wan", "native")


EVERY = [
    (size, layout)
    for table in architectures().values()
    if not table.open
    for size in table.sizes
    for layout in size.writes
    if layout != "xlabs"
]


def told(bundle: Bundle) -> tuple[object, ...]:
    detection = found(bundle)
    best = detection.best
    return best.layout.id, best.architecture.title, best.score, detection.tie, detection.others


@pytest.mark.parametrize(("size", "layout"), EVERY, ids=[f"{size.title}-{layout}" for size, layout in EVERY])
@pytest.mark.parametrize("keep", [lambda name: True, attention], ids=["all", "attention"])
def test_what_the_header_names_is_found_as_among_all_models(
    size: Architecture, layout: str, keep: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    kin = architectures().get(size.kin)
    headers = [size.facts, *([kin.facts] if kin else []), architectures()["flux"].facts, {"software": '{"name": "x"}'}]
    bundles = [lora(size, layout, keep, header) for header in headers]
    if not bundles[0].tensors:
        pytest.skip("no such modules")
    quick = [told(bundle) for bundle in bundles]
    monkeypatch.setattr(detect_module, "_of_the_named", lambda *asked: [])
    assert quick == [told(bundle) for bundle in bundles]


def test_a_model_that_the_header_names_is_compared_with_no_other() -> None:
    chroma = architectures()["chroma"]
    assert {"chroma", "flux"} <= {c.architecture.id for c in found(lora(chroma, "kohya", attention)).candidates}
    assert {c.architecture.id for c in found(lora(chroma, "kohya", attention, chroma.facts)).candidates} == {"chroma"}
