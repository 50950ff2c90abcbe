"""Conversion of LoRAs for video models and their kin: there and back, and the files that users really had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loratool.core.adapter import Bundle
from loratool.core.architecture import Architecture, Voice
from loratool.core.naming import kind
from loratool.core.registry import architectures, layouts
from loratool.core.tensor import LazyTensor
from loratool.files.bundle import read_bundle, write_bundle
from loratool.ops.convert_file import convert_file
from loratool.ops.open import open_adapter
from tests.builders import contents, pair, zero_file

DATA = Path(__file__).parents[2].parent / "shared" / "data"
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
PAIRS = [
    (name, before, after)
    for name in MODELS
    for before in ("kohya", "comfyui", "diffusers")
    for after in ("kohya", "comfyui", "diffusers", "peft")
    if before != after and {before, after} <= architectures()[name].writes.keys()
]
SUFFIXES = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "comfyui": (".lora_A.weight", ".lora_B.weight"),
    "diffusers": (".lora_A.weight", ".lora_B.weight"),
}


def trained(model: Architecture, layout: str, other: str) -> Bundle:
    """A LoRA of rank 2 with one module of every kind that both layouts have a name for, the first of its kind."""
    tensors: dict[str, LazyTensor] = {}
    seen: set[str] = set()
    down, up = SUFFIXES[layout]
    for component, voice in model.writes[layout].items():
        if component not in model.writes[other]:
            continue
        for name, targets in model.naming(component, voice.naming).items():
            if len(targets[0].shape) < 2 or "embed_tokens" in name or f"{component} {kind(name)}" in seen:
                continue
            seen.add(f"{component} {kind(name)}")
            stem = voice.prefix + (name.replace(".", "_") if layout == "kohya" else name)
            rows = sum(target.rows for target in targets)
            factors = pair((rows, *targets[0].shape[1:]), 2, "BF16", len(seen))
            tensors |= {stem + down: factors["down"], stem + up: factors["up"]}
            if layout == "kohya":
                tensors[f"{stem}.alpha"] = LazyTensor.scalar(1.0, "BF16")
    return Bundle(tensors, {"modelspec.architecture": model.facts.get("modelspec.architecture", "")})


@pytest.mark.parametrize(("identifier", "before", "after"), PAIRS, ids=["-".join(one) for one in PAIRS])
def test_there_and_back(tmp_path: Path, identifier: str, before: str, after: str) -> None:
    """The update of every weight is the same bit for bit, and converting back gives the file back."""
    model = architectures()[identifier]
    original = trained(model, before, after)
    first, middle, last = (str(tmp_path / name) for name in ("a.safetensors", "b", "c.safetensors"))
    middle = middle if layouts()[after].folder else f"{middle}.safetensors"
    write_bundle(first, original)
    there = convert_file(first, after, middle, architecture=identifier)
    assert there.proof is not None and there.proof.worst == 0.0 and there.proof.bitwise == there.proof.compared
    assert there.architecture == identifier
    back = convert_file(middle, before, last, architecture=identifier)
    assert back.returned
    assert contents(read_bundle(last)) == contents(read_bundle(first))


def test_hunyuan_fused_rows_go_where_they_belong(tmp_path: Path) -> None:
    """linear1 of a single block in diffusers: q, k, v and the MLP share one down, the ups are rows of the fused one."""
    model = architectures()["hunyuan-video"]
    factors = pair((3 * 3072 + 12288, 3072), 2, "F32", 1)
    stem = "lora_unet_single_blocks_3_linear1"
    down, up = SUFFIXES["kohya"]
    bundle = Bundle({stem + down: factors["down"], stem + up: factors["up"]}, {})
    write_bundle(str(tmp_path / "a.safetensors"), bundle)
    out = tmp_path / "b.safetensors"
    convert_file(tmp_path / "a.safetensors", "diffusers", out, architecture=model)
    written = read_bundle(str(out)).tensors
    rows = factors["up"].load()
    path = "transformer.single_transformer_blocks.3"
    for name, start, stop in (("attn.to_k", 3072, 6144), ("proj_mlp", 9216, 21504)):
        assert written[f"{path}.{name}.lora_B.weight"].load().equal(rows[start:stop])
        assert written[f"{path}.{name}.lora_A.weight"].load().equal(factors["down"].load())


@pytest.mark.parametrize(("name", "layout", "modules"), [("anima-kohya", "kohya", 11), ("anima-peft", "comfyui", 6)])
def test_anima_files_that_users_had(tmp_path: Path, name: str, layout: str, modules: int) -> None:
    keys = DATA / "keys" / f"{name}.json"
    if not keys.is_file():
        pytest.skip(f"{keys.name} is not here")
    file = zero_file(tmp_path / "a.safetensors", json.loads(keys.read_text(encoding="utf-8")))
    adapter = open_adapter(file)
    assert (adapter.layout, adapter.architecture.id, len(adapter.modules)) == (layout, "anima", modules)
    assert not adapter.extras
    for to in ("diffusers", "comfyui", "kohya"):
        if to == layout:
            continue
        there = convert_file(file, to, tmp_path / f"{to}.safetensors", architecture="anima")
        assert (there.modules_before, there.modules_after) == (modules, modules)
        again = open_adapter(tmp_path / f"{to}.safetensors", architecture="anima")
        assert {m.targets for m in again.modules} == {m.targets for m in adapter.modules}
        out = tmp_path / f"{to}-back.safetensors"
        back = convert_file(tmp_path / f"{to}.safetensors", layout, out, architecture="anima")
        assert back.returned
        assert contents(read_bundle(str(out))) == contents(read_bundle(str(file)))


def test_two_experts_of_wan_in_one_file(tmp_path: Path) -> None:
    """A diffusers file may hold both; no other layout has a name for the second, and says so."""
    model = architectures()["wan"]
    tensors: dict[str, LazyTensor] = {}
    for prefix in ("transformer.", "transformer_2."):
        factors = pair((5120, 5120), 2, "BF16", len(prefix))
        stem = f"{prefix}blocks.0.attn1.to_q"
        tensors |= {f"{stem}.lora_A.weight": factors["down"], f"{stem}.lora_B.weight": factors["up"]}
    write_bundle(str(tmp_path / "a.safetensors"), Bundle(tensors, {}))
    adapter = open_adapter(tmp_path / "a.safetensors")
    assert (adapter.architecture.id, adapter.components) == (model.id, ("transformer", "transformer_2"))
    with pytest.raises(Exception, match="no spelling for transformer_2"):
        convert_file(tmp_path / "a.safetensors", "comfyui", tmp_path / "b.safetensors")


def test_voices_that_are_read_name_what_they_should() -> None:
    """Every voice that is only read resolves every name of its naming to that naming's own targets."""
    for identifier in MODELS:
        model = architectures()[identifier]
        for layout, components in model.reads.items():
            separator = layouts()[layout].separator
            resolve = model.resolver(layouts()[layout].voices(model), separator)
            for component, voices in components.items():
                for voice in voices:
                    assert_resolved(model, component, voice, separator, resolve)


def assert_resolved(model: Architecture, component: str, voice: Voice, separator: str, resolve) -> None:  # type: ignore[no-untyped-def]
    for name, targets in model.naming(component, voice.naming).items():
        spoken = resolve(voice.prefix + name.replace(".", separator))
        assert any(said.targets == targets for said in spoken), (model.id, voice, name)
