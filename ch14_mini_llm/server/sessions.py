"""Sessions: names of texts whose keys and values outlive a connection, and the process.

A session is a name and a text's tokens, in a file; keys and values are in the `BlockStore` of the same folder, as any
others, and may be dropped like them: then they are computed anew. It changes when a turn has ended as it should, and
only then. So after a crash it stands at its last whole turn.
"""

from __future__ import annotations

import json
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ch14_mini_llm.cache.block_files import make_folder
from ch14_mini_llm.cache.store import BlockStore
from ch14_mini_llm.files import FileError, write_text
from ch14_mini_llm.server.kinds import SESSION_NAME

VERSION = 1
ENDING = ".json"


@dataclass(frozen=True)
class Session:
    """tokens: of the last turn's prompt and answer. turns: how many there were. saved: of the tokens, how many had
    their keys and values in files then. created, updated: seconds since 1970."""

    id: str
    tokens: list[int]
    turns: int
    saved: int
    created: int
    updated: int


class Sessions:
    """The sessions of one model, in a folder of their blocks' store. Several processes may use it; the last one to
    write a name wins. Raises `FileError` for a folder that cannot be used."""

    def __init__(self, store: BlockStore) -> None:
        self.store, self.folder = store, make_folder(store.files.folder / "sessions")

    def read(self, name: str) -> Session | None:
        """A session; None if there is none, or its file is not what it should be."""
        try:
            found = json.loads(self._path(name).read_text(encoding="utf-8"))
            check, version = found.pop("crc32"), found.pop("version")
            session = Session(**found)
            whole = all(type(token) is int for token in session.tokens) and session.id == name and version == VERSION
            return session if whole and check == _crc32(session) else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return None

    def all(self) -> list[Session]:
        """Those there are, the latest first."""
        names = [path.name.removesuffix(ENDING) for path in self.folder.glob(f"*{ENDING}")]
        found = [self.read(name) for name in names if SESSION_NAME.fullmatch(name)]
        return sorted(filter(None, found), key=lambda one: (-one.updated, one.id))

    def turn(self, name: str, tokens: list[int], saved: int) -> bool:
        """A turn has ended with these tokens. Returns whether that is in the file now."""
        before, now = self.read(name), int(time.time())
        turns, created = (before.turns, before.created) if before else (0, now)
        return self.write(Session(name, list(map(int, tokens)), turns + 1, saved, created, now))

    def write(self, session: Session) -> bool:
        """Returns whether it is in the file now."""
        record = asdict(session) | {"version": VERSION, "crc32": _crc32(session)}
        try:
            write_text(self._path(session.id), json.dumps(record), "session")
        except (FileError, OSError):
            return False
        return True

    def delete(self, session: Session, block_size: int) -> None:
        """Forget a session, and of its blocks those that no other one has."""
        self._path(session.id).unlink(missing_ok=True)
        kept = {name for one in self.all() for name in self.store.names(one.tokens, block_size)}
        for name in self.store.names(session.tokens, block_size):
            if name not in kept:
                self.store.remove(name)

    def _path(self, name: str) -> Path:
        assert SESSION_NAME.fullmatch(name)
        return self.folder / (name + ENDING)


def _crc32(session: Session) -> str:
    numbers = [*session.tokens, session.turns, session.saved, session.created, session.updated]
    return f"{zlib.crc32(np.array(numbers, np.int64).tobytes()):08x}"
