"""Undo: the base again, bit for bit, whatever its dtype, whatever was baked, and whichever device baked it."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loratool.core.errors import FormatError, LoratoolError, UsageError
from loratool.core.module import Module
from loratool.core.registry import families
from loratool.core.target import Target
from loratool.core.tensor import LazyTensor
from loratool.ops.bake_file import bake_file
from loratool.ops.bake_task import Options
from loratool.ops.frames import corrected, frames_in, packed
from loratool.ops.inputs import Asked
from loratool.ops.predict import coarse
from loratool.ops.unbake_file import subtract_file, unbake_file
from loratool.ops.undo import read_undo
from tests.bakes import CONV, DIFFUSERS, KEYS, OUT, TEXT, K, Q, V, factors, kohya, load, noise, peft, save

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
PAIRS = list(itertools.product(DEVICES, DEVICES))
"""(baked on, unbaked on)."""

SHAPES: Mapping[str, tuple[int, ...]] = {
    Q: (320, 320),
    K: (320, 320),
    V: (320, 320),
    OUT: (320, 320),
    CONV: (320, 320, 3, 3),
    TEXT: (768, 768),
}
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checkpoint(path: Path, dtype: torch.dtype) -> Path:
    """Weights of trained size, a zero, the largest numbers, and an untouched bias."""
    tensors = {KEYS[stem]: noise(*shape, seed=i, size=0.03) for i, (stem, shape) in enumerate(SHAPES.items())}
    for tensor in tensors.values():
        tensor.view(-1)[:3] = torch.tensor([0.0, -0.0, 1e-7])
    tensors["model.diffusion_model.input_blocks.1.0.in_layers.2.bias"] = noise(320, seed=90)
    return save(path, {key: tensor.to(dtype) for key, tensor in tensors.items()}, {"format": "pt", "title": "base"})


def lora(path: Path, size: float = 0.05) -> Path:
    tensors = kohya(SHAPES, size=size)
    return save(path, {key: tensor.half() if tensor.dim() else tensor for key, tensor in tensors.items()})


def there_and_back(tmp_path: Path, base: Path, asked: list[Asked], options: Options, back: str) -> Path:
    """Bakes with an undo file, unbakes, and checks that the base is back; returns the undo file."""
    baked, undo, again = tmp_path / "baked.safetensors", tmp_path / "undo.safetensors", tmp_path / "again.safetensors"
    if base.is_dir():
        baked, again = tmp_path / "baked", tmp_path / "again"
    done = bake_file(base, asked, baked, options, undo=undo)
    assert done.undo == str(undo) and done.undo_size == undo.stat().st_size
    report = unbake_file(baked, undo, again, devices=(back,))
    assert report.exact
    if base.is_dir():
        for file in base.rglob("*.safetensors"):
            assert sha256(file) == sha256(again / file.relative_to(base)), file
    else:
        assert sha256(baked) != sha256(base)
        assert sha256(base) == sha256(again) == report.files[""]
    return undo


@pytest.mark.parametrize(("there", "back"), PAIRS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_base_is_back(tmp_path: Path, dtype: str, there: str, back: str) -> None:
    base = checkpoint(tmp_path / "base.safetensors", DTYPES[dtype])
    asked = [Asked(str(lora(tmp_path / "lora.safetensors")), 0.8)]
    undo = there_and_back(tmp_path, base, asked, Options(devices=(there,)), back)
    if dtype in ("F16", "BF16"):
        # "Small": the factors, and a few percent of the values.
        assert undo.stat().st_size < (tmp_path / "lora.safetensors").stat().st_size + 0.12 * base.stat().st_size


@pytest.mark.parametrize(("there", "back"), PAIRS)
def test_several_strengths_blocks_and_stochastic_rounding(tmp_path: Path, there: str, back: str) -> None:
    base = checkpoint(tmp_path / "base.safetensors", torch.bfloat16)
    one, two = lora(tmp_path / "a.safetensors"), lora(tmp_path / "b.safetensors", 0.2)
    asked = [Asked(str(one), -1.3), Asked(str(two), 0.37, "ALL0.5")]
    options = Options(rounding="stochastic", seed=5, devices=(there,))
    there_and_back(tmp_path, base, asked, options, back)


@pytest.mark.parametrize(("there", "back"), PAIRS)
@pytest.mark.parametrize("kind", ["plain", "scaled", "per row"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8(tmp_path: Path, dtype: torch.dtype, kind: str, there: str, back: str) -> None:
    weight = noise(320, 320, size=0.03)
    key = KEYS[Q]
    tensors: dict[str, Tensor] = {key: weight.to(dtype)}
    if kind != "plain":
        peak = weight.abs().amax(1, keepdim=True) if kind == "per row" else weight.abs().max()
        scale = peak / torch.finfo(dtype).max
        tensors = {key: (weight / scale).to(dtype), key.replace("weight", "scale_weight"): scale}
    base = save(tmp_path / "base.safetensors", tensors)
    path = save(tmp_path / "lora.safetensors", kohya({Q: (320, 320)}, size=0.2))
    there_and_back(tmp_path, base, [Asked(str(path), 0.9)], Options(devices=(there,)), back)


@pytest.mark.parametrize(("there", "back"), PAIRS)
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("norm", ["paper", "comfyui"])
def test_dora(tmp_path: Path, norm: str, per_row: bool, there: str, back: str) -> None:
    base = checkpoint(tmp_path / "base.safetensors", torch.float16)
    tensors = kohya({Q: (320, 320), CONV: (320, 320, 3, 3)})
    for stem, ones in ((Q, ()), (CONV, (1, 1))):
        shape = (320, 1, *ones) if per_row else (1, 320, *ones)
        tensors[f"{stem}.dora_scale"] = noise(*shape, seed=4).abs() + 0.5
    path = save(tmp_path / "dora.safetensors", tensors)
    asked = [Asked(str(path), 0.7), Asked(str(lora(tmp_path / "b.safetensors")), 0.5)]
    there_and_back(tmp_path, base, asked, Options(dora_norm=norm, devices=(there,)), back)


@pytest.mark.parametrize(("there", "back"), PAIRS)
def test_lokr_tucker_and_bias(tmp_path: Path, there: str, back: str) -> None:
    base = checkpoint(tmp_path / "base.safetensors", torch.float16)
    tensors = {
        f"{Q}.lokr_w1": noise(8, 8, seed=1),
        f"{Q}.lokr_w2_a": noise(40, 4, seed=2, size=0.1),
        f"{Q}.lokr_w2_b": noise(4, 40, seed=3, size=0.1),
        f"{Q}.alpha": torch.tensor(3.0),
        f"{CONV}.lora_up.weight": noise(320, 6, 1, 1, seed=4, size=0.1),
        f"{CONV}.lora_mid.weight": noise(6, 6, 3, 3, seed=5, size=0.1),
        f"{CONV}.lora_down.weight": noise(6, 320, 1, 1, seed=6, size=0.1),
        f"{CONV}.alpha": torch.tensor(2.0),
    }
    path = save(tmp_path / "lokr.safetensors", tensors)
    there_and_back(tmp_path, base, [Asked(str(path), 0.6)], Options(devices=(there,)), back)


@pytest.mark.parametrize(("there", "back"), PAIRS)
def test_a_language_model(tmp_path: Path, there: str, back: str) -> None:
    """A sharded folder: LoRA with bias, an embedding, and a whole tensor that is replaced."""
    folder = tmp_path / "model"
    stem = "model.layers.0.self_attn.q_proj"
    one = {f"{stem}.weight": noise(64, 48).half(), f"{stem}.bias": noise(64, seed=1).half()}
    two = {"lm_head.weight": noise(100, 48, seed=2).half(), "model.embed_tokens.weight": noise(100, 48, seed=3).half()}
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {key: name for name, part in zip(names, (one, two), strict=True) for key in part}
    for name, part in zip(names, (one, two), strict=True):
        save(folder / name, part, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    tensors = {
        f"{stem}.lora_A.weight": noise(2, 48, seed=5),
        f"{stem}.lora_B.weight": noise(64, 2, seed=6),
        f"{stem}.lora_B.bias": noise(64, seed=7),
        "model.embed_tokens.lora_embedding_A": noise(2, 100, seed=8),
        "model.embed_tokens.lora_embedding_B": noise(48, 2, seed=9),
        "lm_head.weight": noise(100, 48, seed=10),
    }
    adapter = peft(tmp_path / "adapter", tensors, lora_bias=True)
    there_and_back(tmp_path, folder, [Asked(str(adapter), 0.5)], Options(devices=(there,)), back)
    assert (tmp_path / "again" / "config.json").read_text() == "{}"


def test_transposed_and_fused_weights(tmp_path: Path) -> None:
    """OpenCLIP's in_proj_weight and text_projection."""
    stem = "conditioner.embedders.1.model."
    tensors = {
        f"{stem}transformer.resblocks.3.attn.in_proj_weight": noise(3840, 1280, size=0.03).half(),
        f"{stem}text_projection": noise(1280, 1280, seed=1, size=0.03).half(),
    }
    base = save(tmp_path / "base.safetensors", tensors)
    shapes = {f"lora_te2_text_model_encoder_layers_3_self_attn_{x}_proj": (1280, 1280) for x in "qv"}
    header = {"ss_base_model_version": "sdxl_base_v1-0"}  # the encoder alone could be another model's
    path = save(tmp_path / "lora.safetensors", kohya({**shapes, "lora_te2_text_projection": (1280, 1280)}), header)
    there_and_back(tmp_path, base, [Asked(str(path), 0.8)], Options(), "cpu")


def test_a_diffusers_folder(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    for stem in (Q, TEXT):
        component, key = DIFFUSERS[stem]
        save(folder / component / "model.safetensors", {key: noise(*SHAPES[stem], size=0.03).half()})
    save(folder / "vae" / "model.safetensors", {"decoder.conv_in.weight": noise(4, 4)})
    (folder / "model_index.json").write_text("{}")
    path = save(tmp_path / "lora.safetensors", kohya({stem: SHAPES[stem] for stem in (Q, TEXT)}))
    there_and_back(tmp_path, folder, [Asked(str(path), 1.0)], Options(), "cpu")


def test_odd_bits_survive(tmp_path: Path) -> None:
    """Infinity and NaN with a payload in the base, where the update does not reach: rows of zeros in up."""
    weight = noise(320, 320, size=0.03).half()
    bits = weight.view(torch.int16)
    bits[5, 0], bits[5, 1], bits[5, 2] = 0x7C00, 0x7E55, -0x0155
    tensors = kohya({Q: (320, 320)})
    base = save(tmp_path / "base.safetensors", {KEYS[Q]: weight})
    path = save(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(LoratoolError, match="holds NaN or infinite values"):
        bake_file(base, [Asked(str(path))], tmp_path / "baked.safetensors", undo=tmp_path / "undo.safetensors")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base.safetensors", "lora.safetensors"]


def test_the_header_is_back_as_it_was(tmp_path: Path) -> None:
    """White space, order and all: the bytes of the base's header are kept."""
    base = checkpoint(tmp_path / "plain.safetensors", torch.float16)
    raw = base.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8 : 8 + length]), indent=3).encode()
    odd = tmp_path / "base.safetensors"
    odd.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    asked = [Asked(str(lora(tmp_path / "lora.safetensors")))]
    there_and_back(tmp_path, odd, asked, Options(), "cpu")


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, baked, undo."""
    base = checkpoint(tmp_path / "base.safetensors", torch.float16)
    baked, undo = tmp_path / "baked.safetensors", tmp_path / "undo.safetensors"
    bake_file(base, [Asked(str(lora(tmp_path / "lora.safetensors")), 0.8)], baked, undo=undo)
    return base, baked, undo


def test_another_bake_is_refused(tmp_path: Path, made: tuple[Path, Path, Path]) -> None:
    base, _, undo = made
    other = tmp_path / "other.safetensors"
    bake_file(base, [Asked(str(tmp_path / "lora.safetensors"), 0.7)], other)
    for wrong in (other, base):
        with pytest.raises(FormatError, match="not the one that the undo file is of"):
            unbake_file(wrong, undo, tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()


@pytest.mark.parametrize("where", ["touched", "copied"])
def test_a_changed_file_is_noticed(tmp_path: Path, made: tuple[Path, Path, Path], where: str) -> None:
    _, baked, undo = made
    data = bytearray(baked.read_bytes())
    tensors = load(baked)
    # The file is in the serialiser's order: F16 tensors by name.
    names = sorted(tensors)
    name = KEYS[Q] if where == "touched" else "model.diffusion_model.input_blocks.1.0.in_layers.2.bias"
    start = len(data) - sum(tensors[key].nbytes for key in names[names.index(name) :])
    data[start + 1] ^= 0x10
    baked.write_bytes(bytes(data))
    with pytest.raises(FormatError, match="another sha256"):
        unbake_file(baked, undo, tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()


def test_what_is_no_undo_file(tmp_path: Path, made: tuple[Path, Path, Path]) -> None:
    base, baked, undo = made
    for wrong in (base, baked, tmp_path / "lora.safetensors"):
        with pytest.raises(FormatError, match="no undo file"):
            read_undo(wrong)
    with pytest.raises(FormatError):
        read_undo(tmp_path / "none.safetensors")
    data = bytearray(undo.read_bytes())
    data[-2000:] = bytes(2000)
    undo.write_bytes(bytes(data))
    with pytest.raises(LoratoolError):
        unbake_file(baked, undo, tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()


def test_a_cast_cannot_be_undone(tmp_path: Path, made: tuple[Path, Path, Path]) -> None:
    base, _, _ = made
    asked = [Asked(str(tmp_path / "lora.safetensors"))]
    with pytest.raises(UsageError, match="--dtype"):
        bake_file(base, asked, tmp_path / "x.safetensors", Options(dtype="BF16"), undo=tmp_path / "u.safetensors")


def test_an_existing_undo_file_is_kept(tmp_path: Path, made: tuple[Path, Path, Path]) -> None:
    base, _, undo = made
    before = undo.read_bytes()
    asked = [Asked(str(tmp_path / "lora.safetensors"), 0.1)]
    with pytest.raises(LoratoolError, match="exists"):
        bake_file(base, asked, tmp_path / "new.safetensors", undo=undo)
    assert undo.read_bytes() == before and not (tmp_path / "new.safetensors").exists()


# -- by subtracting ---------------------------------------------------------------------------------------------------


def distance(again: Path, base: Path) -> tuple[float, float]:
    """The relative error of the weights, and the share of values that are others."""
    before, after = load(base), load(again)
    keys = [KEYS[stem] for stem in SHAPES]
    off = math.sqrt(sum(float((after[key].double() - before[key].double()).square().sum()) for key in keys))
    size = math.sqrt(sum(float(before[key].double().square().sum()) for key in keys))
    wrong = sum(int((after[key] != before[key]).sum()) for key in keys)
    return off / size, wrong / sum(before[key].numel() for key in keys)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_subtracting_is_nearly_the_base(tmp_path: Path, dtype: str) -> None:
    base = checkpoint(tmp_path / "base.safetensors", DTYPES[dtype])
    asked = [Asked(str(lora(tmp_path / "lora.safetensors")), 0.8)]
    baked, again = tmp_path / "baked.safetensors", tmp_path / "again.safetensors"
    bake_file(base, asked, baked)
    report = subtract_file(baked, asked, again, Options())
    assert not report.exact and report.notes == ()
    error, wrong = distance(again, base)
    assert report.error is not None and report.doubtful is not None
    assert 0.3 * error < report.error < 3 * error
    assert wrong < report.doubtful < 6 * wrong + 1e-3


def test_subtracting_says_what_was_not_recorded(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base.safetensors", torch.float16)
    path = lora(tmp_path / "lora.safetensors")
    baked = tmp_path / "baked.safetensors"
    bake_file(base, [Asked(str(path), 0.8)], baked)
    report = subtract_file(baked, [Asked(str(path), 0.7)], tmp_path / "again.safetensors", Options())
    assert len(report.notes) == 1 and "does not say" in report.notes[0]


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_what_was_rounded_at_random_is_told_to_be_further_off(tmp_path: Path, dtype: str) -> None:
    base = checkpoint(tmp_path / "base.safetensors", DTYPES[dtype])
    asked = [Asked(str(lora(tmp_path / "lora.safetensors", 0.01)), 0.8)]
    baked, again = tmp_path / "baked.safetensors", tmp_path / "again.safetensors"
    bake_file(base, asked, baked, Options(rounding="stochastic"))
    report = subtract_file(baked, asked, again, Options())
    error, wrong = distance(again, base)
    assert report.error is not None and report.doubtful is not None
    assert 0.7 * error < report.error < 1.5 * error
    assert 0.7 * wrong < report.doubtful < 1.5 * wrong


def test_block_weights_are_subtracted_as_they_were_baked(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base.safetensors", torch.float32)
    path = lora(tmp_path / "lora.safetensors")
    baked, again = tmp_path / "baked.safetensors", tmp_path / "again.safetensors"
    bake_file(base, [Asked(str(path), 0.8, {"entries": [["text_encoder*", 0.0]], "rest": 0.5})], baked)
    report = subtract_file(baked, [Asked(str(path), 0.8)], again, Options())
    assert distance(again, base)[0] < 1e-6
    assert report.notes == ("lora.safetensors was baked with block weights, and is subtracted with them",)


def test_every_bake_is_looked_for_in_the_header(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base.safetensors", torch.float16)
    one, other = lora(tmp_path / "one.safetensors"), lora(tmp_path / "other.safetensors", 0.02)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    bake_file(base, [Asked(str(one))], first)
    bake_file(first, [Asked(str(other), 0.5)], second)
    report = subtract_file(second, [Asked(str(one)), Asked(str(other), 0.5)], tmp_path / "again.safetensors", Options())
    assert report.notes == ()


def test_a_cast_is_told(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base.safetensors", torch.float16)
    path, baked = lora(tmp_path / "lora.safetensors"), tmp_path / "baked.safetensors"
    bake_file(base, [Asked(str(path))], baked, Options(dtype="BF16"))
    report = subtract_file(baked, [Asked(str(path))], tmp_path / "again.safetensors", Options())
    assert len(report.notes) == 1 and "cast to BF16" in report.notes[0]


def test_what_took_the_place_of_a_tensor_cannot_be_subtracted(tmp_path: Path) -> None:
    weight = {"lm_head.weight": noise(64, 32), "model.layers.0.self_attn.q_proj.weight": noise(48, 32, seed=1)}
    base = save(tmp_path / "base.safetensors", weight, {})
    up, down = factors((48, 32))
    stem = "model.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up, "lm_head.weight": noise(64, 32, seed=2)}
    adapter = peft(tmp_path / "adapter", tensors, modules_to_save=["lm_head"])
    baked = tmp_path / "baked.safetensors"
    bake_file(base, [Asked(str(adapter))], baked)
    with pytest.raises(LoratoolError, match=r"lm_head.*cannot be subtracted"):
        subtract_file(baked, [Asked(str(adapter))], tmp_path / "again.safetensors", Options())
    assert not (tmp_path / "again.safetensors").exists()


def test_an_undo_file_is_no_output(tmp_path: Path) -> None:
    """Not even one that is not there yet."""
    base = checkpoint(tmp_path / "base.safetensors", torch.float16)
    path, there = lora(tmp_path / "lora.safetensors"), tmp_path / "x"
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="same file"):
            bake_file(base, [Asked(str(path))], there, Options(overwrite=overwrite), undo=tmp_path / "." / "x")
    assert not there.exists()


def test_dora_is_not_subtracted(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base.safetensors", torch.float16)
    tensors = {**kohya({Q: (320, 320)}), f"{Q}.dora_scale": noise(320, 1).abs()}
    path = save(tmp_path / "dora.safetensors", tensors)
    with pytest.raises(LoratoolError, match="undo file"):
        subtract_file(base, [Asked(str(path))], tmp_path / "again.safetensors", Options())


# -- the pieces -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_frames(dtype: torch.dtype, share: float) -> None:
    """Whatever bits: a frame turns one tensor into the other."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    generator = torch.Generator().manual_seed(3)
    limits = torch.iinfo(kind)
    true = torch.randint(limits.min, limits.max, (40, 70), generator=generator, dtype=kind)
    other = torch.randint(limits.min, limits.max, (40, 70), generator=generator, dtype=kind)
    predicted = torch.where(torch.rand(40, 70, generator=generator) < share, other, true)
    gains = [noise(40, 1), noise(1, 70)]
    data = packed(7, true.view(dtype), predicted.view(dtype), gains) * 2
    first, second = frames_in(data)
    assert first.packed == second.packed and (first.row, first.height) == (7, 40)
    assert [gain.tolist() for gain in first.gains] == [gain.flatten().tolist() for gain in gains]
    assert torch.equal(corrected(first, predicted.clone().view(dtype)).view(kind), true)
    for cut in (1, len(data) // 2 + 3):
        with pytest.raises(FormatError):
            list(frames_in(data[:-cut]))


def module(family: str, **tensors: Tensor) -> Module:
    factors = {role: LazyTensor.from_torch(tensor) for role, tensor in tensors.items()}
    shapes = {role: factor.shape for role, factor in factors.items()}
    plugin = families()[family]
    return Module((Target("unet", "layer", plugin.shape(shapes)),), plugin, factors, 3.0)


SAMPLES = {
    "linear": module("lora", up=noise(40, 7), down=noise(7, 30, seed=1)),
    "half": module("lora", up=noise(40, 32).half(), down=noise(32, 30, seed=1).half()),
    "conv": module("lora", up=noise(40, 7, 1, 1), down=noise(7, 30, 3, 3, seed=1)),
    "tucker": module("lora", up=noise(40, 7, 1, 1), mid=noise(7, 7, 3, 3, seed=2), down=noise(7, 30, 1, 1, seed=1)),
    "lokr": module(
        "lokr", w1_a=noise(8, 3), w1_b=noise(3, 6, seed=1), w2_a=noise(5, 4, seed=2), w2_b=noise(4, 5, seed=3)
    ),
    "lokr t2": module("lokr", w1=noise(4, 4), t2=noise(3, 3, 3, 3), w2_a=noise(3, 5, seed=2), w2_b=noise(3, 5, seed=3)),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_coarse_updates_are_exact_in_any_order(name: str) -> None:
    """Rank components in another order, and as integers of any size: the same bits, and nearly the update."""
    made = coarse(SAMPLES[name])
    loaded = {role: factor.load().double() for role, factor in made.factors.items()}
    found = made.family.delta(loaded, 1.0)
    exact = replace(SAMPLES[name], alpha=None)
    true = exact.family.delta({role: factor.load().double() for role, factor in exact.factors.items()}, 1.0)
    bits = 9 if name.startswith(("lokr", "tucker")) else 18
    assert float((found - true).norm()) <= 2.0**-bits * float(true.norm())
    if made.family.id == "lora" and "mid" not in loaded:
        order = torch.randperm(loaded["down"].shape[0], generator=torch.Generator().manual_seed(1))
        turned = {"up": loaded["up"][:, order], "down": loaded["down"][order]}
        assert torch.equal(made.family.delta(turned, 1.0), found)
        left, right = loaded["up"].flatten(1), loaded["down"].flatten(1)
        by_hand = sum(left[:, i : i + 1] * right[i : i + 1] for i in reversed(range(len(right))))
        assert torch.equal(torch.as_tensor(by_hand).reshape(found.shape), found)
