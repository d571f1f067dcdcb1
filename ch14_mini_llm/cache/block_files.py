"""Blocks of keys and values in files, one each, in a folder that processes share.

A file says for which model, layout and tokens it is, and has a checksum of its content; all that is compared before the
content is used. One that is cut, damaged, or another's is as good as none. Files are written aside and then renamed, so
no reader ever sees half of one.
"""

from __future__ import annotations

import json
import os
import secrets
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ch14_mini_llm.files import FileError

MAGIC, VERSION = b"KBKBLOCK", 1
READERS = min(16, os.cpu_count() or 1)  # threads; reading and checking are both done without Python's lock
HEADER_BYTES = 1 << 20  # no header is longer
LEFT = 0.9  # of the room on disk, when files were removed because there was too little
ENDING = ".kv"


class Text(NamedTuple):
    """What a block holds. name: see `BlockStore.name`. parent: the name of the block in front. tokens: its own."""

    name: bytes
    parent: bytes
    tokens: tuple[int, ...]


class BlockFiles:
    """The files of one layout: what all headers have in common. size: bytes of a block. room: bytes of all files.
    counts: see `BlockStore`. Raises `FileError` for a folder that cannot be used."""

    def __init__(self, folder: Path, layout: dict, size: int, room: int, counts: Counter) -> None:
        self.folder, self.layout, self.size, self.room, self.counts = make_folder(folder), layout, size, room, counts
        self._used = sum(size for _, size, _ in self._files())
        self._readers: ThreadPoolExecutor | None = None

    def path(self, name: bytes) -> Path:
        """Where a block's file is, if there is one."""
        return Path(self._path(name))

    def _path(self, name: bytes) -> str:
        text = name.hex()
        return f"{self.folder}{os.sep}{text[:2]}{os.sep}{text}{ENDING}"

    def has(self, name: bytes) -> bool:
        """Whether there is a file of this name; it counts as used now."""
        try:
            os.utime(self._path(name))
        except OSError:
            return False
        return True

    def read(self, wanted: Sequence[tuple[Text, memoryview]]) -> list[bool]:
        """Bring files to the host's memory; which of them were there, and are what they should be."""
        if not wanted or not self.has(wanted[0][0].name):  # the usual case, and not worth a thread
            return [False] * len(wanted)
        if self._readers is None:
            self._readers = ThreadPoolExecutor(READERS)
        found = list(self._readers.map(lambda one: self._read(*one), wanted))
        for text, _ in (one for one, right in zip(wanted, found) if right is False):
            self.counts["refused"] += 1
            self.remove(text.name)  # or it would be found, and refused, for ever
        return [right is True for right in found]

    def _read(self, text: Text, payload: memoryview) -> bool | None:
        """Whether a file is what it should be; None: there is none."""
        try:
            with open(self._path(text.name), "rb", buffering=0) as file:
                n_header = os.fstat(file.fileno()).st_size - self.size
                if not 0 < n_header <= HEADER_BYTES:
                    return False
                header = file.read(n_header)
                if file.readinto(payload) != self.size or header != self._header(text, zlib.crc32(payload)):
                    return False
        except OSError:
            return None
        self.has(text.name)
        return True

    def write(self, text: Text, payload: memoryview) -> bool:
        """Write a block's file; returns whether it is there now."""
        path, header = self.path(text.name), self._header(text, zlib.crc32(payload))
        if self._used + len(header) + self.size > self.room:
            self._make_room(len(header) + self.size)
        aside = path.with_name(f".{secrets.token_hex(6)}.tmp")
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            with open(aside, "xb") as file:
                file.write(header)
                file.write(payload)
            os.replace(aside, path)
        except OSError:  # a full disk costs a computation later, not the answer now
            self.counts["failed"] += 1
            aside.unlink(missing_ok=True)
            return False
        self._used += len(header) + self.size
        self.counts["disk_puts"] += 1
        return True

    def remove(self, name: bytes) -> None:
        """Remove a block's file, if there is one."""
        path = self.path(name)
        try:
            self._remove(path, path.stat().st_size)
        except OSError:
            pass  # another process has removed it

    def _header(self, text: Text, crc32: int) -> bytes:
        own = {"parent": text.parent.hex(), "tokens": text.tokens, "crc32": f"{crc32:08x}"}
        return MAGIC + b"\n" + json.dumps({"version": VERSION, **self.layout, **own}).encode() + b"\n"

    def _files(self) -> list[tuple[float, int, Path]]:
        """(when it was last used, bytes, path) of all files."""
        found = []
        for path in self.folder.glob(f"*/*{ENDING}"):
            try:
                stat = path.stat()
            except OSError:
                continue
            found.append((stat.st_mtime, stat.st_size, path))
        return found

    def _make_room(self, size: int) -> None:
        """Remove the files that were used longest ago, those of other processes as well."""
        files = sorted(self._files())
        self._used = sum(size for _, size, _ in files)
        for _, n, path in files:
            if self._used + size <= LEFT * self.room:
                return
            try:
                self._remove(path, n)
            except OSError:
                pass

    def _remove(self, path: Path, size: int) -> None:
        path.unlink()
        self._used -= size


def make_folder(path: Path) -> Path:
    """A folder that is ours alone: what was said to the model is in it. Raises `FileError`."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        stat = path.stat()
    except OSError as error:
        raise FileError(f"--kv_dir: {path} cannot be made ({error.strerror}); choose another place") from None
    if hasattr(os, "getuid") and (stat.st_uid != os.getuid() or stat.st_mode & 0o022):
        raise FileError(f"--kv_dir: {path} belongs to somebody else, or others may write to it; choose another place")
    if not os.access(path, os.W_OK | os.X_OK):
        raise FileError(f"--kv_dir: {path} cannot be written to; choose another place")
    return path
