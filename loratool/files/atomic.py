"""Atomic output: a file gets its name when it is complete, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from loratool.core.errors import LoratoolError

# File names are limited to 255 bytes almost everywhere; what is added here takes 23.
_LONGEST_STEM = 220


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Gives the path of an empty temporary file beside `path`; it becomes `path` when the block ends well.

    The file is flushed to the disk before it gets its name, and so is the folder. Any exception,
    KeyboardInterrupt included, removes the temporary file and leaves `path` as it was. A symbolic link is replaced,
    not followed. Without `overwrite` a file that appears in the meantime is not replaced either.

    Raises LoratoolError at once when the folder is missing or cannot be written to, when `path` exists (without
    `overwrite`), or when it is anything but a regular file.
    """
    target = Path(path)
    _check_target(target, overwrite)
    temporary = _create(target)
    try:
        yield temporary
        try:
            _flush(temporary)
            _publish(temporary, target, overwrite)
        except OSError as error:
            raise LoratoolError(f"cannot be written: {error.strerror}", file=str(target)) from error
        _flush_folder(target.parent)
    finally:
        # After publishing, the name is gone already.
        temporary.unlink(missing_ok=True)


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


def _create(target: Path) -> Path:
    import secrets

    stem = os.fsencode(target.name)[:_LONGEST_STEM].decode("utf-8", "ignore")
    temporary = target.with_name(f".{stem}.loratool-{secrets.token_hex(4)}.tmp")
    try:
        # The system applies the umask to the mode.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        hint = "choose a folder that you can write to" if isinstance(error, PermissionError) else None
        raise LoratoolError(f"cannot be written: {error.strerror}", file=str(target), hint=hint) from error
    return temporary


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


def _flush_folder(folder: Path) -> None:
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
