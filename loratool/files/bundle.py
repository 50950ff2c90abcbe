"""Bundles on disk: a safetensors or PyTorch file, or a folder with an adapter in it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loratool.core.adapter import CONFIG, GGUF, MLX, Bundle
from loratool.core.errors import FormatError, LoratoolError, UsageError
from loratool.core.registry import components
from loratool.core.tensor import LazyTensor
from loratool.files.atomic import atomic_write, check_room, flush_folder, scratch_folder
from loratool.files.gguf import is_gguf, read_gguf, write_gguf
from loratool.files.safetensors import OpenFile, file_size, is_pickle, read_header, write_safetensors

MODEL = "adapter_model.safetensors"
OLD_MODEL = "adapter_model.bin"
"""PEFT's model as it was saved before safetensors: a pickle."""

MLX_MODEL = "adapters.safetensors"
"""The tensors of mlx-lm's folder."""

_WITH_CONFIG = (MODEL, OLD_MODEL, MLX_MODEL)
"""Files that a config may stand beside."""

PICKLES = (".pt", ".bin", ".ckpt", ".pth")
_WORD = re.compile(r"[A-Za-z0-9_]+")
_COMPONENT = re.compile(r"model|unet|transformer(_\d)?|prior|text_encoder(_\d)?")

MAX_SIDE_FILE = 16 << 20
"""A side file is a small JSON: more than 16 MiB of it is refused."""

Progress = Callable[[int, int], None]


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Opens a file or an adapter's folder. Reads headers and side files; tensors stay on disk.

    Raises FormatError for what is no adapter file, with what it is instead where that can be told.
    """
    place = Path(path)
    try:
        if place.is_dir():
            return _read_folder(place)
        if is_gguf(place):
            return read_gguf(place)
        sides = {}
        config = place.with_name(CONFIG)
        if place.name in _WITH_CONFIG and config.is_file():
            sides[CONFIG] = _read_text(config)
        found = _tensors_of(place)
    except LoratoolError as error:
        raise error.with_file(str(path)) from error.__cause__
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", file=str(path)) from error
    return replace(found, side_files=sides, path=str(path))


def _tensors_of(file: Path) -> Bundle:
    """The tensors of one file, safetensors or a pickle, as its bytes say."""
    if is_pickle(file):
        from loratool.files.pickles import read_pickle

        return read_pickle(file)
    header = read_header(file)
    return Bundle(header.tensors, header.metadata, {}, str(file), header.size_bytes)


def _read_folder(place: Path) -> Bundle:
    if (place / MLX_MODEL).is_file() and not model_of(place).is_file():
        return replace(read_bundle(place / MLX_MODEL), path=str(place), container=MLX)
    if (place / CONFIG).is_file() or model_of(place).is_file():
        return _merged(place, {"": place})
    parts = {f"{sub.name}/": sub for sub in sorted(place.iterdir()) if is_component_folder(sub)}
    if parts:
        return _merged(place, parts)
    for kind, suffixes in (("safetensors", (".safetensors",)), ("PyTorch", PICKLES)):
        files = sorted(file for file in place.iterdir() if file.suffix in suffixes)
        if len(files) == 1:
            return read_bundle(files[0])
        if files:
            names = ", ".join(file.name for file in files[:5])
            raise FormatError(f"is a folder with {len(files)} {kind} files ({names})", hint="name one of them")
    raise FormatError(f"is a folder without {CONFIG} or a safetensors file", hint="name a LoRA file or a PEFT folder")


def is_component_folder(place: Path) -> bool:
    """Whether a folder is one component's part of an adapter: it has the name of one, and a config in it."""
    return (place / CONFIG).is_file() and _names_component(place.name)


def _names_component(name: str) -> bool:
    return _COMPONENT.fullmatch(name) is not None or name in components()


def adapters_in(path: str | os.PathLike[str]) -> list[str]:
    """The adapters in a folder of downloads, by name: files and PEFT folders; `path` itself if it is one adapter."""
    place = Path(path)
    if not place.is_dir() or (place / CONFIG).is_file() or any(map(is_component_folder, place.iterdir())):
        return [str(path)]
    found = [
        entry
        for entry in sorted(place.iterdir())
        if entry.suffix in (".safetensors", ".gguf", *PICKLES) or (entry.is_dir() and (entry / CONFIG).is_file())
    ]
    return [str(entry) for entry in found] or [str(path)]


def adapter_files(place: Path) -> list[Path]:
    """The files that an adapter is read from: itself, its config beside it, or those of each component of a folder."""
    if not place.is_dir():
        config = place.with_name(CONFIG)
        return [config, place] if place.name in _WITH_CONFIG and config.is_file() else [place]
    folders = [place, *filter(is_component_folder, sorted(place.iterdir()))]
    files = [file for folder in folders for file in (folder / CONFIG, model_of(folder), folder / MLX_MODEL)]
    named = [file for file in files if file.is_file()]
    safe = sorted(file for file in place.iterdir() if file.suffix == ".safetensors")
    return named or safe or sorted(file for file in place.iterdir() if file.suffix in PICKLES)


def model_of(folder: Path) -> Path:
    """The file with the tensors of a PEFT folder: the pickle of old versions only where there is no other."""
    return folder / (OLD_MODEL if (folder / OLD_MODEL).is_file() and not (folder / MODEL).is_file() else MODEL)


def _merged(place: Path, parts: Mapping[str, Path]) -> Bundle:
    tensors: dict[str, LazyTensor] = {}
    metadata: dict[str, str] = {}
    sides: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    size = 0
    for prefix, folder in parts.items():
        model = model_of(folder)
        if not model.is_file():
            raise FormatError(f"has {CONFIG} but no {MODEL}", file=str(folder))
        try:
            found = _tensors_of(model)
        except LoratoolError as error:
            raise error.with_file(str(model)) from error.__cause__
        tensors |= {prefix + key: tensor for key, tensor in found.tensors.items()}
        metadata |= found.metadata
        notes += found.notes
        size += found.size_bytes
        if (folder / CONFIG).is_file():
            sides[prefix + CONFIG] = _read_text(folder / CONFIG)
            size += (folder / CONFIG).stat().st_size
    return Bundle(tensors, metadata, sides, str(place), size, notes=notes)


def side_file(path: Path) -> str | None:
    """The text of a side file; None where there is none. Raises FormatError for what is no text or too large."""
    return _read_text(path) if path.is_file() else None


def _read_text(path: Path) -> str:
    file = OpenFile(str(path))
    if file.size > MAX_SIDE_FILE:
        raise FormatError(f"is larger than {MAX_SIDE_FILE >> 20} MiB", file=str(path))
    try:
        return file.pread(file.size, 0).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("is not UTF-8 text", file=str(path)) from error


INDEX = r".*\.safetensors\.index(\.[\w-]+)?\.json"
"""Pattern of the name of an index of shards."""

_OF_A_MODEL = re.compile(
    rf"adapter_config\.json|model_index\.json|{INDEX}|adapter_model\.bin|"
    r"(adapter_model|adapters|model|diffusion_pytorch_model|pytorch_model|pytorch_lora_weights)[.\w-]*\.safetensors"
)
"""Names of files by which a folder is known to be a model's or an adapter's. Any `.safetensors` would not do, as a
folder of downloads is full of them, nor `config.json`, which many a project has."""


def _is_of_a_model(place: Path) -> bool:
    """Whether a folder is a model's or an adapter's, by the files in it or in that of one of its components."""
    parts = [sub for sub in place.iterdir() if sub.is_dir() and _names_component(sub.name)]
    return any(_OF_A_MODEL.fullmatch(file.name) for folder in (place, *parts) for file in folder.iterdir())


def check_apart(path: str | os.PathLike[str], inputs: Sequence[str]) -> None:
    """Refuses an output that is one of the inputs, a part of one, or a folder with one in it, and one without a
    name."""
    place = Path(path)
    if place.name in ("", ".."):
        raise UsageError(f"{str(path)!r} is no name for an output", hint="name a file or folder that can be made")
    for name in inputs:
        ours, theirs = Path(os.path.realpath(place)), Path(os.path.realpath(name))
        inside = theirs in ours.parents and theirs.is_dir()  # also of what is not there yet
        if inside or (place.exists() and (ours == theirs or ours in theirs.parents)):
            where = "is part of" if inside else "is" if ours == theirs else "holds"
            message = f"the output {where} an input; an input is never changed"
            raise LoratoolError(message, file=str(path), hint="choose another -o")


def check_output(path: str | os.PathLike[str], inputs: Sequence[str], folder: bool, overwrite: bool) -> None:
    """Refuses an output before anything is read: one that exists, is an input, or has no folder to be in.

    `folder` says that it would be a folder. Raises LoratoolError; UsageError for what is no name of such an output.
    """
    place = Path(path)
    check_apart(path, inputs)
    if not folder and not place.is_dir() and str(path).endswith(("/", os.sep)):
        name = f"{place / 'NAME'}.safetensors"
        raise UsageError("ends as a folder's name does; a file would be written", file=str(path), hint=f"name {name}")
    if not place.parent.is_dir():
        raise LoratoolError("its folder does not exist", file=str(path), hint=f"mkdir -p {place.parent}")
    if place.exists():
        if folder != place.is_dir():
            kind = "a folder" if place.is_dir() else "a file"
            raise LoratoolError(f"is {kind}; a {'folder' if folder else 'file'} would be written", file=str(path))
        filled = folder and any(place.iterdir())
        if not overwrite and (filled or not folder):
            raise LoratoolError("exists already", file=str(path), hint="use --overwrite to replace it")
        if filled and not _is_of_a_model(place):
            raise LoratoolError(
                "is a folder without a file named as a model's are (model_index.json, model.safetensors), "
                "which is not replaced",
                file=str(path),
                hint="name another -o",
            )
    if not os.access(place if place.is_dir() else place.parent, os.W_OK):
        raise LoratoolError("its folder cannot be written to", file=str(path))


def write_bundle(
    path: str | os.PathLike[str],
    bundle: Bundle,
    *,
    folder: bool = False,
    overwrite: bool = False,
    hashes: bool = False,
    progress: Progress | None = None,
    check: Callable[[str], None] | None = None,
) -> None:
    """Writes a bundle to a file, or to a folder with its side files. Nothing partial ever has the final name.

    With `hashes`, `sshs_model_hash` and `sshs_legacy_hash` are made true for each file.
    `check` is called with the temporary file's or folder's path before it gets its name; if it raises, nothing is
    written.
    """
    place = Path(path)
    check_room(place.absolute().parent, bundle_size(bundle, folder))
    if not folder:
        with atomic_write(place, overwrite=overwrite) as temporary:
            if bundle.container == GGUF:
                write_gguf(temporary, bundle.tensors, bundle.metadata)
            else:
                write_safetensors(temporary, bundle.tensors, bundle.metadata, hashes=hashes, progress=progress)
            if check is not None:
                check(str(temporary))
        return
    _write_folder(place, bundle, overwrite, hashes, progress, check)


def bundle_size(bundle: Bundle, folder: bool) -> int:
    """Bytes that `write_bundle` would write, config files included."""
    parts = _by_folder(bundle.tensors).values() if folder else [bundle.tensors]
    sides = sum(len(text.encode()) for text in bundle.side_files.values())
    return sum(file_size(tensors, bundle.metadata) for tensors in parts) + sides


def _write_folder(
    place: Path,
    bundle: Bundle,
    overwrite: bool,
    hashes: bool,
    progress: Progress | None,
    check: Callable[[str], None] | None,
) -> None:
    """Writes a folder with one `adapter_model.safetensors` (and config) for each sub-folder that the keys name."""
    if place.exists() and any(place.iterdir()) and not overwrite:
        raise LoratoolError("exists already", file=str(place), hint="use --overwrite to replace it")
    with scratch_folder(place) as temporary:
        for folder, tensors in _by_folder(bundle.tensors).items():
            (temporary / folder).mkdir(parents=True, exist_ok=True)
            name = MLX_MODEL if bundle.container == MLX else MODEL
            with atomic_write(temporary / folder / name, overwrite=False) as file:
                write_safetensors(file, tensors, bundle.metadata, hashes=hashes, progress=progress)
        for name, text in bundle.side_files.items():
            with atomic_write(temporary / _side_file(name), overwrite=False) as file:
                file.write_text(text, encoding="utf-8")
        if check is not None:
            check(str(temporary))
        try:
            _move(temporary, place)
        except OSError as error:
            raise LoratoolError(f"cannot be written: {error.strerror}", file=str(place)) from error


def _move(temporary: Path, place: Path) -> None:
    """Gives a folder its name; into one that holds something, its files are moved one by one."""
    if not place.exists() or not any(place.iterdir()):
        os.replace(temporary, place)
        flush_folder(place.parent)
        return
    written = set()
    for file in sorted(file for file in temporary.rglob("*") if file.is_file()):
        target = place / file.relative_to(temporary)
        target.parent.mkdir(exist_ok=True)
        os.replace(file, target)
        written.add(target)
    _remove_stale(place, written)
    for folder in {file.parent for file in written}:
        flush_folder(folder)


def _remove_stale(place: Path, written: set[Path]) -> None:
    """Removes what an adapter that was overwritten leaves: its model and config where the new one has none."""
    for folder in (place, *filter(is_component_folder, place.iterdir())):
        for name in (CONFIG, MODEL, MLX_MODEL):
            if folder / name not in written:
                (folder / name).unlink(missing_ok=True)
        if folder != place and not any(folder.iterdir()):
            folder.rmdir()


def _by_folder(tensors: Mapping[str, LazyTensor]) -> dict[str, dict[str, LazyTensor]]:
    """Tensors by the sub-folder in front of their key. Anything but a plain word before the slash is part of the key:
    keys come from files, and no file decides where we write."""
    folders: dict[str, dict[str, LazyTensor]] = {}
    for key, tensor in tensors.items():
        word, slash, name = key.partition("/")
        folder, name = (word + slash, name) if slash and _WORD.fullmatch(word) else ("", key)
        folders.setdefault(folder, {})[name] = tensor
    return folders


def _side_file(name: str) -> str:
    """The name of a side file, if it is one that we write. Raises FormatError for any other path."""
    folder, _, file = name.rpartition("/")
    if file != CONFIG or (folder and not _WORD.fullmatch(folder)):
        raise FormatError(f"a side file is called {name!r}, expected {CONFIG}", hint="the file was tampered with")
    return name
