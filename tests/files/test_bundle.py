"""Bundles on disk: which file of a folder is read, what is refused; a folder is written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loratool.core.adapter import CONFIG, GGUF, MLX, SAFETENSORS, Bundle
from loratool.core.errors import FormatError, LoratoolError, UsageError
from loratool.core.tensor import LazyTensor
from loratool.files import bundle as module
from loratool.files.bundle import (
    MLX_MODEL,
    MODEL,
    OLD_MODEL,
    adapter_files,
    adapters_in,
    bundle_size,
    check_apart,
    check_output,
    is_component_folder,
    read_bundle,
    side_file,
    write_bundle,
)
from loratool.files.safetensors import read_header
from tests.hostile.bytes import file, tensor

FIXTURES = Path(__file__).parents[2] / "fixtures" / "gguf"
ONE = file({"a": tensor("F32", (2,))}, {"k": "v"})
TWO = file({"b": tensor("F16", (3,))})


def put(folder: Path, **files: bytes | str) -> Path:
    """A folder with files; `__` in a name stands for a dot, `___` for a slash."""
    for name, content in files.items():
        place = folder / name.replace("___", "/").replace("__", ".")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def pickled(path: Path, **tensors: torch.Tensor) -> Path:
    torch.save(tensors, path)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- reading


def test_a_file_alone_is_read_without_what_stands_beside_it(tmp_path: Path) -> None:
    put(tmp_path, style__safetensors=ONE, adapter_config__json="{}")
    found = read_bundle(tmp_path / "style.safetensors")
    assert list(found.tensors) == ["a"] and found.metadata == {"k": "v"} and not found.side_files
    assert (found.path, found.size_bytes) == (str(tmp_path / "style.safetensors"), len(ONE))


@pytest.mark.parametrize("name", [MODEL, MLX_MODEL])
def test_a_model_of_peft_or_mlx_is_read_with_its_config(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(ONE)
    assert not read_bundle(tmp_path / name).side_files
    put(tmp_path, adapter_config__json='{"r": 4}')
    assert read_bundle(tmp_path / name).side_files == {CONFIG: '{"r": 4}'}
    assert adapter_files(tmp_path / name) == [tmp_path / CONFIG, tmp_path / name]


def test_a_folder_of_peft(tmp_path: Path) -> None:
    put(tmp_path, adapter_model__safetensors=ONE, adapter_config__json='{"r": 4}', README__md="words")
    found = read_bundle(tmp_path)
    assert list(found.tensors) == ["a"] and found.side_files == {CONFIG: '{"r": 4}'}
    assert (found.path, found.size_bytes, found.container) == (str(tmp_path), len(ONE) + 8, SAFETENSORS)
    assert adapter_files(tmp_path) == [tmp_path / CONFIG, tmp_path / MODEL]


def test_of_two_models_the_pickle_is_left_alone(tmp_path: Path) -> None:
    put(tmp_path, adapter_model__safetensors=ONE, adapter_config__json="{}")
    (tmp_path / OLD_MODEL).write_bytes(b"\x80\x04 not even read")
    assert list(read_bundle(tmp_path).tensors) == ["a"]
    (tmp_path / MODEL).unlink()
    pickled(tmp_path / OLD_MODEL, old=torch.ones(2))
    assert list(read_bundle(tmp_path).tensors) == ["old"]
    (tmp_path / CONFIG).unlink()  # and without a config
    assert list(read_bundle(tmp_path).tensors) == ["old"] and not read_bundle(tmp_path).side_files


def test_a_folder_of_mlx(tmp_path: Path) -> None:
    put(tmp_path, adapters__safetensors=ONE, adapter_config__json='{"rank": 4}')
    found = read_bundle(tmp_path)
    assert (found.container, found.path) == (MLX, str(tmp_path))
    assert list(found.tensors) == ["a"] and found.side_files == {CONFIG: '{"rank": 4}'}
    put(tmp_path, adapter_model__safetensors=TWO)
    assert read_bundle(tmp_path).container == SAFETENSORS and list(read_bundle(tmp_path).tensors) == ["b"]


def test_a_folder_of_components(tmp_path: Path) -> None:
    """One named like a component, with a config; the others are somebody else's."""
    put(
        tmp_path,
        unet___adapter_model__safetensors=ONE,
        unet___adapter_config__json="1",
        text_encoder_2___adapter_model__safetensors=TWO,
        text_encoder_2___adapter_config__json="22",
        mine___adapter_config__json="3",
        vae___words__txt="",
    )
    found = read_bundle(tmp_path)
    assert list(found.tensors) == ["text_encoder_2/b", "unet/a"]
    assert found.side_files == {f"text_encoder_2/{CONFIG}": "22", f"unet/{CONFIG}": "1"}
    assert found.size_bytes == len(ONE) + len(TWO) + 3 and found.metadata == {"k": "v"}
    assert not is_component_folder(tmp_path / "mine") and not is_component_folder(tmp_path / "vae")
    names = [place.relative_to(tmp_path).as_posix() for place in adapter_files(tmp_path)]
    assert names == [f"{folder}/{name}" for folder in ("text_encoder_2", "unet") for name in (CONFIG, MODEL)]


def test_a_component_without_its_model_is_named(tmp_path: Path) -> None:
    put(tmp_path, unet___adapter_model__safetensors=ONE, unet___adapter_config__json="{}")
    put(tmp_path, text_encoder___adapter_config__json="{}")
    with pytest.raises(FormatError, match=f"has {CONFIG} but no {MODEL}") as caught:
        read_bundle(tmp_path)
    assert caught.value.file == str(tmp_path / "text_encoder")


@pytest.mark.parametrize("name", ["style.safetensors", "style.pt", "style.bin", "style.ckpt", "style.pth"])
def test_a_folder_with_one_file_is_that_file(tmp_path: Path, name: str) -> None:
    put(tmp_path, README__md="words", adapter__gguf="")
    if name.endswith(".safetensors"):
        (tmp_path / name).write_bytes(ONE)
        pickled(tmp_path / "other.pt", b=torch.ones(2))  # not asked where there is a safe one
    else:
        pickled(tmp_path / name, a=torch.ones(2))
    found = read_bundle(tmp_path)
    assert list(found.tensors) == ["a"] and found.path == str(tmp_path / name)
    assert adapter_files(tmp_path) == [tmp_path / name]


@pytest.mark.parametrize(("kind", "suffix"), [("safetensors", "safetensors"), ("PyTorch", "bin")])
def test_a_folder_with_several_files_says_which(tmp_path: Path, kind: str, suffix: str) -> None:
    for number in range(7):
        (tmp_path / f"{number}.{suffix}").write_bytes(ONE)
    with pytest.raises(FormatError) as caught:
        read_bundle(tmp_path)
    names = ", ".join(f"{number}.{suffix}" for number in range(5))
    assert str(caught.value) == f"{tmp_path}: is a folder with 7 {kind} files ({names}); name one of them"


def test_a_folder_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"is a folder without {CONFIG} or a safetensors file"):
        read_bundle(tmp_path)
    assert adapter_files(tmp_path) == [] and adapters_in(tmp_path) == [str(tmp_path)]


def test_a_model_that_is_broken_is_named_and_not_its_folder(tmp_path: Path) -> None:
    put(tmp_path, adapter_model__safetensors=ONE[:-1], adapter_config__json="{}")
    with pytest.raises(FormatError, match="truncated") as caught:
        read_bundle(tmp_path)
    assert caught.value.file == str(tmp_path / MODEL)


@pytest.mark.parametrize("kind", ["pipe", "nothing", "circle"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "style.safetensors"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "circle":
        place.symlink_to(place.name)
    words = {"pipe": "is a pipe", "nothing": "there is no such file", "circle": "cannot be opened"}[kind]
    with pytest.raises(FormatError, match=words) as caught:
        read_bundle(place)
    assert caught.value.file == str(place)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", fails)
    with pytest.raises(FormatError, match="cannot be read: Permission denied") as caught:
        read_bundle(tmp_path)
    assert caught.value.file == str(tmp_path)


def test_side_files_are_text_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SIDE_FILE", 1 << 20)
    place = tmp_path / CONFIG
    assert side_file(place) is None
    os.mkfifo(tmp_path / "pipe")
    assert side_file(tmp_path / "pipe") is None
    place.write_bytes(b"x" * (1 << 20))
    assert side_file(place) == "x" * (1 << 20)
    for content, words in ((b"x" * ((1 << 20) + 1), "is larger than 1 MiB"), (b'{"\xff"}', "is not UTF-8 text")):
        place.write_bytes(content)
        with pytest.raises(FormatError, match=words) as caught:
            side_file(place)
        assert caught.value.file == str(place)


def test_adapters_in_a_folder_of_downloads(tmp_path: Path) -> None:
    put(
        tmp_path,
        b__safetensors=ONE,
        a__pt=b"",
        c__gguf=b"",
        readme__txt=b"",
        peft___adapter_config__json="{}",
        other___x__safetensors=ONE,
    )
    found = [str(tmp_path / name) for name in ("a.pt", "b.safetensors", "c.gguf", "peft")]
    assert adapters_in(tmp_path) == found
    one = str(tmp_path / "b.safetensors")
    assert adapters_in(one) == [one]
    assert adapters_in(tmp_path / "peft") == [str(tmp_path / "peft")]
    put(tmp_path, unet___adapter_config__json="{}")  # now it is one adapter itself
    assert adapters_in(tmp_path) == [str(tmp_path)]


# -- outputs that are refused before anything is read


def refused(place: Path, inputs: list[Path], words: str, folder: bool = False, overwrite: bool = True) -> None:
    with pytest.raises(LoratoolError, match=words) as caught:
        check_output(place, [str(one) for one in inputs], folder, overwrite)
    assert caught.value.file == str(place)


def test_an_output_that_is_an_input_is_refused_however_it_is_spelled(tmp_path: Path) -> None:
    put(tmp_path, a__safetensors=ONE, peft___adapter_model__safetensors=ONE)
    a, peft = tmp_path / "a.safetensors", tmp_path / "peft"
    (tmp_path / "link").symlink_to(a)
    for place in (a, tmp_path / "link", tmp_path / "peft" / ".." / "a.safetensors"):
        refused(place, [peft, a], "the output is an input")
        refused(a, [place], "the output is an input")
    refused(peft, [peft / MODEL], "the output holds an input", folder=True)
    refused(peft / MODEL, [peft], "the output is part of an input")
    refused(peft / "new" / "x", [peft], "the output is part of an input")
    check_output(tmp_path / "new", [str(a), str(peft)], False, False)


def test_an_output_needs_a_folder_and_a_free_name(tmp_path: Path) -> None:
    put(tmp_path, a=b"", full___x=b"")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "none" / "x", [], f"its folder does not exist; mkdir -p {tmp_path / 'none'}")
    for nameless in (".", "", str(tmp_path / "..")):
        for inputs in ([], [str(tmp_path / "a")], ["a"]):
            with pytest.raises(UsageError, match="is no name for an output"):
                check_output(nameless, inputs, True, False)
            with pytest.raises(UsageError, match="is no name for an output"):
                check_apart(nameless, inputs)
    with pytest.raises(
        UsageError, match=r"ends as a folder's name does; a file would be written; name .*NAME\.safeten"
    ):
        check_output(f"{tmp_path / 'new'}/", [], False, False)
    check_output(f"{tmp_path / 'new'}/", [], True, False)
    refused(tmp_path / "full", [], "is a folder; a file would be written")
    refused(tmp_path / "a", [], "is a file; a folder would be written", folder=True)
    refused(tmp_path / "a", [], "exists already; use --overwrite", overwrite=False)
    refused(tmp_path / "full", [], "exists already; use --overwrite", folder=True, overwrite=False)
    check_output(tmp_path / "a", [], False, True)
    put(tmp_path, full___style__safetensors=b"", full___config__json=b"{}")  # as a folder of downloads
    refused(tmp_path / "full", [], "without a file named as a model's are", folder=True)
    check_output(tmp_path / "empty", [], True, False)


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "adapter_config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "model.safetensors.index.json",
        "adapter_model.bin",
    ],
)
def test_a_model_is_replaced_where_overwriting_was_asked(tmp_path: Path, name: str) -> None:
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.touch()
    (tmp_path / "out" / "notes.txt").touch()
    check_output(tmp_path / "out", [], True, True)


@pytest.mark.parametrize("exists", [False, True])
def test_an_output_whose_folder_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(os, "access", lambda place, mode: asked.append((place, mode)))
    if exists:
        (tmp_path / "out").mkdir()
    refused(tmp_path / "out", [], "its folder cannot be written to", folder=True)
    assert asked == [(tmp_path / "out" if exists else tmp_path, os.W_OK)]


# -- writing


def bundle(*keys: str, **more: Any) -> Bundle:
    return Bundle({key: LazyTensor.scalar(float(at), "F32") for at, key in enumerate(keys)}, {"k": "v"}, **more)


def unfinished(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if ".loratool-" in name]


def test_a_file_is_checked_before_it_gets_its_name(tmp_path: Path) -> None:
    seen: list[str] = []

    def check(path: str) -> None:
        seen.append(path)
        assert list(read_header(path).tensors) == ["a"]
        assert not (tmp_path / "out").exists()
        if len(seen) == 1:
            raise LoratoolError("is not what it should be")

    with pytest.raises(LoratoolError, match="not what it should be"):
        write_bundle(tmp_path / "out", bundle("a"), check=check)
    assert os.listdir(tmp_path) == []
    write_bundle(tmp_path / "out", bundle("a"), check=check)
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out").stat().st_size == bundle_size(bundle("a"), False)


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=16))
    monkeypatch.setattr(os, "open", pytest.fail)
    with pytest.raises(LoratoolError, match="not enough room"):
        write_bundle(tmp_path / "out", bundle("a"))


PARTS = bundle("unet/a", "text_encoder/b", "../c", side_files={f"unet/{CONFIG}": '{"ü": 1}', CONFIG: "{}"})


def test_a_folder_with_components(tmp_path: Path) -> None:
    """A key that is no plain word before the slash is a key, and no place to write to."""
    write_bundle(tmp_path / "out", PARTS, folder=True)
    found = tree(tmp_path / "out")
    assert sorted(found) == [CONFIG, MODEL, f"text_encoder/{MODEL}", f"unet/{CONFIG}", f"unet/{MODEL}"]
    assert found[f"unet/{CONFIG}"].decode() == '{"ü": 1}'
    assert list(read_header(tmp_path / "out" / MODEL).tensors) == ["../c"]
    assert list(read_header(tmp_path / "out" / "unet" / MODEL).tensors) == ["a"]
    assert sum(map(len, found.values())) == bundle_size(PARTS, True)
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_of_mlx_is_written_as_it_is_read(tmp_path: Path) -> None:
    made = bundle("a", side_files={CONFIG: "{}"}, container=MLX)
    write_bundle(tmp_path / "out", made, folder=True)
    assert sorted(os.listdir(tmp_path / "out")) == [CONFIG, MLX_MODEL]
    again = read_bundle(tmp_path / "out")
    assert (again.container, list(again.tensors), again.side_files) == (MLX, ["a"], made.side_files)


@pytest.mark.parametrize(
    "name", ["../x", "unet/../adapter_config.json", f"/tmp/{CONFIG}", "words.txt", f"a b/{CONFIG}"]
)
def test_side_files_of_other_names_are_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match="a side file is called"):
        write_bundle(tmp_path / "out", bundle("a", side_files={name: "{}"}), folder=True)
    assert os.listdir(tmp_path) == []


def test_a_folder_with_something_in_it_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    put(tmp_path / "out", adapter_model__safetensors=TWO)
    with pytest.raises(LoratoolError, match="exists already; use --overwrite"):
        write_bundle(tmp_path / "out", bundle("a"), folder=True)
    assert tree(tmp_path / "out") == {MODEL: TWO}


def test_what_the_old_adapter_leaves_is_removed_and_nothing_else(tmp_path: Path) -> None:
    out = put(
        tmp_path / "out",
        adapters__safetensors=ONE,
        adapter_config__json="old",
        README__md="mine",
        unet___adapter_model__safetensors=ONE,
        unet___adapter_config__json="old",
        text_encoder___adapter_model__safetensors=ONE,
        text_encoder___adapter_config__json="old",
        text_encoder_2___adapter_model__safetensors=ONE,
        text_encoder_2___adapter_config__json="old",
        text_encoder_2___notes__txt="mine",
    )
    write_bundle(out, bundle("unet/a", side_files={f"unet/{CONFIG}": "new"}), folder=True, overwrite=True)
    found = tree(out)
    assert sorted(found) == ["README.md", "text_encoder_2/notes.txt", f"unet/{CONFIG}", f"unet/{MODEL}"]
    assert found[f"unet/{CONFIG}"] == b"new" and not (out / "text_encoder").exists()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_that_fails_its_check_leaves_everything_as_it_was(tmp_path: Path, exists: bool) -> None:
    out = tmp_path / "out"
    if exists:
        put(out, adapter_model__safetensors=TWO, README__md="mine")
    before = tree(tmp_path)
    seen: list[str] = []

    def check(path: str) -> None:
        seen.append(path)
        assert list(read_bundle(path).tensors) == ["a"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_bundle(out, bundle("a"), folder=True, overwrite=True, check=check)
    assert len(seen) == 1 and tree(tmp_path) == before and not unfinished(tmp_path)


def test_a_folder_that_cannot_get_its_name_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module.os, "replace", fails)
    for name in ("new", "old"):
        if name == "old":
            put(tmp_path / "old", README__md="mine")
        with pytest.raises(LoratoolError, match="cannot be written: Input/output error") as caught:
            write_bundle(tmp_path / name, bundle("a"), folder=True, overwrite=True)
        assert caught.value.file == str(tmp_path / name)
    assert tree(tmp_path) == {"old/README.md": b"mine"} and not unfinished(tmp_path)


# -- gguf


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    pytest.importorskip("gguf")
    return Path(shutil.copy(FIXTURES / "llama.gguf", tmp_path / "in.gguf"))


def test_gguf_is_read_and_written_by_its_first_bytes(tmp_path: Path, llama: Path) -> None:
    """Whatever it is called; the same tensors and entries come back."""
    found = read_bundle(llama.rename(tmp_path / "in.safetensors"))
    assert found.container == GGUF and found.size_bytes == (tmp_path / "in.safetensors").stat().st_size
    write_bundle(tmp_path / "out.gguf", found)
    again = read_bundle(tmp_path / "out.gguf")
    assert again.metadata == found.metadata
    assert {key: bytes(one.read()) for key, one in again.tensors.items()} == {
        key: bytes(one.read()) for key, one in found.tensors.items()
    }
