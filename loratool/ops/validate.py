"""Validate: everything that is wrong, or worth a word, in files and folders. Never imports a tensor library."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.core.adapter import CONFIG, Bundle
from loratool.core.errors import FormatError, LoratoolError
from loratool.core.finding import ERROR, SEVERITIES, WARNING, Finding
from loratool.core.registry import checks
from loratool.core.tensor import LazyTensor
from loratool.files.bundle import MODEL, OLD_MODEL, adapters_in, is_component_folder, model_of, side_file
from loratool.files.kinds import PICKLED

if TYPE_CHECKING:
    from loratool.files.look import File
    from loratool.files.subjects import Content

DEEP_UP_TO = 1 << 30
"""Bytes up to which numbers are read without being asked to."""

MOST_OF_ONE = 500
"""So many findings of one code are kept for a file; the others are counted."""

MOST_TENSORS = 100_000
"""Of files with more tensors, modules are not looked at."""

_INDEX = ".safetensors.index"


@dataclass(frozen=True)
class Validated:
    """What was found in one file or folder: findings, the worst first. `more` counts those that were not kept, by code.
    `deep` says that numbers were read; `size_bytes` is the size of all its weights."""

    path: str
    findings: tuple[Finding, ...]
    more: Mapping[str, int]
    deep: bool
    size_bytes: int

    def count(self, severity: str) -> int:
        """How many findings of one severity were kept."""
        return sum(finding.severity == severity for finding in self.findings)

    def failed(self, strict: bool = False) -> bool:
        """Whether there are errors; with `strict`, or warnings."""
        return any(finding.severity == ERROR or (strict and finding.severity == WARNING) for finding in self.findings)


def validate(path: str | os.PathLike[str], *, base: str | None = None, deep: bool | None = None) -> list[Validated]:
    """What is wrong with the file or folder at `path`; one result for each adapter of a folder of them.

    `deep` reads the numbers: None, up to 1 GiB. `base` is a checkpoint whose shapes must fit. Nothing of the file is
    executed, imported or run as an expression. Raises nothing for a bad file: that is what it tells.
    """
    try:
        places = [os.fspath(path)] if _sharded(Path(path)) else adapters_in(path)
    except (LoratoolError, OSError, ValueError) as error:
        return [_result(os.fspath(path), _unreadable(os.fspath(path), error), False, 0)]
    return [_validated(place, base, deep) for place in places]


def _sharded(place: Path) -> bool:
    """Whether a folder is a checkpoint's: it, or a folder in it, has an index."""
    if not place.is_dir():
        return False
    entries = list(place.iterdir())
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return any(_INDEX in file.name for file in (*entries, *(file for folder in folders for file in folder.iterdir())))


def _validated(path: str, base: str | None, deep: bool | None) -> Validated:
    try:
        if Path(path).is_dir():
            return _Folder(path, base, deep).result()
        return _file(path, base, deep)
    except (LoratoolError, OSError, ValueError) as error:
        return _result(path, _unreadable(path, error), False, 0)


def _unreadable(path: str, error: Exception) -> Iterator[Finding]:
    from loratool.files.subjects import Place

    if isinstance(error, LoratoolError):
        told = error
    else:
        told = FormatError(f"cannot be read: {getattr(error, 'strerror', None) or error}", file=path)
        told.__cause__ = error
    yield from checks()["place"].run(Place(path, told))


def _run(subject: str, what: object) -> Iterator[Finding]:
    for check in checks().values():
        if check.subject == subject:
            yield from check.run(what)


def _result(path: str, findings: Iterable[Finding], deep: bool, size: int) -> Validated:
    kept: list[Finding] = []
    seen: dict[tuple[str, str], int] = {}
    for finding in findings:
        place = finding.code, finding.file
        seen[place] = seen.get(place, 0) + 1
        if seen[place] <= MOST_OF_ONE:
            kept.append(finding)
    more: dict[str, int] = {}
    for (code, _), count in seen.items():
        if count > MOST_OF_ONE:
            more[code] = more.get(code, 0) + count - MOST_OF_ONE
    kept.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Validated(path, tuple(kept), more, deep, size)


def _file(path: str, base: str | None, deep: bool | None) -> Validated:
    """One file, with the config beside it if it is PEFT's."""
    from loratool.files.subjects import Folder

    place = Path(path)
    file, findings = _looked(path)
    depth = _depth(deep, file.handle.size)
    config = place.with_name(CONFIG)
    beside = place.name in (MODEL, OLD_MODEL)
    sides = _sides({"": str(config)}) if beside else {}
    content = _content(path, (("", file),), sides, base, depth)
    if content is not None:
        findings += _run("content", content)
    if beside:
        adapter = content.reading.adapter if content is not None else None
        findings += _run("folder", Folder(str(place.parent), {"": str(config)}, adapter=adapter))
    return _result(path, findings, depth is True and content is not None, file.handle.size)


def _looked(path: str) -> tuple[File, list[Finding]]:
    """A file, and what is wrong with it as a file. Of a PyTorch file nothing is run to see what it holds."""
    from loratool.files.look import look
    from loratool.files.pickles import read_pickle
    from loratool.files.subjects import Place

    file = look(path)
    findings = list(_run("file", file))
    if file.kind in PICKLED:
        try:
            file = replace(file, unpickled=read_pickle(path))
        except LoratoolError as error:
            findings += checks()["place"].run(Place(path, error, pickled=True))
    return file, findings


def _depth(asked: bool | None, size: int) -> bool | None:
    """Whether numbers are read; None where nobody asked, and they are too many."""
    return asked if asked is not None else True if size <= DEEP_UP_TO else None


def _sides(configs: Mapping[str, str]) -> dict[str, str]:
    """The configs that can be read, by their name in a bundle."""
    found = {}
    for prefix, path in configs.items():
        try:
            text = side_file(Path(path))
        except (LoratoolError, OSError):
            continue
        if text is not None:
            found[prefix + CONFIG] = text
    return found


def _content(
    path: str,
    files: Sequence[tuple[str, File]],
    sides: Mapping[str, str],
    base: str | None,
    depth: bool | None,
    part: bool = False,
) -> Content | None:
    """What the files hold; None if nothing in them can be used. `depth` is None where there are too many numbers."""
    tensors: dict[str, LazyTensor] = {}
    metadata: dict[str, str] = {}
    for prefix, file in files:
        tensors |= {prefix + key: tensor for key, tensor in file.tensors.items()}
        metadata |= file.metadata
    usable = [file for _, file in files if file.usable]
    if not usable or (not tensors and not all(file.sound for file in usable)):
        return None
    size = sum(file.handle.size for _, file in files)
    bundle = Bundle(tensors, metadata, dict(sides), path, size)
    return _understood(path, tuple(usable), bundle, base, depth, part)


def _understood(
    path: str, files: tuple[File, ...], bundle: Bundle, base: str | None, depth: bool | None, part: bool = False
) -> Content:
    """What tensors mean, compared with a base that was named."""
    from loratool.core.tolerant import Reading, understood
    from loratool.files.subjects import Content
    from loratool.ops.against import against

    if part or len(bundle.tensors) > MOST_TENSORS:
        return Content(path, files, bundle, Reading(), depth is True, depth is None, part, many=not part)
    plain = Content(path, files, bundle, Reading(), depth is True, depth is None)
    if base is None:
        return replace(plain, reading=understood(bundle))
    fit = against(base, bundle)
    return replace(plain, reading=fit.reading, base=base, misfits=fit.misfits, base_error=fit.error)


class _Folder:
    """An adapter's or a checkpoint's folder."""

    def __init__(self, path: str, base: str | None, deep: bool | None) -> None:
        self.path, self.base, self.deep = path, base, deep
        self.findings: list[Finding] = []
        self.keys: dict[str, frozenset[str]] = {}
        self.size = 0

    def result(self) -> Validated:
        """Everything that was found in it."""
        place = Path(self.path)
        indices = [str(file) for folder in self._folders(place) for file in folder if _INDEX in file.name]
        if indices:
            return self._checkpoint(place, indices)
        whole = any((place / name).is_file() or (place / name).is_symlink() for name in (CONFIG, MODEL, OLD_MODEL))
        configs = {"": str(place / CONFIG)} if whole else {}
        parts = {} if configs else {f"{sub.name}/": sub for sub in sorted(place.iterdir()) if is_component_folder(sub)}
        configs |= {prefix: str(sub / CONFIG) for prefix, sub in parts.items()}
        if configs:
            return self._peft(configs)
        files = sorted(file for file in place.iterdir() if file.suffix == ".safetensors")
        if len(files) == 1:
            return _file(str(files[0]), self.base, self.deep)
        what = f"is a folder with {len(files)} safetensors files" if files else "is a folder without a LoRA in it"
        raise FormatError(what, file=self.path, hint="name one of them" if files else "name a LoRA file")

    def _folders(self, place: Path) -> Iterator[list[Path]]:
        """The files of the folder and of the folders in it: no deeper, so that no link leads in circles."""
        entries = sorted(place.iterdir())
        yield [entry for entry in entries if not entry.is_dir()]
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith("."):
                yield sorted(file for file in entry.iterdir() if not file.is_dir())

    def _look(self, path: str) -> File | None:
        try:
            file, findings = _looked(path)
        except LoratoolError as error:
            self.findings += _unreadable(path, error)
            return None
        self.size += file.handle.size
        self.findings += findings
        if file.scan is not None:
            self.keys[os.path.relpath(path, self.path)] = frozenset(file.scan.entries)
        return file

    def _peft(self, configs: Mapping[str, str]) -> Validated:
        from loratool.files.subjects import Folder

        looked = [(prefix, self._look(str(model_of(Path(path).parent)))) for prefix, path in configs.items()]
        files = [(prefix, file) for prefix, file in looked if file is not None]
        depth = _depth(self.deep, self.size)
        content = _content(self.path, files, _sides(configs), self.base, depth)
        if content is not None:
            self.findings += _run("content", content)
        adapter = content.reading.adapter if content is not None else None
        self.findings += _run("folder", Folder(self.path, configs, adapter=adapter))
        return _result(self.path, self.findings, depth is True and content is not None, self.size)

    def _checkpoint(self, place: Path, indices: Sequence[str]) -> Validated:
        from loratool.files.look import special
        from loratool.files.subjects import Folder

        files = [file for folder in self._folders(place) for file in folder if file.suffix == ".safetensors"]
        looked = [self._look(str(file)) for file in files if special(str(file)) is None]
        depth = _depth(self.deep, self.size)
        read = False
        for file in looked:
            content = None if file is None else _content(file.path, [("", file)], {}, None, depth, part=True)
            if content is not None:
                read = depth is True
                self.findings += _run("content", content)
        self.findings += _run("folder", Folder(self.path, {}, tuple(indices), self.keys))
        return _result(self.path, self.findings, read, self.size)
