"""Chapter 14: blocks below the device, in the host's memory and in files. What comes back is what left, or nothing."""

import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import cuda
from test_engine import SMALL
from test_engines import random_model

from ch14_mini_llm.cache import store as store_module
from ch14_mini_llm.cache.pool import BlockPool
from ch14_mini_llm.cache.radix import RadixCache
from ch14_mini_llm.cache.store import BlockStore
from ch14_mini_llm.engine.engine import Engine
from ch14_mini_llm.engine.request import Request
from ch14_mini_llm.files import FileError
from ch14_mini_llm.model.upload import float16_model, panels_model

SHAPE, BLOCK = (2, 2, 3, 4, 8), 4


class Pages:
    """Blocks that remember what was written to them."""

    def __init__(self, n_blocks):
        self.of = {block: np.full(SHAPE, np.nan, np.float32) for block in range(n_blocks + 1)}

    def read(self, blocks, memory, slots):
        assert len({*slots}) == len(slots) == len(blocks) > 0
        for block, slot in zip(blocks, slots):
            memory[slot] = self.of[block]

    def write(self, memory, slots, blocks):
        assert len({*blocks}) == len(slots) == len(blocks) > 0
        for block, slot in zip(blocks, slots):
            self.of[block] = memory[slot].copy()


def content(tokens):
    """What a block holds whose text ends with these tokens: a function of all of them."""
    return np.random.default_rng([len(tokens), *tokens]).standard_normal(SHAPE, np.float32)


class Cache:
    """A prefix cache over a store, without a model."""

    def __init__(self, n_blocks, store):
        self.pool, self.pages = BlockPool(n_blocks), Pages(n_blocks)
        self.tree = RadixCache(self.pool, BLOCK)
        self.tree.attach(store, self.pages)

    def run(self, tokens):
        """What a request does; returns how many tokens it need not compute. All its blocks are right afterwards."""
        match = self.tree.match(tokens)
        for i, block in enumerate(match.blocks):
            np.testing.assert_array_equal(self.pages.of[block], content(tokens[: (i + 1) * BLOCK]))
        n = len(tokens) // BLOCK
        more = n - len(match.blocks)
        if more > self.pool.free:
            self.tree.evict(more - self.pool.free)
        blocks = match.blocks + self.pool.take(more)
        for i in range(len(match.blocks), n):
            self.pages.of[blocks[i]] = content(tokens[: (i + 1) * BLOCK])
        self.tree.insert(tokens, blocks)
        self.pool.drop(blocks)
        self.pool.check([], self.tree.blocks())
        return match.n_tokens


def store_of(folder=None, model="m", **options):
    memory = lambda n: np.full((n, *SHAPE), np.nan, np.float32)
    return BlockStore(model, SHAPE, np.float32, folder, memory=memory, **options)


def files_of(store):
    return sorted(store.files.folder.glob("*/*"))


def text(n, seed=0):
    return np.random.default_rng(seed).integers(0, 50, n).tolist()


@pytest.mark.parametrize("host_bytes", [0, 1 << 20])
@pytest.mark.parametrize("disk", [True, False])
def test_what_was_dropped_comes_back(tmp_path, host_bytes, disk):
    store = store_of(tmp_path if disk else None, host_bytes=host_bytes)
    cache, first = Cache(7, store), text(25)
    assert cache.run(first) == 0 and cache.run(first) == 24
    assert cache.tree.evict(99) == 6 and cache.tree.known(first) == 0
    assert cache.run(first) == (24 if host_bytes or disk else 0)
    hits = {"host_hits": 6} if host_bytes else {"disk_hits": 6} if disk else {}
    assert {name: n for name, n in store.counts.items() if "hits" in name} == hits


def test_a_full_host_goes_on_to_files(tmp_path):
    store = store_of(tmp_path, host_bytes=2 * np.prod(SHAPE) * 4)
    cache = Cache(7, store)
    for seed in range(2):
        cache.run(text(25, seed))
        cache.tree.evict(99)
    assert store.counts["host_puts"] == 12 and store.counts["disk_puts"] == 10
    assert cache.run(text(25, 0)) == 24 and cache.run(text(25, 1)) == 24


def test_another_process_reads_the_files(tmp_path):
    first = Cache(9, store_of(tmp_path))
    first.run(text(33))
    assert first.tree.save(text(33)) == 32
    assert Cache(9, store_of(tmp_path)).run(text(33)) == 32
    assert Cache(9, store_of(tmp_path, model="another")).run(text(33)) == 0
    other = BlockStore("m", (2, 2, 3, 8, 8), np.float32, tmp_path)
    assert other.files.folder != first.tree._store.files.folder and not files_of(other)


def test_only_what_is_known_is_saved(tmp_path):
    cache = Cache(9, store_of(tmp_path))
    cache.run(text(17))
    assert cache.tree.save([*text(16), *text(8, 5)]) == 16 and cache.tree.save(text(3)) == 0
    assert len(files_of(cache.tree._store)) == 4


def damages():
    flip = lambda at: lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    return {
        "cut": lambda data: data[:-1], "longer": lambda data: data + b"\0", "empty": lambda data: b"",
        "content": flip(-9), "magic": flip(0),
        "header": lambda data: data.replace(b'"version": 1', b'"version": 2'), "tokens": flip(250),
        "another text's": lambda data: data.replace(b'"tokens": [', b'"tokens": [1, '),
    }  # fmt: skip


@pytest.mark.parametrize("kind", damages())
def test_a_damaged_file_is_as_good_as_none(tmp_path, kind):
    store = store_of(tmp_path)
    writer = Cache(9, store)
    writer.run(text(33))
    writer.tree.save(text(33))
    third = store.files.path(store.names(text(33), BLOCK)[2])
    data = third.read_bytes()
    third.write_bytes(damages()[kind](data))
    reader = Cache(9, store_of(tmp_path))
    assert reader.run(text(33)) == 8 and reader.tree._store.counts["refused"] == 1 and not third.exists()
    reader.tree.save(text(33))
    assert third.read_bytes() == data
    assert Cache(9, store_of(tmp_path)).run(text(33)) == 32


def test_a_file_in_the_place_of_another_is_refused(tmp_path):
    store = store_of(tmp_path)
    cache = Cache(9, store)
    cache.run(text(9)), cache.run(text(9, 1))
    cache.tree.save(text(9)), cache.tree.save(text(9, 1))
    one, two = (store.files.path(store.names(text(9, seed), BLOCK)[0]) for seed in (0, 1))
    one.write_bytes(two.read_bytes())
    assert Cache(9, store_of(tmp_path)).run(text(9)) == 0


def test_files_have_a_limit_and_the_oldest_go(tmp_path):
    room = 12 * (np.prod(SHAPE) * 4 + 400)
    store = store_of(tmp_path, disk_bytes=room)
    cache = Cache(40, store)
    for seed in range(4):
        cache.run(text(25, seed))
        cache.tree.save(text(25, seed))
        for path in files_of(store):
            os.utime(path, (seed, path.stat().st_mtime - 10))
    assert sum(path.stat().st_size for path in files_of(store)) <= room
    fresh = Cache(40, store_of(tmp_path, disk_bytes=room))
    assert fresh.run(text(25, 3)) == 24 and fresh.run(text(25, 0)) == 0


def test_a_disk_that_takes_nothing_costs_no_answer(tmp_path, monkeypatch):
    store = store_of(tmp_path)
    cache = Cache(7, store)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for seed in range(3):
        assert cache.run(text(25, seed)) == 0
    assert cache.tree.save(text(25, 2)) == 0 and store.counts["failed"] > 6 and not files_of(store)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs owners of files")
def test_folders_that_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in ((tmp_path / "file", "cannot be made"), (tmp_path / "open", "others may write")):
        if path.name == "open":
            store = store_of(path)
            os.chmod(store.files.folder, 0o777)
        with pytest.raises(FileError, match=f"--kv_dir: .*{message}"):
            store_of(path)
    assert oct(store_of(tmp_path).files.folder.stat().st_mode)[-3:] == "700"


def test_removed_and_never_there(tmp_path):
    store = store_of(tmp_path, host_bytes=1 << 20)
    cache = Cache(5, store)
    cache.run(text(17))
    cache.tree.evict(99)
    names = store.names(text(17), BLOCK)
    assert len(names) == 4 == store.counts["host_puts"]
    for name in [*names, b"\1" * 16]:
        store.remove(name)
    assert cache.run(text(17)) == 0


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), max_size=25), st.integers(8, 20), st.integers(0, 5),
    st.integers(1, 4),
)  # fmt: skip
def test_any_requests_in_any_order(tmp_path_factory, asked, n_blocks, host_blocks, passing):
    """Texts that begin alike, in a small pool over both tiers; what is read is right, and the pool adds up."""
    size = int(np.prod(SHAPE)) * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "PASSING_BYTES", passing * size)
        store = store_of(tmp_path_factory.mktemp("kv"), host_bytes=host_blocks * size)
    assert len(store.passing) == max(2, passing)
    caches = Cache(n_blocks, store), Cache(n_blocks, store)
    for number, (seed, n) in enumerate(asked):
        tokens = (text(9) + text(30, seed))[: min(n, n_blocks * BLOCK)]
        caches[number % 2].run(tokens)


def test_two_writers_of_one_block(tmp_path):
    stores = [store_of(tmp_path) for _ in range(4)]
    (block,), start = stores[0].texts(text(4), BLOCK), threading.Barrier(4)

    def write(store):
        start.wait()
        for _ in range(20):
            store.memory[store.passing[0]] = content(text(4))
            assert store._write(block, store.passing[0])
            store.memory[:] = np.nan
            (slot,) = store.get([block])
            assert np.array_equal(store.memory[slot], content(text(4)))

    threads = [threading.Thread(target=write, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.suffix for path in files_of(stores[0])] == [".kv"]


def test_memory_that_is_not_there(monkeypatch, weights):
    pages = Engine(panels_model(*weights), num_blocks=4, block_size=4).runner.cache
    monkeypatch.setattr(cuda, "mapped_array", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(MemoryError, match=r"no .* GB of the host's memory for 1000 blocks \(out of memory\)"):
        pages.host(1000)


# --- below an engine -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights():
    return random_model(3, **SMALL)


def engine_over(model, level, folder=None, num_blocks=12, **options):
    engine = Engine(model, level, num_blocks=num_blocks, block_size=4, max_batch=4, deterministic=True)
    pages = engine.runner.cache
    store = BlockStore("m", pages.block_shape, pages.dtype, folder, memory=pages.host, **options)
    engine.prefix_cache.attach(store, pages)
    return engine


@pytest.mark.parametrize("level", ["kv", "fast"])
def test_an_engine_goes_on_from_files(tmp_path, rng, weights, level):
    """The same tokens in a new process's place: with keys and values of the one before, and computed anew."""
    model = {"kv": panels_model, "fast": float16_model}[level](*weights)
    prompt = rng.integers(0, SMALL["vocab_size"], 21).tolist()
    before = engine_over(model, level, tmp_path)
    (first,) = before.run([Request(prompt, 9)])
    history = prompt + first.tokens
    saved = before.prefix_cache.save(history)
    assert saved == 28  # the last token's are not written, and 29 are no more whole blocks
    second = history + rng.integers(0, SMALL["vocab_size"], 5).tolist()
    (wanted,) = Engine(model, level, block_size=4, prefix_cache=False, deterministic=True).run([Request(second, 8)])
    after = engine_over(model, level, tmp_path)
    (found,) = after.run([Request(second, 8)])
    assert found.tokens == wanted.tokens and found.cached_tokens == saved
    after.check()
    # and in a pool too small for two, again and again
    others = [rng.integers(0, SMALL["vocab_size"], 30).tolist() for _ in range(3)]
    alone = [Engine(model, level, block_size=4, deterministic=True).run([Request(one, 6)])[0].tokens for one in others]
    for _ in range(2):
        results = after.run([Request(one, 6) for one in others])
        assert [result.tokens for result in results] == alone
        after.check()
    assert after.prefix_cache._store.counts["disk_hits"] > 7
