"""Files that programs read and write: regular ones, checked before the work, and replaced as a whole.

A program that works for an hour and then finds that its result cannot be written has lost the hour; one that opens a
pipe as its input waits for ever; one that renames its result over ``/dev/null`` has broken the machine. So inputs go
through `open_input`, and outputs through `check_output` before the work and `replacing` after it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class FileError(ValueError):
    """A path that a program cannot read from or write to; the message says why, and what to give."""


def open_input(path: str | os.PathLike) -> BinaryIO:
    """A regular file, opened to read bytes; the caller closes it.

    Raises `FileError` for a folder, a pipe, a socket or a device, without waiting for any of them, and OSError, with
    its own words, for what cannot be opened.
    """
    kind = kind_of(os.stat(path).st_mode)
    if kind is not None:  # before it is opened: to open a device may already do something
        raise FileError(f"{path} is {kind}, not a file to read from")
    file = open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    kind = kind_of(os.fstat(file.fileno()).st_mode)
    if kind is not None:  # it changed meanwhile
        file.close()
        raise FileError(f"{path} is {kind}, not a file to read from")
    return file


def kind_of(mode: int) -> str | None:
    """What a file of this ``st_mode`` is, in words; None for a regular file."""
    if stat.S_ISREG(mode):
        return None
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISLNK, "a link that leads nowhere"),
    )
    return next((words for test, words in kinds if test(mode)), "no regular file")


def check_output(path: str | os.PathLike, option: str, inputs: Iterable[str | os.PathLike] = (), size: int = 0) -> None:
    """Raises `FileError`, naming `option`, unless a file of `size` bytes can be written to `path`, as it is now.

    Its folder must exist and take new files, and what is there already must be a regular file that may be written; a
    link counts as what it leads to. inputs: files that the program reads; it is none of them.
    """
    target = _target(path, option)
    if _is_there(target, option):
        if not os.access(target, os.W_OK):
            raise FileError(f"{option}: {path} is write-protected; choose another name, or allow writing to it")
        for other in inputs:
            if os.path.exists(other) and os.path.samefile(target, other):
                raise FileError(f"{option}: {path} is what is read; choose another name")
    try:
        temporary = _temporary(target)
        with open(temporary, "xb"):
            pass
        temporary.unlink()
    except OSError as error:
        raise FileError(f"{option}: nothing can be written to {target.parent} ({error.strerror})") from None
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise FileError(f"{option}: {path} takes {size} bytes, but {free} are free; make room, or choose another place")


def make_output(path: str | os.PathLike, option: str) -> None:
    """`check_output` after making the folders that lead to `path`. Raises `FileError`."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{option}: {error.filename} cannot be made ({error.strerror}); choose another place") from None
    check_output(path, option)


@contextmanager
def replacing(path: str | os.PathLike, option: str = "output") -> Iterator[BinaryIO]:
    """A new file, open for writing and reading, that takes the place of the regular file `path` when it is complete.

    If anything fails, `path` is as it was. A file that was there hands on its permissions. Raises `FileError` and
    OSError.
    """
    target = _target(path, option)
    temporary = _temporary(target)
    try:
        with open(temporary, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if _is_there(target, option):
            os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str, option: str = "output") -> None:
    """Write `text` as UTF-8, as `replacing` does."""
    with replacing(path, option) as file:
        file.write(text.encode("utf-8"))


def _target(path: str | os.PathLike, option: str) -> Path:
    """Where a file of this name lies: links are followed. Raises `FileError` where there is no folder for it."""
    if not os.fspath(path):
        raise FileError(f"{option} is empty; give the name of the file to write")
    target = Path(os.path.realpath(path))
    folder = target.parent
    if not folder.exists():
        raise FileError(f"{option}: there is no folder {folder}; make it, or choose another place")
    if not folder.is_dir():
        raise FileError(f"{option}: {folder} is not a folder; choose another place")
    return target


def _is_there(target: Path, option: str) -> bool:
    """Whether there is a file; raises `FileError` for one that is not regular, or whose name is impossible."""
    try:
        kind = kind_of(os.lstat(target).st_mode)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise FileError(f"{option}: {target} cannot be written ({error.strerror}); choose another name") from None
    if kind is not None:
        raise FileError(f"{option}: {target} is {kind}; give the name of the file to write")
    return True


def _temporary(target: Path) -> Path:
    """A name next to the file, which nothing else has."""
    return target.with_name(f".{target.name[:32]}.{secrets.token_hex(6)}.tmp")
