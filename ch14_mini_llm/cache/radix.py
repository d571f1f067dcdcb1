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


@dataclass(eq=False)
class Node:
    """The entry of a block. children: {the next block's tokens: node}."""

    block: int
    tokens: tuple[int, ...]
    parent: Node | None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)


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

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, tokens: Sequence[int]) -> Match:
        """The longest known beginning of ``tokens``, in whole blocks, and at most all but the last token.

        (The last token has to be run over in any case: its logits are wanted.) The blocks are held; drop them to the
        pool, as all others.
        """
        blocks = [node.block for node in self._path(tokens)]
        self.pool.hold(blocks)
        return Match(blocks, len(blocks) * self.block_size)

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
