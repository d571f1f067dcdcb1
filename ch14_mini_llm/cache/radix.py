"""The prefix cache: a tree over whole blocks of tokens. A path from the root spells a text, a node has a block.

    "the cat sat"          root ── [the cat] ── [ sat on] ── [ a mat]
    "the cat ran"                          └── [ ran off]          (blocks of 2 words)

A request walks down the tree along its own tokens, and the blocks on its way are keys and values that it need not
compute: those of a token depend on the tokens before it and on nothing else. Entries are keyed by the token ids
themselves, not by a hash of them, so two texts are never taken for each other.

Only full blocks are in the tree, and only after the step that wrote them has ended. Who owns a block owns all those
above it as well, and gives them up from the last to the first. So of the blocks that nobody owns, the one that was
given up longest ago is always a leaf, and can leave.

Source: Zheng et al. 2024, "SGLang: Efficient Execution of Structured Language Model Programs" (RadixAttention).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ch14_mini_llm.cache.pool import BlockPool
from ch14_mini_llm.cache.store import BlockStore


@dataclass(eq=False)
class Node:
    """The entry of a block. children: {the next block's tokens: node}."""

    block: int
    tokens: tuple[int, ...]
    parent: Node | None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    name: bytes = b""  # in a `BlockStore`, once it was asked for


@dataclass(frozen=True)
class Match:
    """What the cache has of a text: the blocks of its first ``n_tokens`` tokens, held for whoever asked."""

    blocks: list[int]
    n_tokens: int


class RadixCache:
    """The entries of one model in one `BlockPool`. block_size: tokens a block."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool, self.block_size = pool, block_size
        self._root = Node(0, (), None)
        self._nodes: dict[int, Node] = {}  # by their blocks
        self._store: BlockStore | None = None

    def attach(self, store: BlockStore, pages) -> None:
        """From now on, blocks that leave go to a store, and come back. pages: a `PagedCache`, their memory."""
        self._store, self._pages, self._root.name = store, pages, store.root

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, tokens: Sequence[int]) -> Match:
        """The longest known beginning of ``tokens``, in whole blocks, and at most all but the last token.

        (The last token has to be run over in any case: its logits are wanted.) The blocks are held; drop them to the
        pool, as all others.
        """
        path = self._path(tokens)
        blocks = [node.block for node in path]
        self.pool.hold(blocks)
        if self._store is not None:
            blocks += self._fetch(tokens, path[-1] if path else self._root, len(path))
        return Match(blocks, len(blocks) * self.block_size)

    def _fetch(self, tokens: Sequence[int], node: Node, start: int) -> list[int]:
        """Blocks of the store that go on behind ``node``, from number ``start`` on, brought to the device and held."""
        fetched: list[int] = []
        if -(-len(tokens) // self.block_size) - start > self.pool.free + self.pool.cached:
            return fetched  # it will have to wait; to fetch them now and lose them again would help nobody
        for i in range(start, (len(tokens) - 1) // self.block_size):
            key, parent = self._key(tokens, i), self._name(node)
            values = self._store.get(name := self._store.name(parent, key), parent, key)
            if values is None or not self.pool.free and not self.evict(1):
                break
            (block,) = self.pool.take(1)
            self._pages.write(block, values)
            child = node.children[key] = self._nodes[block] = Node(block, key, node, name=name)
            self.pool.know(block)
            fetched.append(block)
            node = child
        return fetched

    def save(self, tokens: Sequence[int]) -> int:
        """Write the known blocks of a text to the store's files; returns how many tokens are there now."""
        n, node = 0, self._root
        for n in range(len(tokens) // self.block_size):
            child = node.children.get(self._key(tokens, n))
            if child is None or not self._keep(child, self._store.save):
                return n * self.block_size
            node = child
        return len(tokens) // self.block_size * self.block_size

    def _name(self, node: Node) -> bytes:
        behind = []  # without recursion: a text may have thousands of blocks
        while not node.name:
            behind.append(node)
            node = node.parent
        for child in reversed(behind):
            child.name = self._store.name(node.name, child.tokens)
            node = child
        return node.name

    def _keep(self, node: Node, put):
        name = self._name(node)
        return put(name, self._name(node.parent), node.tokens, lambda: self._pages.read(node.block))

    def known(self, tokens: Sequence[int]) -> int:
        """How many tokens `match` would give, without holding them."""
        return len(self._path(tokens)) * self.block_size

    def insert(self, tokens: Sequence[int], blocks: Sequence[int]) -> None:
        """Enter the full blocks of a sequence that owns ``blocks``, whose keys and values have been written.

        Where the tree has these tokens in another block (two equal requests were computed side by side), it keeps that
        one, and what comes behind it is not entered: it would hang from a block that this sequence does not own.
        """
        node = self._root
        for i in range(min(len(blocks), len(tokens) // self.block_size)):
            key = self._key(tokens, i)
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = self._nodes[blocks[i]] = Node(blocks[i], key, node)
                self.pool.know(child.block)
            elif child.block != blocks[i]:
                return
            node = child

    def evict(self, n: int) -> int:
        """Give up to ``n`` blocks that nobody owns back to the pool, least recently used first; returns how many."""
        for freed in range(n):
            block = self.pool.oldest()
            if block is None:
                return freed
            node = self._nodes.pop(block)
            assert not node.children, f"block {block} is older than one behind it"
            if self._store is not None:
                self._keep(node, self._store.put)
            del node.parent.children[node.tokens]
            self.pool.forget(block)
        return n

    def nodes(self) -> list[Node]:
        """All entries, those in front before those behind them."""
        return list(self._nodes.values())

    def blocks(self) -> list[int]:
        """The blocks of all entries."""
        return list(self._nodes)

    def _path(self, tokens: Sequence[int]) -> list[Node]:
        path, node = [], self._root
        for i in range((len(tokens) - 1) // self.block_size):
            node = node.children.get(self._key(tokens, i))
            if node is None:
                break
            path.append(node)
        return path

    def _key(self, tokens: Sequence[int], i: int) -> tuple[int, ...]:
        return tuple(tokens[i * self.block_size : (i + 1) * self.block_size])
