"""Baking into folders: only what is touched is written anew, the rest is linked or copied, the base never changes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loratool.core.errors import FormatError, LoratoolError
from loratool.files.safetensors import read_header
from loratool.ops.bake_file import bake_file
from loratool.ops.bake_report import BakeReport
from loratool.ops.bake_task import Options
from loratool.ops.inputs import Asked
from tests.bakes import CONV, DIFFUSERS, KEYS, TEXT, K, Q, kohya, load, noise, peft, save, updates

SHAPES: Mapping[str, tuple[int, ...]] = {Q: (16, 16), K: (16, 16), CONV: (16, 8, 3, 3), TEXT: (8, 8)}
UNET = "unet/diffusion_pytorch_model.safetensors"
ENCODER = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
F16, BF16 = torch.float16, torch.bfloat16


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def config(path: Path, **values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def component(folder: str, dtype: torch.dtype = F16) -> dict[str, torch.Tensor]:
    return {key: noise(*SHAPES[s], seed=n).to(dtype) for n, (s, (f, key)) in enumerate(PLACES.items()) if f == folder}


PLACES = {stem: DIFFUSERS[stem] for stem in SHAPES}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A pipeline: a VAE of more than 1 MiB, which is linked, and small files, which are copied."""
    folder = tmp_path / "model"
    save(folder / UNET, {**component("unet"), "conv_in.bias": noise(16, dtype=F16)}, {"format": "pt"})
    save(folder / ENCODER, component("text_encoder"), {"format": "pt"})
    save(folder / VAE, {"decoder.conv_in.weight": noise(1 << 19, dtype=F16).reshape(-1, 8)})
    config(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    config(folder / "unet" / "config.json", sample_size=64)
    config(folder / "text_encoder" / "config.json", torch_dtype="float16", hidden_size=8)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "merges.txt").write_text("a b", encoding="utf-8")
    (folder / "empty").mkdir()
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret").write_text("x", encoding="utf-8")
    return folder


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return save(tmp_path / "lora.safetensors", kohya(SHAPES))


def baked(base: Path, lora: Path | None, options: Options | None = None) -> tuple[Path, BakeReport]:
    """The output and the report; the base must stay as it was, to the last byte."""
    before, output = tree(base), base.parent / "out"
    report = bake_file(base, [Asked(str(lora))] if lora else [], output, options)
    assert tree(base) == before
    assert sorted(name for name in os.listdir(base.parent) if name.startswith(".")) == []
    return output, report


def assert_added(base: Path, output: Path, lora: Path, file: str, folder: str, dtype: torch.dtype) -> None:
    before, after = load(base / file), load(output / file)
    for stem, update in updates(load(lora)).items():
        place, key = PLACES[stem]
        if place == folder and key in before:
            exact = before[key].double() + update
            assert after[key].dtype == dtype
            assert float((after[key].double() - exact).abs().max()) <= float(
                (exact.to(dtype).double() - exact).abs().max()
            )


def test_only_touched_files_are_written_anew(base: Path, lora: Path) -> None:
    output, report = baked(base, lora)
    before, after = tree(base), tree(output)
    assert after.keys() == before.keys() - {".cache/secret"}
    assert {name for name in after if after[name] != before[name]} == {UNET, ENCODER}
    assert report.files == (ENCODER, UNET)
    assert_added(base, output, lora, UNET, "unet", F16)
    assert_added(base, output, lora, ENCODER, "text_encoder", F16)
    assert (output / "empty").is_dir()
    assert report.size == sum(len(data) for data in after.values())
    for name in (UNET, ENCODER):
        assert len(json.loads(read_header(output / name).metadata["loratool.baked"])) == 1


def test_large_files_are_linked_and_small_ones_copied(base: Path, lora: Path) -> None:
    output, report = baked(base, lora)
    assert (output / VAE).samefile(base / VAE)
    small = ["model_index.json", "unet/config.json", "text_encoder/config.json", "tokenizer/merges.txt"]
    for name in (*small, UNET, ENCODER):
        assert (output / name).stat().st_nlink == (base / name).stat().st_nlink == 1
    assert (report.linked, report.copied) == (1, len(small))


def test_without_links_everything_is_copied(base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    output, report = baked(base, lora)
    assert not (output / VAE).samefile(base / VAE)
    assert (output / VAE).read_bytes() == (base / VAE).read_bytes()
    assert (report.linked, report.copied) == (0, 5)


def test_a_copy_that_fails_names_the_file(base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(LoratoolError, match="cannot be written: No space left on device") as caught:
        bake_file(base, [Asked(str(lora))], base.parent / "out")
    assert caught.value.file == str(base.parent / "out" / "model_index.json")
    assert sorted(os.listdir(base.parent)) == ["lora.safetensors", "model"]


def fits(base: Path, lora: Path, output: Path, room: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a bake starts on a disk with so many bytes free."""
    with monkeypatch.context() as patched:
        patched.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=room, f_frsize=1))
        try:
            bake_file(base, [Asked(str(lora))], output, Options(overwrite=True))
        except LoratoolError as error:
            assert "there is not enough room" in error.message and error.message.endswith(" MiB needed")
            return False
        return True


def test_there_must_be_room_for_what_is_copied(base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "tokenizer" / "merges.txt").write_bytes(bytes(1 << 19))
    names = [name for name in tree(base) if name not in (UNET, ENCODER, VAE, ".cache/secret")]
    needed = sum((base / name).stat().st_size for name in names)
    needed += sum(tensor.nbytes for name in (UNET, ENCODER) for tensor in read_header(base / name).tensors.values())
    output = base.parent / "out"
    assert not fits(base, lora, output, needed - 1, monkeypatch)
    assert fits(base, lora, output, needed, monkeypatch)
    memory = Path("/dev/shm")
    if memory.is_dir() and memory.stat().st_dev != base.stat().st_dev:  # no links to there
        with tempfile.TemporaryDirectory(dir=memory) as elsewhere:
            there = Path(elsewhere, "out")
            needed += (base / VAE).stat().st_size
            assert not fits(base, lora, there, needed - 1, monkeypatch)
            assert fits(base, lora, there, needed, monkeypatch)


def test_links_into_a_cache_are_followed(tmp_path: Path, base: Path, lora: Path) -> None:
    """A snapshot of the hub: every file is a link to a blob."""
    snapshot = tmp_path / "snapshot"
    for name in tree(base):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(base / name)
    output, _ = baked(snapshot, lora)
    assert not any(path.is_symlink() for path in output.rglob("*"))
    assert (output / VAE).samefile(base / VAE)
    assert_added(base, output, lora, UNET, "unet", F16)


def test_a_component_that_is_a_link_is_followed(tmp_path: Path, base: Path, lora: Path) -> None:
    (base / "unet").rename(tmp_path / "elsewhere")
    (base / "unet").symlink_to(tmp_path / "elsewhere")
    output, _ = baked(base, lora)
    assert not (output / "unet").is_symlink()
    assert_added(base, output, lora, UNET, "unet", F16)


@pytest.mark.parametrize("to", [".", "..", "unet"])
def test_links_in_a_ring_are_refused(base: Path, lora: Path, to: str) -> None:
    (base / "unet" / "ring").symlink_to(base / to)
    with pytest.raises(LoratoolError, match="link to a folder that it is in"):
        bake_file(base, [Asked(str(lora))], base.parent / "out")
    assert sorted(os.listdir(base.parent)) == ["lora.safetensors", "model"]


def test_what_is_no_file_is_refused(base: Path, lora: Path) -> None:
    os.mkfifo(base / "pipe")
    with pytest.raises(LoratoolError, match="is not a regular file") as caught:
        bake_file(base, [Asked(str(lora))], base.parent / "out")
    assert caught.value.file == str(base / "pipe")
    assert sorted(os.listdir(base.parent)) == ["lora.safetensors", "model"]


def test_old_weights_that_stay_are_told(base: Path, lora: Path) -> None:
    (base / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"old")
    save(base / "sd15.safetensors", {KEYS[Q]: noise(16, 16)})
    output, report = baked(base, lora)
    assert (output / "unet" / "diffusion_pytorch_model.bin").read_bytes() == b"old"
    assert (output / "sd15.safetensors").read_bytes() == (base / "sd15.safetensors").read_bytes()
    assert any("unet: diffusion_pytorch_model.bin still hold" in note for note in report.notes)
    assert any("sd15.safetensors beside the components" in note for note in report.notes)


def test_variants_are_all_baked(base: Path, lora: Path) -> None:
    name = "unet/diffusion_pytorch_model.fp32.safetensors"
    save(base / name, component("unet", torch.float32))
    output, report = baked(base, lora)
    assert set(report.files) == {UNET, ENCODER, name}
    assert_added(base, output, lora, UNET, "unet", F16)
    before, after = load(base / name), load(output / name)
    for stem in (Q, K, CONV):
        key = PLACES[stem][1]
        assert torch.allclose(after[key].double(), before[key].double() + updates(load(lora))[stem], atol=1e-6)


# -- shards -----------------------------------------------------------------------------------------------------------


def sharded(folder: Path, dtype: torch.dtype = F16, padding: int = 0) -> Path:
    """The unet in two shards and an index, which is padded by spaces."""
    tensors = component("unet", dtype)
    (first, *rest) = sorted(tensors)
    names = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    save(folder / names[0], {first: tensors[first]})
    save(folder / names[1], {key: tensors[key] for key in rest} | {"norm.bias": noise(5)})
    weight_map = {first: names[0], **dict.fromkeys([*rest, "norm.bias"], names[1])}
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    text = json.dumps({"metadata": {"total_size": 1, "made": "by hand"}, "weight_map": weight_map})
    index.write_text(text + " " * padding, encoding="utf-8")
    return index


def data_size(*files: Path) -> int:
    return sum((header := read_header(file)).size_bytes - header.header_bytes for file in files)


def test_shards_that_nothing_is_added_to_are_not_written(tmp_path: Path, base: Path) -> None:
    (base / UNET).unlink()
    index = sharded(base / "unet")
    first = json.loads(index.read_text())["weight_map"]
    (key,) = [key for key, name in first.items() if "00001" in name]
    (stem,) = [stem for stem, (_, place) in PLACES.items() if place == key]
    lora = save(tmp_path / "lora.safetensors", kohya({stem: SHAPES[stem]}))
    output, report = baked(base, lora)
    assert report.files == ("unet/diffusion_pytorch_model-00001-of-00002.safetensors",)
    assert (output / "unet" / index.name).read_bytes() == index.read_bytes()
    assert_added(base, output, lora, report.files[0], "unet", F16)


@pytest.mark.parametrize("padding", [0, 2 << 20], ids=["small", "large"])
def test_a_cast_makes_index_and_config_true(base: Path, lora: Path, padding: int) -> None:
    """Also an index so large that it is linked at first: that of the base stays as it is."""
    (base / UNET).unlink()
    index = sharded(base / "unet", padding=padding)
    output, _ = baked(base, lora, Options(dtype="F32"))
    found = json.loads((output / "unet" / index.name).read_text())
    shards = sorted((output / "unet").glob("*.safetensors"))
    assert found["metadata"] == {"made": "by hand", "total_size": data_size(*shards)}
    assert found["weight_map"] == json.loads(index.read_text())["weight_map"]
    assert json.loads((output / "text_encoder" / "config.json").read_text()) == {
        "torch_dtype": "float32",
        "hidden_size": 8,
    }
    assert json.loads((output / "unet" / "config.json").read_text()) == {"sample_size": 64}
    assert all(t.dtype == torch.float32 for name in (UNET, VAE, ENCODER) for t in _loaded(output / name))


def _loaded(path: Path) -> list[torch.Tensor]:
    files = [path] if path.exists() else sorted(path.parent.glob("*.safetensors"))
    return [tensor for file in files for tensor in load(file).values()]


def test_an_index_counts_shards_that_were_cast_before_and_no_other_variant(base: Path) -> None:
    (base / UNET).unlink()
    index = sharded(base / "unet", BF16)
    save(base / "unet" / "diffusion_pytorch_model.fp16.safetensors", component("unet", F16))
    output, report = baked(base, None, Options(dtype="BF16"))
    names = {name.rpartition("/")[2] for name in report.files if name.startswith("unet/")}
    assert names == {"diffusion_pytorch_model-00002-of-00002.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
    shards = sorted((output / "unet").glob("*-of-00002.safetensors"))
    assert json.loads((output / "unet" / index.name).read_text())["metadata"]["total_size"] == data_size(*shards)


# -- other folders ----------------------------------------------------------------------------------------------------


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    model = {"model.layers.0.q_proj.weight": noise(6, 4, dtype=BF16), "model.norm.weight": noise(4, dtype=BF16)}
    folder = tmp_path / "llm"
    save(folder / "model.safetensors", model, {"format": "pt"})
    config(folder / "config.json", dtype="bfloat16")
    stem = "model.layers.0.q_proj"
    tensors = {f"{stem}.lora_A.weight": noise(2, 4, seed=1), f"{stem}.lora_B.weight": noise(6, 2, seed=2)}
    lora = peft(tmp_path / "lora", tensors)
    output, report = baked(folder, lora)
    after = load(output / "model.safetensors")
    exact = (
        model[f"{stem}.weight"].double()
        + tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double()
    )
    assert float((after[f"{stem}.weight"].double() - exact).abs().max()) <= 2.0**-7 * float(exact.abs().max())
    assert torch.equal(after["model.norm.weight"], model["model.norm.weight"])
    assert json.loads((output / "config.json").read_text()) == {"dtype": "bfloat16"}
    assert report.files == ("model.safetensors",)
    assert read_header(output / "model.safetensors").metadata["format"] == "pt"


@pytest.mark.parametrize("name", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors.index.json"])
def test_a_broken_config_is_named_as_the_bases_file(base: Path, lora: Path, name: str) -> None:
    if "index" in name:
        config(base / name, weight_map={"conv_in.bias": Path(UNET).name}, metadata="odd")
        output, _ = baked(base, lora, Options(dtype="F32"))  # what is odd in it is left out
        total = sum(tensor.nbytes for tensor in read_header(output / UNET).tensors.values())
        assert json.loads((output / name).read_text())["metadata"] == {"total_size": total}
        shutil.rmtree(output)
    (base / name).write_text("{", encoding="utf-8")
    with pytest.raises(LoratoolError, match="is no JSON") as caught:
        bake_file(base, [Asked(str(lora))], base.parent / "out", Options(dtype="F32"))
    assert caught.value.file == str(base / name)
    assert sorted(os.listdir(base.parent)) == ["lora.safetensors", "model"]


def test_an_existing_folder_is_replaced_as_a_whole(base: Path, lora: Path) -> None:
    output = base.parent / "out"
    config(output / "stale.json")
    with pytest.raises(LoratoolError, match=r"without a file named as a model's are .* is not replaced"):
        bake_file(base, [Asked(str(lora))], output, Options(overwrite=True))
    config(output / "unet" / "config.json")
    config(output / "web" / "model.safetensors")
    with pytest.raises(LoratoolError, match="without a file named as a model's are"):  # any project has such
        bake_file(base, [Asked(str(lora))], output, Options(overwrite=True))
    config(output / "unet" / "model.safetensors")
    before = tree(base.parent)
    with pytest.raises(LoratoolError, match="exists"):
        bake_file(base, [Asked(str(lora))], output)
    assert tree(base.parent) == before
    bake_file(base, [Asked(str(lora))], output, Options(overwrite=True))
    assert "stale.json" not in tree(output)


def test_a_damaged_component_stops_everything(base: Path, lora: Path) -> None:
    """Also one that would only be copied."""
    data = (base / VAE).read_bytes()
    (base / VAE).write_bytes(data[:-1])
    with pytest.raises(FormatError, match="is truncated") as caught:
        bake_file(base, [Asked(str(lora))], base.parent / "out")
    assert caught.value.file == str(base / VAE)
    assert sorted(os.listdir(base.parent)) == ["lora.safetensors", "model"]
