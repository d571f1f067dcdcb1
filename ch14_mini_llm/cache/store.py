"""Below the device: blocks of keys and values in the host's memory, and in files, by what they hold.

A block's name is a digest of the model, of how the pages are laid out, and of all tokens from the text's first to the
block's last: keys and values depend on nothing else. So a block that was written by another process, or a week ago, is
the one that would be computed now, and processes on one machine share a folder without talking to each other.

    device ──evicted──> host's memory ──too full──> files ──too full──> gone
       <──────────── a request begins with its tokens ────────────┘

A name is found by a digest, but what is used has been compared: the file says for which model and tokens it is, and has
a checksum of its content. One that is cut, damaged, or another's is as good as none. Files are written aside and then
renamed, so no reader ever sees half of one.

Source: the tiers of SGLang's HiCache and of Mooncake (Qin et al. 2024), each in some thousand lines more.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ch14_mini_llm.files import FileError

MAGIC, VERSION = b"KBKBLOCK", 1
LEFT = 0.9  # of the room on disk, when files were removed because there was too little
ENDING = ".kv"


class BlockStore:
    """Blocks of one model. model: a digest of its weights. shape, dtype: of a block, all layers. folder: for files, or
    None. host_bytes, disk_bytes: room. Raises `FileError` for a folder that cannot be used.

    counts: host_puts, disk_puts, host_hits, disk_hits, refused (files that are not what they should be), failed (that
    could not be written).
    """

    def __init__(
        self, model: str, shape: Sequence[int], dtype, folder: str | os.PathLike | None = None, host_bytes: int = 0,
        disk_bytes: int = 1 << 32,
    ) -> None:  # fmt: skip
        self.model, self.shape, self.dtype = model, tuple(map(int, shape)), np.dtype(dtype)
        self.size = int(np.prod(self.shape)) * self.dtype.itemsize
        self.host_bytes, self.disk_bytes = host_bytes, disk_bytes
        self.counts: Counter[str] = Counter()
        layout = json.dumps([VERSION, model, self.shape, self.dtype.str])
        self.root = hashlib.blake2b(layout.encode(), digest_size=16).digest()  # the name of no tokens
        self._host: OrderedDict[bytes, tuple[bytes, tuple[int, ...], np.ndarray]] = OrderedDict()
        self.folder = None if folder is None else make_folder(Path(folder) / self.root.hex())
        self._on_disk = 0 if self.folder is None else sum(size for _, size, _ in self._files())

    def name(self, parent: bytes, tokens: Sequence[int]) -> bytes:
        """The name of a block with these tokens behind the block ``parent``, or behind `root`."""
        return hashlib.blake2b(parent + np.array(tokens, np.int64).tobytes(), digest_size=16).digest()

    def names(self, tokens: Sequence[int], block_size: int) -> list[bytes]:
        """The names of a text's full blocks."""
        found, name = [], self.root
        for end in range(block_size, len(tokens) + 1, block_size):
            found.append(name := self.name(name, tokens[end - block_size : end]))
        return found

    def remove(self, name: bytes) -> None:
        """Forget a block."""
        self._host.pop(name, None)
        if self.folder is not None:
            self._remove(self._path(name), self.size)

    def put(self, name: bytes, parent: bytes, tokens: tuple[int, ...], read: Callable[[], np.ndarray]) -> None:
        """Take a block in that the device is about to lose. read(): its content."""
        if name in self._host:
            self._host.move_to_end(name)
        elif self.folder is not None and self._path(name).exists():
            self._touch(name)
        elif self.size <= self.host_bytes:
            self._host[name] = parent, tokens, read()
            self.counts["host_puts"] += 1
            while len(self._host) * self.size > self.host_bytes:
                self._write(*self._lose_oldest())
        else:
            self._write(name, parent, tokens, read)

    def save(self, name: bytes, parent: bytes, tokens: tuple[int, ...], read: Callable[[], np.ndarray]) -> bool:
        """Write a block to its file, if it is not there. Returns whether it is there now."""
        if self.folder is None:
            return False
        if self._path(name).exists():
            self._touch(name)
            return True
        return self._write(name, parent, tokens, read)

    def get(self, name: bytes, parent: bytes, tokens: tuple[int, ...]) -> np.ndarray | None:
        """The content of a block, of `shape`; None if there is none for these tokens."""
        found = self._host.get(name)
        if found is not None and found[:2] == (parent, tokens):
            self._host.move_to_end(name)
            self.counts["host_hits"] += 1
            return found[2]
        if self.folder is None:
            return None
        try:
            data = self._path(name).read_bytes()
        except OSError:
            return None
        values = self._content(data, parent, tokens)
        if values is None:
            self.counts["refused"] += 1
            self._remove(self._path(name), len(data))  # or it would be found, and refused, for ever
            return None
        self._touch(name)
        self.counts["disk_hits"] += 1
        return values

    # --- files -------------------------------------------------------------------------------------------------------

    def _path(self, name: bytes) -> Path:
        text = name.hex()
        return self.folder / text[:2] / (text + ENDING)

    def _header(self, parent: bytes, tokens: tuple[int, ...], crc32: int) -> bytes:
        fields = {
            "version": VERSION, "model": self.model, "shape": self.shape, "dtype": self.dtype.str,
            "parent": parent.hex(), "tokens": tokens, "crc32": f"{crc32:08x}",
        }  # fmt: skip
        return MAGIC + b"\n" + json.dumps(fields).encode() + b"\n"

    def _content(self, data: bytes, parent: bytes, tokens: tuple[int, ...]) -> np.ndarray | None:
        """The content of a file, None if it is not what it should be."""
        payload = memoryview(data)[max(0, len(data) - self.size) :]
        header = self._header(parent, tokens, zlib.crc32(payload))
        if len(data) != len(header) + self.size or data[: len(header)] != header:
            return None
        return np.frombuffer(payload, self.dtype).reshape(self.shape)

    def _write(self, name: bytes, parent: bytes, tokens: tuple[int, ...], read: Callable[[], np.ndarray]) -> bool:
        if self.folder is None:
            return False
        path, payload = self._path(name), np.ascontiguousarray(read())
        header = self._header(parent, tokens, zlib.crc32(payload))
        if self._on_disk + len(header) + self.size > self.disk_bytes:
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
        self._on_disk += len(header) + self.size
        self.counts["disk_puts"] += 1
        return True

    def _lose_oldest(self) -> tuple:
        name, (parent, tokens, values) = self._host.popitem(last=False)
        return name, parent, tokens, lambda: values

    def _touch(self, name: bytes) -> None:
        try:
            os.utime(self._path(name))
        except OSError:
            pass  # another process has removed it

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
        self._on_disk = sum(size for _, size, _ in files)
        for _, n, path in files:
            if self._on_disk + size <= LEFT * self.disk_bytes:
                return
            self._remove(path, n)

    def _remove(self, path: Path, size: int) -> None:
        try:
            path.unlink()
        except OSError:
            return
        self._on_disk -= size


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
