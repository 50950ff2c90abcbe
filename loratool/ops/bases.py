"""Bases: base models by name. A name is the user's own, the id of a model, or a file's in a program's folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from loratool.core.errors import LoratoolError, UsageError
from loratool.ops.config import absolute, write_base
from loratool.ops.known_models import PUBLISHED, Look, look_at, models
from loratool.ops.places import (
    BASES_VARIABLE,
    Found,
    check_name,
    did_you_mean,
    hub_cache,
    look_around,
    named_by_variable,
    roots,
)
from loratool.ops.search import HUB, Base, Entry, NoneFound, Search, SeveralFound, checked

__all__ = [
    "NONE_FOUND",
    "Added",
    "Base",
    "Listed",
    "Listing",
    "Looked",
    "NoneFound",
    "SeveralFound",
    "Skipped",
    "add_base",
    "download_base",
    "known_bases",
    "resolve_base",
]


NONE_FOUND = "none found"
"""The problem of a model of which there is no checkpoint anywhere."""


@dataclass(frozen=True)
class Listed:
    """A name in a listing. `problem` says why it leads nowhere; then other fields may be None."""

    name: str
    architecture: str | None = None
    path: str | None = None
    size: int | None = None
    source: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Looked:
    """A place that was looked at, and how many checkpoints of known models are in it."""

    path: str
    source: str
    exists: bool
    checkpoints: int


@dataclass(frozen=True)
class Skipped:
    """A file in a place that is no checkpoint of a known model, or cannot be read."""

    path: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """All that names lead to. `names` are the user's own and the models' ids; `files` can be named by file name."""

    config: str
    config_exists: bool
    names: tuple[Listed, ...]
    files: tuple[Listed, ...]
    places: tuple[Looked, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Added:
    """What `add_base` wrote; `replaced` is the path that the name had before."""

    name: str
    path: str
    architecture: str | None
    size: int
    config: str
    replaced: str | None


def resolve_base(text: str, *, environ: Mapping[str, str] | None = None, home: Path | None = None) -> Base:
    """The base model that `text` means: a path, else a name.

    A name is looked for in the config file, in LORATOOL_BASES, in the folders of programs, and in the Hugging Face
    cache. Every file found is known by its header, never by its name. Raises UsageError for a name that nobody knows,
    NoneFound for a model that is nowhere, SeveralFound for files that could all be meant, and LoratoolError for a name
    that leads to another model than it says or to a file that cannot be read.
    """
    around = look_around(environ, home)
    search = Search(around)
    entry = search.entries.get(text)
    if _is_path(text, is_name=entry is not None or text in models()):
        return Base(text, text, None, "path")
    if entry is not None:
        look = checked(text, entry)
        return Base(text, str(entry.path), look.architecture, entry.source)
    return search.of_model(text) if text in models() else search.of_file(text)


def _is_path(text: str, is_name: bool) -> bool:
    """Whether a text is a path. A folder that happens to be called like a model is one only with weights in it."""
    if not text or not os.path.exists(text):
        return False
    if not is_name or not os.path.isdir(text):
        return True
    try:
        return look_at(text).checkpoint
    except LoratoolError:
        return False


def download_base(name: str, *, environ: Mapping[str, str] | None = None, home: Path | None = None) -> Base:
    """Fetches the published checkpoint of a model into the Hugging Face cache, with huggingface_hub.

    What is there already is not fetched again. Raises UsageError for a name that is no model's, LoratoolError without
    huggingface_hub, and for everything that can go wrong on the way.
    """
    if name not in PUBLISHED:
        near = did_you_mean(name, PUBLISHED)
        raise UsageError(f"no download is known for {name!r}", hint=f"{near}known: {', '.join(sorted(PUBLISHED))}")
    repository, file = PUBLISHED[name].download
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        message = f"downloading {name} needs the package huggingface_hub"
        raise LoratoolError(message, hint="pip install 'loratool[download]'") from error
    cache = hub_cache(look_around(environ, home))
    try:
        path = str(hf_hub_download(repo_id=repository, filename=file, cache_dir=str(cache)))
    except Exception as error:  # those of the network library below it, which changes with the version
        raise _not_downloaded(error, repository, file) from error
    entry = Entry(Path(path), HUB)
    return Base(name, path, checked(name, entry).architecture, "download")


def _not_downloaded(error: Exception, repository: str, file: str) -> LoratoolError:
    page = f"https://huggingface.co/{repository}"
    kinds = {kind.__name__ for kind in type(error).__mro__}
    said = " ".join(str(error).split())[:200] or type(error).__name__
    if "GatedRepoError" in kinds:
        message, hint = "its licence has to be accepted first", f"accept it at {page}, then `hf auth login`, and again"
    elif kinds & {"RepositoryNotFoundError", "RevisionNotFoundError"}:
        message, hint = "the hub has no such repository, or a login is needed", f"see {page}; `hf auth login`"
    elif "LocalEntryNotFoundError" in kinds or "OfflineModeIsEnabled" in kinds:
        message, hint = "the hub cannot be reached, and it is not in the cache", "check the network and HF_HUB_OFFLINE"
    elif "EntryNotFoundError" in kinds:
        message, hint = "the repository has no such file any more", f"see {page}/tree/main"
    elif isinstance(error, OSError) and error.strerror:
        message, hint = error.strerror, "check the disk and HF_HOME"
    else:
        message, hint = said, f"try again, or fetch it at {page}/blob/main/{file}"
    return LoratoolError(f"{file} of {repository} cannot be downloaded: {message}", hint=hint)


def add_base(name: str, path: str, *, environ: Mapping[str, str] | None = None, home: Path | None = None) -> Added:
    """Gives a checkpoint a name, in the config file. All other entries of the file stay.

    Raises UsageError for what cannot be a name, LoratoolError for what is no checkpoint that can be read, and where
    `name` is the id of another model.
    """
    check_name(name)
    around = look_around(environ, home)
    place = absolute(path, around.home)
    look = look_at(place)
    if not look.checkpoint:
        raise LoratoolError(f"is {look.what}, not a checkpoint", file=path, hint="name a base model's file or folder")
    if name in models() and look.architecture != name:
        other = look.architecture or "a name of your own"
        raise LoratoolError(
            f"is {look.what}, not {models()[name].title}",
            file=path,
            hint=f"call it {other}: `loratool bases add {look.architecture or 'my-model'} PATH`",
        )
    before = around.config.bases.get(name)
    write_base(around.config, name, place)
    replaced = None if before in (None, place) else str(before)
    return Added(name, str(place), look.architecture, look.size_bytes, str(around.config.path), replaced)


def known_bases(*, environ: Mapping[str, str] | None = None, home: Path | None = None) -> Listing:
    """All names, all files in the folders of programs, and every place that was looked at. Reads every header."""
    around = look_around(environ, home)
    search = Search(around)
    names = [_listed_entry(name, entry) for name, entry in search.entries.items()]
    names += [_listed_model(name, search) for name in models() if name not in search.entries]
    files = [
        _listed_file(file, look) for file in search.files if (look := search.look(file.path)) and look.architecture
    ]
    hub = [path for name in models() for path in search.in_hub(name) if search.is_model(path, name)]
    return Listing(
        str(around.config.path),
        around.config.exists,
        tuple(names),
        tuple(files),
        tuple(_places(search, len(hub))),
        tuple(Skipped(path, reason) for path, reason in search.skipped.items()),
        tuple(f"config file: `{key}` means nothing; known: bases, roots, loras" for key in around.config.unknown),
    )


def _listed_entry(name: str, entry: Entry) -> Listed:
    try:
        look = checked(name, entry)
    except LoratoolError as error:
        return Listed(name, None, str(entry.path), None, entry.source, error.message)
    return Listed(name, look.architecture, str(entry.path), look.size_bytes, entry.source)


def _listed_model(name: str, search: Search) -> Listed:
    try:
        base = search.of_model(name)
    except SeveralFound as error:
        return Listed(name, name, problem=f"{error.count} files, none of them the published one: pick one")
    except NoneFound:
        return Listed(name, name, problem=NONE_FOUND)
    look = search.look(Path(base.path))
    return Listed(name, name, base.path, look.size_bytes if look else None, base.source)


def _of_known_models(search: Search, files: Iterable[Found]) -> Iterator[tuple[Found, Look]]:
    for file in files:
        look = search.look(file.path)
        if look is not None and look.architecture is not None:
            yield file, look


def _listed_file(file: Found, look: Look) -> Listed:
    return Listed(file.name, look.architecture, str(file.path), look.size_bytes, file.place.source)


def _places(search: Search, in_hub: int) -> Iterator[Looked]:
    around = search.around
    for name, path in named_by_variable(around):
        if name is None and not os.path.exists(path):
            yield Looked(str(path), BASES_VARIABLE, False, 0)
    for place in search.places:
        inside = [file for file in search.files if file.place is place]
        yield Looked(str(place.path), place.source, True, len(list(_of_known_models(search, inside))))
    for root in roots(around):
        if not any(root.path in place.path.parents for place in search.places) and root.source != "current folder":
            yield Looked(str(root.path), root.source, os.path.isdir(root.path), 0)
    cache = hub_cache(around)
    yield Looked(str(cache), HUB, os.path.isdir(cache), in_hub)
