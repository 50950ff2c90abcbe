"""What baking and unbaking share while they write: temporary files or folders, and progress from many threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loratool.files.atomic import atomic_folder, atomic_write, check_room, scratch_folder
from loratool.files.checkpoint import CheckpointFiles, WeightFile
from loratool.ops.bake_folder import Others, bring_others, bytes_copied

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total): bytes while writing, tensors otherwise."""


@dataclass(frozen=True)
class Places:
    """Where files are written until they get their names; `folder` is that of a folder, with its other files in it."""

    files: Mapping[WeightFile, Path]
    folder: Path | None
    others: Others


def check_places(output: Path, checkpoint: CheckpointFiles, rewritten: Sequence[WeightFile], nbytes: int) -> None:
    """Raises LoratoolError unless there is room for `nbytes` and the other files of a folder that will be copied."""
    beside = 0
    if checkpoint.folder:
        beside = bytes_copied(Path(checkpoint.path), output, {one.name for one in rewritten})
    check_room(output.absolute().parent, nbytes + beside)


@contextmanager
def temporary_places(
    output: Path, checkpoint: CheckpointFiles, rewritten: Sequence[WeightFile], overwrite: bool
) -> Iterator[Places]:
    """Empty files for those that are rewritten; all get their names when the block ends well, else none does."""
    if not checkpoint.folder:
        with atomic_write(output, overwrite) as file:
            yield Places(dict.fromkeys(rewritten, file), None, Others(0, 0))
        return
    with atomic_folder(output, overwrite) as folder:
        others = bring_others(Path(checkpoint.path), folder, {one.name for one in rewritten})
        places = {one: folder / one.name for one in rewritten}
        for place in places.values():
            place.touch()
        yield Places(places, folder, others)


@contextmanager
def scratch_places(
    output: Path, rewritten: Sequence[WeightFile], overwrite: bool
) -> Iterator[tuple[Path, Mapping[WeightFile, Path]]]:
    """An empty file that becomes `output` when the block ends well, and one for each that is rewritten, which go."""
    with atomic_write(output, overwrite) as file, scratch_folder(output) as folder:
        places = {one: folder / f"{number}.safetensors" for number, one in enumerate(rewritten)}
        for place in places.values():
            place.touch()
        yield file, places


class Ticker:
    """Adds up what threads have done, and tells it."""

    def __init__(self, progress: Progress | None, stage: str, total: int) -> None:
        self._progress, self._stage, self._total = progress, stage, total
        self._done = 0
        self._lock = threading.Lock()

    def __call__(self, amount: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._done += amount
                self._progress(self._stage, self._done, self._total)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
