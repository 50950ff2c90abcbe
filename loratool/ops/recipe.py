"""Recipe: the header entry that says how a file was made, so that it can be made again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loratool import __version__
from loratool.core.adapter import RECIPE
from loratool.core.architecture import Architecture
from loratool.core.errors import FormatError
from loratool.core.registry import architectures
from loratool.files.bundle import adapter_files
from loratool.files.safetensors import FileRange, OpenFile

ENTRY = RECIPE


def recipe(command: str, inputs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a command was asked for; settings that were left at None or empty are left out."""
    told = {key: value for key, value in settings.items() if value not in (None, {}, [], (), "")}
    return {"command": command, "version": __version__, "inputs": [dict(one) for one in inputs], **told}


def encode(made: Mapping[str, Any]) -> str:
    """The header entry."""
    return json.dumps(made, separators=(", ", ": "))


def decode(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The recipe in a header. Raises FormatError if there is none, or none that we wrote."""
    if ENTRY not in metadata:
        raise FormatError("holds no recipe", hint=f"files that loratool merged or resized have one ({ENTRY})")
    try:
        found = json.loads(metadata[ENTRY])
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its {ENTRY} is no JSON") from error
    inputs = found.get("inputs") if isinstance(found, dict) else None
    sound = isinstance(inputs, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("sha256"), str)
        for one in inputs
    )
    if not sound or not inputs:
        raise FormatError(f"its {ENTRY} names no inputs")
    made: dict[str, Any] = found
    return made


def file_name(path: str | os.PathLike[str]) -> str:
    """The last part of a path: where a file lies on somebody's disk is nobody else's business.

    Bytes that are no text become U+FFFD: a header is UTF-8.
    """
    name = os.path.basename(os.path.normpath(os.fspath(path)))
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def architecture_id(architecture: Architecture | str | None) -> str | None:
    """What a recipe says of a model that the user named: the id of its table, or None."""
    if isinstance(architecture, str) or architecture is None:
        return architecture
    known = architectures().get(architecture.id)
    return architecture.id if known is not None and architecture in known.sizes else None


def device_kind(device: str) -> str | None:
    """What a recipe says of the device: other bits come from another kind. None for the CPU."""
    kind = device.partition(":")[0]
    return None if kind == "cpu" else kind


def told(metadata: Mapping[str, str]) -> str | None:
    """In a few words how the file was made; None without a recipe, or with none that we wrote."""
    try:
        made = decode(metadata)
    except FormatError:
        return None
    how = [made[key] for key in ("method", "rule") if isinstance(made.get(key), str)]
    done = {"merge": f"a merge of {len(made['inputs'])}", "resize": "resized"}.get(str(made.get("command")))
    return None if done is None else ", ".join(["loratool", done, *how])[:80]


def sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file; of several (a folder, a model with its config) that of their names and hashes."""
    place = Path(path)
    files = adapter_files(place)
    if files == [place]:
        return file_sha256(place)
    return _of_files(place if place.is_dir() else place.parent, files)


def checkpoint_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a checkpoint's file; of a folder that of the names and hashes of the weights in it and one level below.

    These are the files that `ops.weights` reads.
    """
    place = Path(path)
    if not place.is_dir():
        return file_sha256(place)
    return _of_files(place, sorted((*place.glob("*.safetensors"), *place.glob("*/*.safetensors"))))


def hashing(
    paths: Sequence[str | os.PathLike[str]], base: str | os.PathLike[str] | None = None
) -> Callable[[], list[str]]:
    """Begins to hash in the background; the function that is returned waits for it and gives the hashes.

    That of `base`, a checkpoint, comes last if there is one.
    """
    pool = ThreadPoolExecutor(1, "loratool-sha256")
    futures = [pool.submit(sha256, path) for path in paths]
    if base is not None:
        futures.append(pool.submit(checkpoint_sha256, base))
    pool.shutdown(wait=False)
    return lambda: [future.result() for future in futures]


def _of_files(folder: Path, files: Sequence[Path]) -> str:
    lines = [f"{file.relative_to(folder).as_posix()} {file_sha256(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of one file, 64 hexadecimal digits."""
    file = OpenFile(os.fspath(path))  # no pipe, no device
    digest = hashlib.sha256()
    for piece in FileRange(file, 0, file.size).chunks():
        digest.update(piece)
    return digest.hexdigest()
