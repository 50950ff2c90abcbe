"""Search: one look through everything that a name of a base model may mean."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratool.core.errors import LoratoolError, UsageError
from loratool.files.bundle import PICKLES
from loratool.files.checkpoint import WEIGHTS
from loratool.ops.known_models import PUBLISHED, Look, look_at, models
from loratool.ops.places import (
    BASES_VARIABLE,
    Around,
    Found,
    called,
    counted,
    did_you_mean,
    files_in,
    hub_cache,
    model_places,
    named_by_variable,
    plain,
)

CONFIG = "config file"
HUB = "Hugging Face cache"


@dataclass(frozen=True)
class Base:
    """A base model that was found. `source` says who knew it: `path`, `config file`, `ComfyUI`, ...

    `architecture` is the id of its model by its header; None where no table fits, and for a path, which is not opened.
    """

    name: str
    path: str
    architecture: str | None
    source: str


class NoneFound(LoratoolError):
    """There is no checkpoint of the model anywhere: it could be downloaded."""


class SeveralFound(LoratoolError):
    """Several files could be meant; `count` says how many."""

    def __init__(self, message: str, *, count: int, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.count = count


# -- entries: what the user named -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """The path of a name that the user gave, and where."""

    path: Path
    source: str


def _entries(around: Around) -> dict[str, Entry]:
    named = {name: Entry(path, BASES_VARIABLE) for name, path in named_by_variable(around) if name is not None}
    return {**named, **{name: Entry(path, CONFIG) for name, path in around.config.bases.items()}}


def checked(name: str, entry: Entry) -> Look:
    """What the file of an entry is. Raises LoratoolError where it is not what the name says.

    A name that was given on purpose never falls back to another file.
    """
    cure = (
        "correct LORATOOL_BASES" if entry.source == BASES_VARIABLE else f"`loratool bases add {name} PATH` corrects it"
    )
    try:
        look = look_at(entry.path)
    except LoratoolError as error:
        message = f"{error.message} (it is {name} by the {entry.source})"
        raise LoratoolError(message, file=error.file or str(entry.path), key=error.key, hint=cure) from error
    if name in models() and look.architecture != name:
        message = f"is {look.what}, but it is called {name} by the {entry.source}"
        raise LoratoolError(message, file=str(entry.path), hint=cure)
    if not look.checkpoint:
        message = f"is {look.what}, not a checkpoint (it is {name} by the {entry.source})"
        raise LoratoolError(message, file=str(entry.path), hint=cure)
    return look


# -- search: what is found --------------------------------------------------------------------------------------------


class Search:
    """One search through all places. A header is read when it is asked for, and once."""

    def __init__(self, around: Around) -> None:
        self.around = around
        self.entries = _entries(around)
        self.skipped: dict[str, str] = {}
        self._files: tuple[Found, ...] | None = None
        self._looks: dict[Path, Look | None] = {}
        self.places = model_places(around)

    @property
    def files(self) -> tuple[Found, ...]:
        """All files in all places."""
        if self._files is None:
            self._files = tuple(files_in(self.places))
        return self._files

    def look(self, path: Path) -> Look | None:
        """What a file is; None, and `skipped` says why, if it cannot be read."""
        if path not in self._looks:
            try:
                look: Look | None = look_at(path)
            except LoratoolError as error:
                look = None
                self.skipped[str(path)] = error.message
            if look is not None and look.architecture is None:
                self.skipped[str(path)] = f"is {look.what}"
            self._looks[path] = look
        return self._looks[path]

    def is_model(self, path: Path, name: str) -> bool:
        """Whether a file is of the model `name`, by its header."""
        look = self.look(path)
        return look is not None and look.architecture == name

    def of_model(self, name: str) -> Base:
        """The checkpoint of a model: one of a usual file name, else the only one, else the published one in the cache.

        Raises SeveralFound where nothing tells which one is meant, NoneFound where there is none.
        """
        usual = PUBLISHED[name].files if name in PUBLISHED else ()
        known = sorted((file for file in self.files if file.stem in usual), key=lambda file: usual.index(file.stem))
        best = next((file for file in known if self.is_model(file.path, name)), None)
        fitting = [best] if best else [file for file in self.files if self.is_model(file.path, name)]
        if len(fitting) == 1:
            return Base(name, str(fitting[0].path), name, fitting[0].place.source)
        for path in self.in_hub(name):
            if self.is_model(path, name):
                return Base(name, str(path), name, HUB)
        raise self._several(name, fitting) if fitting else self._none(name)

    def in_hub(self, name: str) -> Iterator[Path]:
        """The published checkpoints of a model in the Hugging Face cache, files before folders, not yet opened."""
        published = PUBLISHED.get(name)
        for repository, file in published.repositories.items() if published else ():
            for snapshot in _snapshots(hub_cache(self.around) / f"models--{repository.replace('/', '--')}"):
                if os.path.isfile(snapshot / file):
                    yield snapshot / file
                elif any(os.path.isdir(snapshot / part) for part in ("unet", "transformer")):
                    yield snapshot

    def of_file(self, text: str) -> Base:
        """The file in a place that is called `text`."""
        fitting = called(text, self.files)
        if len(fitting) > 1 and not fitting[0].pickle:  # of pickles any will do: none is read, and the error says why
            raise self._several(text, fitting)
        if not fitting:
            raise self._unknown(text)
        look = look_at(fitting[0].path)
        if not look.checkpoint:
            raise LoratoolError(f"is {look.what}, not a checkpoint", file=str(fitting[0].path))
        return Base(text, str(fitting[0].path), look.architecture, fitting[0].place.source)

    def _several(self, name: str, fitting: Sequence[Found]) -> SeveralFound:
        shown = ", ".join(str(file.path) for file in fitting[:5])
        more = f" and {len(fitting) - 5} more" if len(fitting) > 5 else ""
        what = f"are {models()[name].title}" if name in models() else "have that name"
        return SeveralFound(
            f"{name!r} could be any of {len(fitting)} files that {what}: {shown}{more}",
            count=len(fitting),
            hint=f"pick one with `loratool bases add {name if name in models() else 'NAME'} PATH`",
        )

    def _none(self, name: str) -> NoneFound:
        there = f"no {models()[name].title} checkpoint was found for {name!r}"
        unread = f", {len(self.skipped)} of them unknown or unreadable" if self.skipped else ""
        searched = f"{counted(len(self.files), 'file')} in {counted(len(self.places), 'folder')}{unread}, and the {HUB}"
        published = PUBLISHED.get(name)
        fetch = f"--download fetches {published.download[1]} ({published.gigabytes} GB), " if published else ""
        return NoneFound(
            f"{there} (looked at {searched})",
            hint=f"`loratool bases add {name} /path/to/file.safetensors` names one, {fetch}"
            "`loratool bases` shows where it looks",
        )

    def _unknown(self, text: str) -> LoratoolError:
        names = list(dict.fromkeys((*models(), *self.entries)))
        if any(sign in text for sign in ("/", os.sep)) or Path(text).suffix.lower() in (WEIGHTS, *PICKLES):
            near = did_you_mean(plain(text), [file.stem for file in self.files])
            hint = f"{near}check the path; `loratool bases` lists the files that need none"
            return LoratoolError("there is no such file", file=text, hint=hint)
        near = did_you_mean(text, [*names, *dict.fromkeys(file.stem for file in self.files)])
        return UsageError(
            f"no base model is called {text!r}, and no file",
            hint=f"{near}known: {', '.join(names)}; `loratool bases` lists all that is found",
        )


def _snapshots(repository: Path) -> Iterator[Path]:
    """The snapshots of a repository in the cache: that of `main` first, then the newest."""
    try:
        found = [path for path in (repository / "snapshots").iterdir() if os.path.isdir(path)]
        found.sort(key=lambda path: -path.stat().st_mtime)
    except OSError:
        return
    try:
        main = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        main = ""
    yield from sorted(found, key=lambda path: path.name != main)
