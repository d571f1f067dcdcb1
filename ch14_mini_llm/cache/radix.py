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
from ch14_mini_llm.cache.store import BlockStore, Text


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
        missing = -(-len(tokens) // self.block_size) - start - self.pool.free
        if missing > self.pool.cached:
            return []  # it will have to wait; to fetch them now and lose them again would help nobody
        if missing > 0:
            self.evict(missing)  # whoever asked is about to; and what is put into the store now disturbs no slot below
        texts = self._store.texts(tokens[:-1], self.block_size, start, self._name(node))
        fetched: list[int] = []
        while len(fetched) < len(texts):
            slots = self._store.get(texts[len(fetched) :])
            if not slots:
                break
            blocks = self.pool.take(len(slots))
            self._pages.write(self._store.memory, slots, blocks)
            for text, block in zip(texts[len(fetched) :], blocks):
                node = self._enter(node, block, text.tokens, text.name)
            fetched += blocks
        return fetched

    def save(self, tokens: Sequence[int]) -> int:
        """Write the known blocks of a text to the store's files; returns how many tokens are there now."""
        nodes = self._path([*tokens, 0])  # all full blocks: what ends with the last token as well
        return self._store.save(*self._content(nodes)) * self.block_size

    def _name(self, node: Node) -> bytes:
        behind = []  # without recursion: a text may have thousands of blocks
        while not node.name:
            behind.append(node)
            node = node.parent
        for child in reversed(behind):
            child.name = self._store.name(node.name, child.tokens)
            node = child
        return node.name

    def _content(self, nodes: list[Node]):
        """What a store is given of blocks: which they are, and how to read them."""
        named = [(Text(self._name(node), self._name(node.parent), node.tokens), node.block) for node in nodes]
        return named, lambda blocks, slots: self._pages.read(blocks, self._store.memory, slots)

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
                child = self._enter(node, blocks[i], key)
            elif child.block != blocks[i]:
                return
            node = child

    def _enter(self, node: Node, block: int, tokens: tuple[int, ...], name: bytes = b"") -> Node:
        child = node.children[tokens] = self._nodes[block] = Node(block, tokens, node, name=name)
        self.pool.know(block)
        return child

    def evict(self, n: int) -> int:
        """Give up to ``n`` blocks that nobody owns back to the pool, least recently used first; returns how many."""
        nodes = [self._nodes[block] for block in self.pool.oldest(n)]
        if self._store is not None:
            self._store.put(*self._content(nodes))
        for node in nodes:
            assert not node.children, f"block {node.block} is older than one behind it"
            del self._nodes[node.block], node.parent.children[node.tokens]
            self.pool.forget(node.block)
        return len(nodes)

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
