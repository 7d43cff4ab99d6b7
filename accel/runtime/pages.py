"""Who holds which pages of a paged cache (`accel.passes.page_cache`), and the loop that asks.

    pool = generator.loop.pool                  # PagePool: pages in use, free, and remembered
    model.generate(ids, max_new_tokens=64)      # takes pages as its texts grow, gives them back

A text takes a page when it reaches it. Whole pages of prompts are remembered by their tokens, so
that a text that begins alike reads them instead of computing and storing them once more: within a
call, between calls, and between threads. Pages that nobody holds keep what they remember until
they are needed. Rows with a common prompt run it once, if the model has @extend for the rest.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from accel.errors import PagesError
from accel.runtime.decoding import Run, State, StateTensor, TokenLoop
from accel.runtime.plan import FunctionPlan

_LEAST_GROWTH = 16


class PagePool:
    """Pages of the caches of one model, [P, G, page, ...] for each.

    Args:
        parts: the caches' dtypes and shapes.
        page: tokens of a page.
        limit: how many pages there are; 0: as many as texts need.
    """

    def __init__(
        self, parts: Sequence[StateTensor], page: int, limit: int, device: torch.device
    ) -> None:
        self.parts, self.page, self.limit, self.device = list(parts), page, limit, device
        self.lock = threading.RLock()
        self.tensors = [part.empty(limit, device) for part in self.parts]
        self._free = list(range(limit))[::-1]
        self._holders = [0] * limit
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # remembered, held by nobody

    @property
    def pages(self) -> int:
        return len(self._holders)

    @property
    def used(self) -> int:
        """Pages that texts hold."""
        return sum(count > 0 for count in self._holders)

    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def take(self) -> int:
        """A page that nobody holds. Raises PagesError if there is none."""
        with self.lock:
            if not self._free and not self._idle:
                self._grow()
            if self._free:
                page = self._free.pop()
            else:  # what has been idle for longest is forgotten
                page, _ = self._idle.popitem(last=False)
                del self._by_key[self._key_of.pop(page)]
            self._holders[page] = 1
            return page

    def hold(self, page: int) -> int:
        """One more text reads a page."""
        with self.lock:
            self._idle.pop(page, None)
            self._holders[page] += 1
            return page

    def release(self, pages: Sequence[int]) -> None:
        with self.lock:
            for page in pages:
                self._holders[page] -= 1
                if self._holders[page] == 0 and page in self._key_of:
                    self._idle[page] = None
                elif self._holders[page] == 0:
                    self._free.append(page)

    def remember(self, key: bytes, page: int) -> None:
        """The page holds the tokens that the key stands for, after all those before them."""
        with self.lock:
            if key not in self._by_key and page not in self._key_of:
                self._by_key[key], self._key_of[page] = page, key

    def known(self, keys: Sequence[bytes]) -> list[int]:
        """The remembered pages that a text begins with."""
        found = []
        for key in keys:
            if key not in self._by_key:
                break
            found.append(self._by_key[key])
        return found

    def copy(self, page: int) -> int:
        """A page of one's own with the same tokens."""
        with self.lock:
            made = self.take()
            for tensor in self.tensors:
                tensor[made] = tensor[page]
            return made

    def _grow(self) -> None:
        if self.limit:
            raise PagesError(
                f"all {self.limit} pages of {self.page} tokens are in use",
                advice="compile with more pages (page_cache{pages=N}), or run fewer or shorter "
                "texts at a time",
            )
        more = max(len(self._holders), _LEAST_GROWTH)
        self.tensors = [
            torch.cat([old, part.empty(more, self.device)])
            for old, part in zip(self.tensors, self.parts)
        ]
        first = len(self._holders)
        self._free += range(first + more - 1, first - 1, -1)
        self._holders += [0] * more


class PagedState(list[Tensor]):
    """The state of texts that run together: their table; gives their pages back when it goes."""

    def __init__(self, pool: PagePool, table: Tensor) -> None:
        super().__init__([table])
        self.pages: list[list[int]] = [[] for _ in range(table.shape[0])]
        weakref.finalize(self, _release, pool, self.pages)

    def add(self, row: int, page: int) -> None:
        """The next page of a row."""
        self[0][row, len(self.pages[row])] = page
        self.pages[row].append(page)


def _release(pool: PagePool, pages: list[list[int]]) -> None:
    for row in pages:
        pool.release(row)


class PagedLoop(TokenLoop):
    """A token loop over a pool. Calls that share it run one after the other."""

    def __init__(
        self,
        plan: FunctionPlan,
        prefill: Run,
        decode: Run,
        device: torch.device,
        extend: Run | None = None,
    ) -> None:
        super().__init__(plan, prefill, decode, device, extend)
        facts = plan.metadata["kv_cache"]
        table, *parts = self._state
        columns = table.shape[1]
        assert isinstance(columns, int)
        self._table, self._columns = table, columns
        self.pool = PagePool(parts, facts["paged"]["page"], facts["paged"]["pages"], device)
        self.any_rows = not isinstance(table.shape[0], int)

    def empty(self, rows: int) -> State:
        return PagedState(self.pool, self._table.empty(rows, self.device))

    def fork(self, state: State, rows: Sequence[int], tokens: int) -> State:
        """Texts that begin with the `tokens` tokens of these rows: one copied page a text."""
        assert isinstance(state, PagedState)
        made = PagedState(self.pool, self._table.empty(len(rows), self.device))
        whole = tokens // self.pool.page
        with self.pool.lock:
            for i, row in enumerate(rows):
                for page in state.pages[row][:whole]:
                    made.add(i, self.pool.hold(page))
                if tokens % self.pool.page:
                    made.add(i, self.pool.copy(state.pages[row][whole]))
        return made

    def prefill(self, ids: Tensor, state: State, chunk: int = 0) -> tuple[Tensor, State]:
        assert isinstance(state, PagedState)
        count = ids.shape[1]
        keys = [] if self.fixed else [self._keys(row) for row in ids.tolist()]
        with self.pool.lock:
            shared = self._share(ids, state, keys) if self._extend is not None else 0
            step = min(chunk or self.most, self.most) if shared else chunk
            if not shared:
                first = ids[:, :chunk] if chunk else ids
                logits = self._call(self._prefill, first, [], state, first.shape[1])
                shared = first.shape[1]
            for start in range(shared, count, step or 1):
                position = torch.tensor(start, device=self.device)
                logits, _ = self.extend(ids[:, start : start + step], position, state)
            for row, known in enumerate(keys):
                for key, page in zip(known, state.pages[row]):
                    self.pool.remember(key, page)
        return logits[:, -1], state

    def extend(self, ids: Tensor, position: Tensor, state: State) -> tuple[Tensor, State]:
        extend = self.extension(ids)
        end = int(position.max()) + ids.shape[1]
        return self._call(extend, ids, [position], state, end), state

    def decode(self, tokens: Tensor, position: Tensor, state: State) -> tuple[Tensor, State]:
        end = int(position.max()) + 1
        return self._call(self._decode, tokens[:, None], [position], state, end)[:, -1], state

    def _call(
        self, run: Run, ids: Tensor, position: Sequence[Tensor], state: State, tokens: int
    ) -> Tensor:
        """Runs a function after which each text has `tokens` tokens; its logits."""
        assert isinstance(state, PagedState)
        with self.pool.lock:
            for row, held in enumerate(state.pages):
                while len(held) < min(-(-tokens // self.pool.page), self._columns):
                    state.add(row, self.pool.take())
            inputs = [ids.to(self._dtype), *position, *self.fixed, state[0], *self.pool.tensors]
            logits, *self.pool.tensors = run(inputs)
        return logits

    def _keys(self, ids: list[int]) -> list[bytes]:
        """A key for each whole page of a text: of its tokens and of all before them."""
        page, last, keys = self.pool.page, b"", []
        for start in range(0, len(ids) - page + 1, page):
            tokens = torch.tensor(ids[start : start + page]).numpy().tobytes()
            last = hashlib.sha256(last + tokens).digest()
            keys.append(last)
        return keys

    def _share(self, ids: Tensor, state: PagedState, keys: list[list[bytes]]) -> int:
        """Reads pages that hold the beginning of the texts; how many tokens that are."""
        if not keys:
            return 0
        most = (ids.shape[1] - 1) // self.pool.page  # one token is left to compute logits of
        alike = 0
        while alike < most and all(k[alike] == keys[0][alike] for k in keys):
            alike += 1
        if len(keys) > 1 and self.any_rows and alike > len(self.pool.known(keys[0][:most])):
            first = self.empty(1)  # released after its pages are held below
            self.prefill(ids[:1, : alike * self.pool.page], first)
        found = [self.pool.known(k[:most]) for k in keys]
        count = min(map(len, found))
        for row, pages in enumerate(found):
            for page in pages[:count]:
                state.add(row, self.pool.hold(page))
        return count * self.pool.page
