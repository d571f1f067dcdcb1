"""What whoever starts the server decides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ch14_mini_llm.cache.block_files import make_folder
from ch14_mini_llm.engine.request import RequestError, check_number, check_whole


@dataclass(frozen=True)
class Settings:
    """name: the model's, for clients. max_queue: choices that may wait beyond those that run. api_keys: one of them is
    asked for, if there are some. timeout: seconds that an answer may take. max_wait: seconds after which it must have
    begun. grace: seconds that answers have when the server ends. max_body: bytes of a request. fingerprint: of the
    weights, for clients. Raises `RequestError`."""

    name: str
    max_queue: int = 128
    api_keys: tuple[str, ...] = ()
    timeout: float = 600.0
    max_wait: float = 120.0
    grace: float = 30.0
    max_body: int = 8 << 20
    fingerprint: str = "kbk"

    def __post_init__(self) -> None:
        check_whole("max_queue", self.max_queue, 0, 1 << 20, "from 0 on (0: nothing waits)")
        for name in ("timeout", "max_wait", "grace"):
            check_number(name, getattr(self, name), 0.1, 1e6, "of seconds, from 0.1 to 1000000")
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in self.api_keys):
            raise RequestError(
                "api_key has a key that is empty, or has blanks or other characters than ASCII's", "api_key"
            )


def kept_of(folder: str | None, disk: float, host: float, prefix_cache: bool) -> dict:
    """Of what `worker.keep` makes a store. disk, host: room, in GB. Raises `RequestError` and `FileError`."""
    check_number("--kv_disk", disk, 0.001, 1e6, "of GB, from 0.001 to 1000000")
    check_number("--kv_host", host, 0, 1e6, "of GB, from 0 to 1000000")
    if folder is None:
        raise RequestError("--kv_host is given without --kv_dir; give the folder as well")
    if not prefix_cache:
        raise RequestError("--kv_dir and --no_prefix_cache do not go together; leave one of them out")
    if not folder:
        raise RequestError("--kv_dir is empty; give the path of a folder")
    path = make_folder(Path(folder).absolute())
    return {"folder": str(path), "host_bytes": int(host * 1e9), "disk_bytes": int(disk * 1e9)}
