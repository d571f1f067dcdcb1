"""Below the device: blocks of keys and values in the host's memory, and in files, by what they hold.

A block's name is a digest of the model, of how the pages are laid out, and of all tokens from the text's first to the
block's last: keys and values depend on nothing else. So a block that was written by another process, or a week ago, is
the one that would be computed now, and processes on one machine share a folder without talking to each other.

    device ──evicted──> host's memory ──too full──> files ──too full──> gone
       <──────────── a request begins with its tokens ────────────┘

A name is found by a digest, but what is used has been compared: tokens here, and all that a file's header says
(`cache.block_files`).

The host's blocks are slots of one array, which the device reads and writes by itself (chapter 13's ``kv_blocks``). Its
last slots keep nothing: what is on its way between device and files passes through them.

Source: the tiers of SGLang's HiCache and of Mooncake (Qin et al. 2024), each in some thousand lines more.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ch14_mini_llm.cache.block_files import VERSION, BlockFiles, Text

PASSING, PASSING_BYTES = 32, 1 << 28  # slots at most, and as many as have room in so much, but two

Named = tuple[Text, int]  # what a block of the device holds, and its number
Read = Callable[[list[int], Sequence[int]], None]  # (blocks, slots): brings blocks of the device to slots


class BlockStore:
    """Blocks of one model. model: a digest of its weights. shape, dtype: of a block, all layers. folder: for files, or
    None. host_bytes, disk_bytes: room. memory: makes the array for so many blocks, its first axis the slots'; without
    one there are names and files, and no content. Raises `FileError` for a folder that cannot be used.

    counts: host_puts, disk_puts, host_hits, disk_hits, refused (files that are not what they should be), failed (that
    could not be written).
    """

    def __init__(
        self, model: str, shape: Sequence[int], dtype, folder: str | os.PathLike | None = None, host_bytes: int = 0,
        disk_bytes: int = 1 << 32, memory: Callable[[int], np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.shape, self.dtype = model, tuple(map(int, shape)), np.dtype(dtype)
        layout = {"model": model, "shape": self.shape, "dtype": self.dtype.str}
        named = json.dumps([VERSION, *layout.values()]).encode()
        self.root = hashlib.blake2b(named, digest_size=16).digest()  # the name of no tokens
        self.counts: Counter[str] = Counter()
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        self.files = None
        if folder is not None:
            self.files = BlockFiles(Path(folder) / self.root.hex(), layout, size, disk_bytes, self.counts)
        self.n_host = host_bytes // size
        self.passing = range(self.n_host, self.n_host + max(2, min(PASSING, PASSING_BYTES // size)))
        self.memory = None if memory is None else memory(self.passing.stop)
        self._host: OrderedDict[bytes, Named] = OrderedDict()  # name → text and slot, in the order of their last use
        self._free = list(reversed(range(self.n_host)))

    def name(self, parent: bytes, tokens: Sequence[int]) -> bytes:
        """The name of a block with these tokens behind the block ``parent``, or behind `root`."""
        return hashlib.blake2b(parent + np.asarray(tokens, np.int64).tobytes(), digest_size=16).digest()

    def texts(self, tokens: Sequence[int], block_size: int, start: int = 0, parent: bytes | None = None) -> list[Text]:
        """What a text's full blocks hold, from number ``start`` on, behind the block ``parent``."""
        found, name, numbers = [], self.root if parent is None else parent, np.array(tokens, np.int64)
        for end in range((start + 1) * block_size, len(tokens) + 1, block_size):
            own, behind = numbers[end - block_size : end], name
            name = self.name(behind, own)
            found.append(Text(name, behind, tuple(own.tolist())))
        return found

    def names(self, tokens: Sequence[int], block_size: int) -> list[bytes]:
        """The names of a text's full blocks."""
        return [text.name for text in self.texts(tokens, block_size)]

    def remove(self, name: bytes) -> None:
        """Forget a block."""
        if name in self._host:
            self._free.append(self._host.pop(name)[1])
        if self.files is not None:
            self.files.remove(name)

    def put(self, blocks: Sequence[Named], read: Read) -> None:
        """Take blocks in that the device is about to lose."""
        if not self.n_host:
            self.save(blocks, read)
            return
        new = [(text, block) for text, block in blocks if not self._has(text.name)]
        for some in _pieces(new, self.n_host):
            slots = [self._free_slot() for _ in some]
            read([block for _, block in some], slots)
            self._host.update((text.name, (text, slot)) for (text, _), slot in zip(some, slots))
            self.counts["host_puts"] += len(some)

    def save(self, blocks: Sequence[Named], read: Read) -> int:
        """Write blocks to files, as far as they are not there; how many are there now, from the first one on."""
        if self.files is None:
            return 0
        new, failed = [(text, block) for text, block in blocks if not self.files.has(text.name)], set()
        for some in _pieces(new, len(self.passing)):
            read([block for _, block in some], self.passing[: len(some)])
            failed |= {text.name for (text, _), slot in zip(some, self.passing) if not self._write(text, slot)}
        return next((n for n, (text, _) in enumerate(blocks) if text.name in failed), len(blocks))

    def get(self, texts: Sequence[Text]) -> list[int]:
        """The slots of `memory` with the content of these blocks, from the first one on as far as they are known, and
        no more of files than can pass. Content of files is there until the next call of anything here."""
        slots, passing = [], iter(self.passing if self.files is not None else ())
        for text in texts:
            kept = self._host.get(text.name)
            slot = next(passing, None) if kept is None or kept[0] != text else kept[1]
            if slot is None:
                break
            slots.append(slot)
        wanted = [(text, self._bytes(slot)) for text, slot in zip(texts, slots) if slot in self.passing]
        read = iter(self.files.read(wanted) if wanted else ())
        for n, (text, slot) in enumerate(zip(texts, slots)):
            if slot in self.passing and not next(read):
                return slots[:n]
            if slot not in self.passing:
                self._host.move_to_end(text.name)
            self.counts["disk_hits" if slot in self.passing else "host_hits"] += 1
        return slots

    def _has(self, name: bytes) -> bool:
        if name not in self._host:
            return self.files is not None and self.files.has(name)
        self._host.move_to_end(name)
        return True

    def _free_slot(self) -> int:
        """A slot of the host; if need be, that of the block that was used longest ago, which goes on to its file."""
        if self._free:
            return self._free.pop()
        _, (text, slot) = self._host.popitem(last=False)
        if self.files is not None and not self.files.has(text.name):
            self._write(text, slot)
        return slot

    def _write(self, text: Text, slot: int) -> bool:
        return self.files.write(text, self._bytes(slot))

    def _bytes(self, slot: int) -> memoryview:
        return memoryview(self.memory[slot]).cast("B")


def _pieces(items: list, n: int) -> Iterator[list]:
    """A list in pieces of ``n`` at most."""
    return (items[start : start + n] for start in range(0, len(items), n))
