"""Keys and values of prompts that were computed before, for later prompts that begin with the same tokens.

A radix tree over the pages of the KV cache: a node stands for ``unit`` tokens after those of its parent and owns
the pages of their positions. Sequences in flight read these pages in place. What nobody reads is evicted, least
recently used first, once tree and sequences together keep as many positions as the slots have room for, or the
tree takes more than its share of memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from rdlm.nn.kv_cache import KVCache, PageTable


@dataclass(frozen=True, slots=True)
class Source:
    """What the keys of a position are computed from, beside the tokens up to it.

    steps: what each core step does. others: anything else.
    """

    steps: tuple[object, ...] = ()
    others: tuple[object, ...] = ()


@dataclass(slots=True, eq=False)
class Node:
    """Positions whose keys are kept: those of ``tokens`` after the parent's."""

    parent: Node | None
    tokens: tuple[int, ...]
    source: Source
    pages: list[PageTable]
    """Page tables of each store of the KV cache."""
    num_bytes: int
    """Bytes of the pages of this node and of all above it."""
    children: dict[tuple[int, ...], list[Node]] = field(default_factory=dict)
    """Child nodes by their tokens; several where their sources differ."""
    users: int = 0
    """Sequences in flight whose path ends here."""


Unit = tuple[Node, tuple[int, ...], Source]
"""A node to be: parent, tokens, source."""


@dataclass(slots=True)
class Path:
    """The nodes that hold the first ``length`` tokens of a sequence in flight."""

    node: Node
    length: int
    source: Source
    computes: Unit | None = None
    """What the sequence computes now, for others to wait for."""


class PrefixCache:
    """Finds, keeps and evicts prefixes. Called by the engine thread only."""

    def __init__(
        self, cache: KVCache, unit: int, most_bytes: float = float("inf"), serves_fewer_steps: bool = False
    ) -> None:
        """unit: positions that are found or missed together, a multiple of the page size. most_bytes: of all
        pages in the tree, as far as nobody reads them. serves_fewer_steps: whether keys of some core steps are
        those of a prompt that takes fewer."""
        self.cache, self.unit, self.serves_fewer_steps = cache, unit, serves_fewer_steps
        self.most_bytes, self.num_bytes = most_bytes, 0
        self._root = Node(None, (), Source(), [], 0)
        self._paths: dict[int, Path] = {}
        """Paths that slots hold, by slot."""
        self._computed: set[Unit] = set()
        """What the sequences in flight compute now."""
        self._unused: OrderedDict[Node, None] = OrderedDict()
        """Nodes without users and children, the least recently used first."""
        for store in cache.stores:
            store.evict = self.evict

    def attach(self, slot: int, prompt: Seq[int], source: Source, keeps: bool) -> int | None:
        """Let a slot read the longest known prefix of ``prompt`` -> its positions; None while another sequence
        computes what comes next: ask again. The last position is never among them: something has to be computed
        from. keeps: whether others may wait for what this sequence computes, which it holds."""
        path = self._paths.get(slot)
        if path is None:
            path = self._paths[slot] = Path(self._root, 0, source)
            self._enter(path.node)
        while path.length + self.unit < len(prompt):
            node = self._find(path, prompt)
            if node is None:
                if self._unit(path, prompt) in self._computed:
                    return None
                break
            self._read(slot, node)
            self._move(path, node)
        if keeps:
            self._compute(path, prompt)
        return path.length

    def hold(self, slot: int, prompt: Seq[int], tokens: Seq[int]) -> None:
        """Make the positions of ``tokens``, which the slot has written for good, findable. Where another
        sequence came first, the slot reads its pages from now on. Keys that are not numbers are kept from others,
        and so is what comes after them."""
        path = self._paths.get(slot)
        while path is not None and path.length + self.unit <= len(tokens):
            start, end = path.length, path.length + self.unit
            if not all(store.is_finite(slot, start, end) for store in self.cache.stores):
                self._compute(path, ())
                return
            pages = [store.detach(slot, path.length, path.length + self.unit) for store in self.cache.stores]
            node = self._find(path, tokens)
            if node is None:
                node = self._add(path, tokens, pages)
            else:
                for store, own in zip(self.cache.stores, pages, strict=True):
                    store.clear(own)
                self._read(slot, node)
            self._move(path, node)
            self._compute(path, prompt)

    def release(self, slot: int) -> int:
        """Forget a sequence -> bytes of its prefix."""
        path = self._paths.pop(slot, None)
        if path is None:
            return 0
        self._computed.discard(path.computes)
        self._leave(path.node)
        found = path.node.num_bytes
        while self.num_bytes > self.most_bytes and self.evict():
            pass
        return found

    def evict(self) -> bool:
        """Free the pages of the node that was used least recently -> whether there was one."""
        if not self._unused:
            return False
        node, _ = self._unused.popitem(last=False)
        self.num_bytes -= self._bytes_of(node.pages)
        for store, pages in zip(self.cache.stores, node.pages, strict=True):
            store.clear(pages)
        parent = node.parent
        assert parent is not None
        parent.children[node.tokens].remove(node)
        if not parent.children[node.tokens]:
            del parent.children[node.tokens]
        if self._is_unused(parent):
            self._unused[parent] = None
            self._unused.move_to_end(parent, last=False)  # it was last used with its child, or before
        return True

    def _unit(self, path: Path, tokens: Seq[int]) -> Unit:
        """What comes after a path."""
        return path.node, tuple(tokens[path.length : path.length + self.unit]), path.source

    def _compute(self, path: Path, prompt: Seq[int]) -> None:
        """Note what the sequence of a path computes from now on: the rest of its prompt, unit by unit."""
        if path.computes is not None:
            self._computed.discard(path.computes)
        path.computes = self._unit(path, prompt) if path.length + self.unit <= len(prompt) else None
        if path.computes is not None:
            self._computed.add(path.computes)

    def _read(self, slot: int, node: Node) -> None:
        for store, pages in zip(self.cache.stores, node.pages, strict=True):
            store.attach(slot, pages)

    def _move(self, path: Path, node: Node) -> None:
        """Go on from a child of a path's last node."""
        self._enter(node)
        self._leave(path.node)
        path.node, path.length = node, path.length + self.unit

    def _find(self, path: Path, tokens: Seq[int]) -> Node | None:
        """The child that holds the ``unit`` tokens after a path."""
        known = path.node.children.get(self._unit(path, tokens)[1], ())
        return next((node for node in known if self._serves(node.source, path.source)), None)

    def _serves(self, known: Source, wanted: Source) -> bool:
        steps = known.steps[: len(wanted.steps)] if self.serves_fewer_steps else known.steps
        return steps == wanted.steps and known.others == wanted.others

    def _add(self, path: Path, tokens: Seq[int], pages: list[PageTable]) -> Node:
        own = self._bytes_of(pages)
        key = tuple(tokens[path.length : path.length + self.unit])
        node = Node(path.node, key, path.source, pages, path.node.num_bytes + own)
        self.num_bytes += own
        path.node.children.setdefault(key, []).append(node)
        return node

    def _enter(self, node: Node) -> None:
        node.users += 1
        self._unused.pop(node, None)
        if node.parent is not None:
            self._unused.pop(node.parent, None)  # it has a child now

    def _leave(self, node: Node) -> None:
        node.users -= 1
        if self._is_unused(node):
            self._unused[node] = None

    def _bytes_of(self, pages: list[PageTable]) -> int:
        return sum(len(p) * store.page_bytes for store, p in zip(self.cache.stores, pages, strict=True))

    @staticmethod
    def _is_unused(node: Node) -> bool:
        return not node.users and not node.children and node.parent is not None
