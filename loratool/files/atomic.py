"""Atomic output: a file gets its name when it is complete, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loratool.core.errors import LoratoolError

# File names are limited to 255 bytes almost everywhere; what is added here takes 23.
_LONGEST_STEM = 220


try:
    import fcntl
except ImportError:  # Windows: leftovers of a killed run stay
    fcntl = None  # type: ignore[assignment]


_unfinished: set[Path] = set()
"""Temporary files and folders of this process."""


def remove_unfinished() -> None:
    """Removes what this process has not finished: for one that ends without leaving its blocks."""
    for temporary in list(_unfinished):
        with contextlib.suppress(OSError):
            if temporary.is_dir() and not temporary.is_symlink():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Gives the path of an empty temporary file beside `path`; it becomes `path` when the block ends well.

    The file is flushed to the disk before it gets its name, and so is the folder. Any exception,
    KeyboardInterrupt included, removes the temporary file and leaves `path` as it was. A symbolic link is replaced,
    not followed. Without `overwrite` a file that appears in the meantime is not replaced either. What a run for the
    same `path` left when it was killed is removed first.

    Raises LoratoolError at once when the folder is missing or cannot be written to, when `path` exists (without
    `overwrite`), or when it is anything but a regular file.
    """
    target = Path(path)
    _check_target(target, overwrite)
    _remove_leftovers(target)
    temporary, lock = _temporary_name(target), -1
    _unfinished.add(temporary)  # before it is there: a signal may come at once
    try:
        lock = _create(temporary, target)
        with _told_as(temporary, target):
            yield temporary
        try:
            _flush(temporary)
            _publish(temporary, target, overwrite)
            flush_folder(target.parent)
        except OSError as error:
            raise LoratoolError(f"cannot be written: {error.strerror}", file=str(target)) from error
    finally:
        # After publishing, the name is gone already.
        with contextlib.suppress(OSError):  # a name that is too long for the system
            temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)
        if lock >= 0:
            os.close(lock)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Gives the path of an empty temporary folder beside `path`; it becomes `path` when the block ends well.

    Its files are flushed before. An existing folder is replaced with `overwrite`, an empty one without. Any exception
    removes the temporary folder and leaves `path` as it was, as do leftovers of a killed run, see `atomic_write`.
    """
    target = Path(path)
    if target.exists() and not overwrite and any(target.iterdir()):
        raise _exists(target)
    with scratch_folder(target) as temporary:
        with _told_as(temporary, target):
            yield temporary
        try:
            for place, _, names in os.walk(temporary):
                for name in names:
                    if os.stat(os.path.join(place, name)).st_nlink == 1:  # what is linked is on the disk already
                        _flush(Path(place, name))
                flush_folder(Path(place))
            _swap(temporary, target)
            flush_folder(target.parent)
        except OSError as error:
            raise LoratoolError(f"cannot be written: {error.strerror}", file=str(target)) from error


@contextlib.contextmanager
def scratch_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives the path of an empty folder beside `path` for what is needed on the way to it.

    It is removed when the block ends; what a run for the same `path` left when it was killed is removed first.
    """
    target = Path(path)
    _remove_leftovers(target)
    temporary, lock = _temporary_name(target), -1
    _unfinished.add(temporary)  # before it is there: a signal may come at once
    try:
        try:
            temporary.mkdir()
            lock = _locked(os.open(temporary, os.O_RDONLY))
        except OSError as error:
            raise LoratoolError(f"cannot be written: {error.strerror}", file=str(target)) from error
        with _told_as(temporary, target, inside=False):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _unfinished.discard(temporary)
        if lock >= 0:
            os.close(lock)


@contextlib.contextmanager
def _told_as(temporary: Path, target: Path, inside: bool = True) -> Iterator[None]:
    """Errors about what is not finished name what it was to become: the other name is gone when they are read.

    Files of a folder that does not become the target itself (not `inside`) go by the target's name.
    """

    def final(name: str | None) -> str | None:
        path = Path(name or "")
        if path == temporary or temporary in path.parents:
            return str(target / path.relative_to(temporary) if inside else target)
        return name

    try:
        yield
    except LoratoolError as error:
        error.file = final(error.file)
        raise
    except OSError as error:
        error.filename = final(error.filename)
        raise


def _swap(temporary: Path, target: Path) -> None:
    """Gives a folder its name. What had it goes last: a run that is killed between leaves one of the two whole."""
    link = target.is_symlink()  # replaced, not followed
    if not link and (not target.exists() or not any(target.iterdir())):
        os.replace(temporary, target)
        return
    old = _temporary_name(target)
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:  # KeyboardInterrupt included
        os.rename(old, target)
        raise
    if link:
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)


def check_room(folder: Path, nbytes: int) -> None:
    """Raises LoratoolError if a file system has less room than that."""
    if not hasattr(os, "statvfs"):
        return
    try:
        found = os.statvfs(folder)
    except OSError:
        return  # there is no such folder: the writing says so
    free = found.f_bavail * found.f_frsize
    if free < nbytes:
        unit, name = (1 << 30, "GiB") if nbytes >= 1 << 30 else (1 << 20, "MiB")
        raise LoratoolError(
            f"there is not enough room: {free / unit:.1f} {name} free, {nbytes / unit:.1f} {name} needed",
            file=str(folder),
            hint="free some, or choose another -o",
        )


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.name or target.name == "..":
        raise LoratoolError("the output is a folder, expected a file name", file=str(target))
    folder = target.parent
    if not folder.exists():
        raise LoratoolError("the folder of the output does not exist", file=str(target), hint=f"create {folder} first")
    if not folder.is_dir():
        raise LoratoolError(f"{folder} is not a folder", file=str(target))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        if not target.is_symlink():
            return
        mode = stat.S_IFREG  # a link to nothing is replaced like a file
    except OSError as error:
        raise LoratoolError(f"cannot be written: {error.strerror}", file=str(target)) from error
    if stat.S_ISDIR(mode):
        raise LoratoolError("the output is a folder, expected a file name", file=str(target))
    if not stat.S_ISREG(mode):
        raise LoratoolError("the output is not a regular file", file=str(target), hint="choose another output")
    if not overwrite:
        raise _exists(target)


def _create(temporary: Path, target: Path) -> int:
    """Makes a new file. The descriptor says that somebody is at work on it, as long as it is open."""
    try:
        # The system applies the umask to the mode.
        return _locked(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        hint = "choose a folder that you can write to" if isinstance(error, PermissionError) else None
        raise LoratoolError(f"cannot be written: {error.strerror}", file=str(target), hint=hint) from error


def _stem(target: Path) -> str:
    return os.fsencode(target.name)[:_LONGEST_STEM].decode("utf-8", "ignore")


def _temporary_name(target: Path) -> Path:
    import secrets

    return target.with_name(f".{_stem(target)}.loratool-{secrets.token_hex(4)}.tmp")


def _locked(descriptor: int) -> int:
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a network file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _remove_leftovers(target: Path) -> None:
    """Removes temporary files and folders of `target` that nobody is at work on any more: their run was killed."""
    if fcntl is None:
        return
    name = re.compile(re.escape(f".{_stem(target)}.loratool-") + r"[0-9a-f]{8}\.tmp")
    with contextlib.suppress(OSError):
        for found in [entry for entry in os.scandir(target.parent) if name.fullmatch(entry.name)]:
            _remove_if_left(found)


def _remove_if_left(found: os.DirEntry[Any]) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(found.path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if found.is_dir(follow_symlinks=False):
                shutil.rmtree(found.path, ignore_errors=True)
            else:
                os.unlink(found.path)
        finally:
            os.close(descriptor)


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(temporary: Path, target: Path, overwrite: bool) -> None:
    if not overwrite:
        try:
            # A hard link, unlike a rename, fails when the name was taken since we looked.
            os.link(temporary, target)
            return
        except FileExistsError:
            raise _exists(target) from None
        except OSError:
            # No hard links on this file system: look once more and rename.
            if os.path.lexists(target):
                raise _exists(target) from None
    os.replace(temporary, target)


def flush_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # Windows cannot open folders; the file itself is complete
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Network file systems answer that there is nothing to flush.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(descriptor)


def _exists(target: Path) -> LoratoolError:
    return LoratoolError("output exists", file=str(target), hint="use --overwrite")
