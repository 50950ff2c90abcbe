"""checkpoint: what is found in files, shards and folders, and what is refused before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from loratool.core.errors import FormatError
from loratool.core.tensor import LazyTensor
from loratool.files import checkpoint
from loratool.files.checkpoint import CheckpointFiles, read_checkpoint
from loratool.files.safetensors import write_safetensors

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def save(path: Path, *keys: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, {key: LazyTensor.scalar(1.0, "F16") for key in keys}, None)
    return path


def index(path: Path, weight_map: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metadata": {"total_size": 4}, "weight_map": weight_map}), encoding="utf-8")
    return path


def sharded(folder: Path, keys: Sequence[str] = ("a", "b", "c")) -> dict[str, str]:
    """Two shards and their index; what the index says."""
    save(folder / SHARDS[0], *keys[:2])
    save(folder / SHARDS[1], *keys[2:])
    found = {**dict.fromkeys(keys[:2], SHARDS[0]), **dict.fromkeys(keys[2:], SHARDS[1])}
    index(folder / INDEX, found)
    return found


def files_of(found: CheckpointFiles) -> list[tuple[str, str | None, list[str]]]:
    """(folder, index, names of the files) of every set."""
    return [(one.folder, one.index, [file.name for file in one.files]) for one in found.sets]


def test_a_single_file(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", "a", "b")
    found = read_checkpoint(path)
    assert (found.path, found.folder, files_of(found)) == (str(path), False, [("", None, [""])])
    assert list(found.keys) == ["a", "b"]
    assert list(found.components) == [""]
    assert found.size_bytes == path.stat().st_size
    assert found.sets[0].files[0].path == str(path)


def test_shards_with_their_index_are_one_set(tmp_path: Path) -> None:
    names = sharded(tmp_path)
    found = read_checkpoint(tmp_path)
    assert found.folder
    assert files_of(found) == [("", INDEX, list(SHARDS))]
    assert {key: file.name for key, file in found.sets[0].homes.items()} == names
    assert list(found.sets[0].tensors) == list(names)
    assert found.size_bytes == sum((tmp_path / name).stat().st_size for name in SHARDS)


def test_shards_without_an_index_are_one_set(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).unlink()
    assert files_of(read_checkpoint(tmp_path)) == [("", None, list(SHARDS))]


def test_a_variant_beside_the_full_weights_is_a_set_of_its_own(tmp_path: Path) -> None:
    for name in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"):
        save(tmp_path / "unet" / name, "a", "b")
    found = read_checkpoint(tmp_path)
    assert files_of(found) == [
        ("unet", None, ["unet/diffusion_pytorch_model.fp16.safetensors"]),
        ("unet", None, ["unet/diffusion_pytorch_model.safetensors"]),
    ]
    assert list(found.components) == ["unet"]


def test_two_indices_are_two_sets_and_share_no_file(tmp_path: Path) -> None:
    sharded(tmp_path)
    save(tmp_path / "model.fp16-00001-of-00001.safetensors", "a", "b", "c")
    fp16 = "model.safetensors.index.fp16.json"
    index(tmp_path / fp16, dict.fromkeys("abc", "model.fp16-00001-of-00001.safetensors"))
    assert files_of(read_checkpoint(tmp_path)) == [
        ("", fp16, ["model.fp16-00001-of-00001.safetensors"]),
        ("", INDEX, list(SHARDS)),
    ]


def test_a_file_beside_shards_with_an_index_is_not_lost(tmp_path: Path) -> None:
    sharded(tmp_path)
    save(tmp_path / "whole.safetensors", "a", "b", "c")
    assert [names for _, _, names in files_of(read_checkpoint(tmp_path))] == [list(SHARDS), ["whole.safetensors"]]


def test_a_folder_of_components(tmp_path: Path) -> None:
    sharded(tmp_path / "transformer")
    save(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", "a", "v")
    save(tmp_path / ".cache" / "model.safetensors", "hidden")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}", encoding="utf-8")
    found = read_checkpoint(tmp_path)
    assert files_of(found) == [
        ("transformer", f"transformer/{INDEX}", [f"transformer/{name}" for name in SHARDS]),
        ("vae", None, ["vae/diffusion_pytorch_model.safetensors"]),
    ]
    assert {name: list(tensors) for name, tensors in found.components.items()} == {
        "transformer": ["a", "b", "c"],
        "vae": ["a", "v"],
    }
    assert found.keys.keys() == {"a", "b", "c", "v"}


def test_of_a_pipeline_the_components_count_and_not_a_file_beside_them(tmp_path: Path) -> None:
    """Repositories keep the single file of other programs beside the folders that model_index.json names."""
    (tmp_path / "model_index.json").write_text("{}", encoding="utf-8")
    save(tmp_path / "flux1-dev.safetensors", "single")
    save(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", "a")
    assert list(read_checkpoint(tmp_path).keys) == ["a"]
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert list(read_checkpoint(tmp_path).keys) == ["single"]


def test_a_linked_shard_is_read(tmp_path: Path) -> None:
    """The hub's cache keeps links to blobs."""
    blob = save(tmp_path / "blobs" / "0123abcd", "a", "b")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(blob)
    assert list(read_checkpoint(tmp_path / "snapshot").keys) == ["a", "b"]


def refused(path: Path, words: str, file: Path | None = None) -> FormatError:
    with pytest.raises(FormatError, match=words) as caught:
        read_checkpoint(path)
    assert caught.value.file == str(file or path)
    return caught.value


def test_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    refused(tmp_path, "no such file", tmp_path / SHARDS[1])


def test_a_shard_without_what_the_index_promises(tmp_path: Path) -> None:
    names = sharded(tmp_path)
    index(tmp_path / INDEX, {**names, "d": SHARDS[0], "e": SHARDS[0]})
    error = refused(tmp_path, rf"lacks 2 tensors that {INDEX} promises \(d, e\)", tmp_path / SHARDS[0])
    assert error.hint == "download the folder again"


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "sub/a.safetensors", "/etc/passwd", "", ".", "..", 7, None, ["a"]], ids=repr
)
def test_an_index_that_leads_elsewhere(tmp_path: Path, name: object) -> None:
    save(tmp_path / "outside.safetensors", "a")
    save(tmp_path / "model" / "sub" / "a.safetensors", "a")
    place = index(tmp_path / "model" / INDEX, {"a": name})
    refused(tmp_path / "model", "expected the name of a file beside it", place)


@pytest.mark.parametrize("weight_map", [{}, [], None, "a", 3], ids=repr)
def test_an_index_without_a_map(tmp_path: Path, weight_map: object) -> None:
    save(tmp_path / "model.safetensors", "a")
    refused(tmp_path, "no weight_map", index(tmp_path / INDEX, weight_map))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"weight_map": {', "is no JSON"),
        (b"", "is no JSON"),
        (b"\xff\xfe{}", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "is no JSON object"),
    ],
    ids=["cut", "empty", "no text", "deep", "a list"],
)
def test_a_broken_index(tmp_path: Path, text: bytes, words: str) -> None:
    save(tmp_path / "model.safetensors", "a")
    (tmp_path / INDEX).write_bytes(text)
    refused(tmp_path, words, tmp_path / INDEX)


def test_a_huge_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded(tmp_path)
    monkeypatch.setattr(checkpoint, "MAX_INDEX", 100)
    refused(tmp_path, "is larger than", tmp_path / INDEX)


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        ({}, "name a checkpoint file"),
        ({"readme.txt": b""}, "name a checkpoint file"),
        ({"pytorch_model.bin": b"\x80\x02"}, "pickles"),
        ({"unet/diffusion_pytorch_model.bin": b"\x80\x02", "model_index.json": b"{}"}, "pickles"),
        ({"model.ckpt": b"PK"}, "pickles"),
    ],
    ids=["empty", "no weights", "a pickle", "pickles in components", "a ckpt"],
)
def test_a_folder_without_weights(tmp_path: Path, files: Mapping[str, bytes], hint: str) -> None:
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    error = refused(tmp_path, "holds no safetensors weights")
    assert hint in (error.hint or "")


def test_what_does_not_exist(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "does not exist")


@pytest.mark.parametrize("place", ["model.safetensors", "model", "model/unet"])
def test_a_damaged_file_is_named(tmp_path: Path, place: str) -> None:
    file = tmp_path / place if place.endswith(".safetensors") else tmp_path / place / "a.safetensors"
    data = save(file, "a", "b").read_bytes()
    file.write_bytes(data[:-1])
    refused(tmp_path / place.split("/")[0], "is truncated", file)
