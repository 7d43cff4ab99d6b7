"""Who holds which pages of a paged cache (`accel.passes.page_cache`), and the loop that asks.

    pool = generator.loop.pool                  # PagePool: pages in use, free, and remembered
    model.generate(ids, max_new_tokens=64)      # takes pages as its texts grow, gives them back

A text takes a page when it reaches it. Whole pages of prompts are remembered by their tokens, so
that a text that begins alike reads them instead of computing and storing them once more: within a
call, between calls, and between threads. Pages that nobody holds keep what they remember until
they are needed. Rows with a common prompt run it once, if the model has @extend for the rest.

Texts of unequal length need no state of one shape: their pages go into one table. A text that has
ended gives its pages back while the others go on, and its row is left out of the calls.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from accel.errors import PagesError
from accel.runtime.decoding import Run, State, StateTensor, TokenLoop, gathered
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
    """The state of texts that run together: a table with a row for each that runs.

    Gives their pages back when it goes. Where a call has a fixed number of rows, copies of the last
    text fill it up: they read and write that text's own pages, and the same values.

    Attributes:
        pages: of each text, in order; none of one that has ended.
        running: the texts that run.
        pick: which text each row of a call belongs to; None where that is each one's own.
    """

    def __init__(
        self, pool: PagePool, columns: int, dtype: torch.dtype, texts: int, rows: int | None
    ) -> None:
        super().__init__()
        self._pool, self._columns, self._dtype, self._rows = pool, columns, dtype, rows
        self.pages: list[list[int]] = [[] for _ in range(texts)]
        self.arrange(range(texts))
        weakref.finalize(self, _release, pool, self.pages)

    def arrange(self, running: Sequence[int]) -> None:
        """Makes the table, of these texts."""
        self.running = list(running)
        own = self.running + self.running[-1:] * ((self._rows or 0) - len(self.running))
        table = torch.zeros(len(own), self._columns, dtype=self._dtype)
        for row, text in enumerate(own):
            held = self.pages[text]
            table[row, : len(held)] = torch.tensor(held, dtype=self._dtype)
        device = self._pool.device
        self[:] = [table.to(device)]
        straight = own == list(range(len(self.pages)))
        self.pick: Tensor | None = None if straight else torch.tensor(own, device=device)
        self._rows_of = {t: [r for r, o in enumerate(own) if o == t] for t in self.running}

    def add(self, text: int, pages: Sequence[int]) -> None:
        """The next pages of a text."""
        held = self.pages[text]
        made = torch.tensor(pages, dtype=self._dtype)
        for row in self._rows_of[text]:
            self[0][row, len(held) : len(held) + len(pages)] = made
        held.extend(pages)

    def take_over(self, texts: Sequence[int], other: PagedState) -> None:
        """The other state's texts go on as these; the table is made anew by `arrange`."""
        for text, pages in zip(texts, other.pages, strict=True):
            self.pages[text][:] = pages
            pages.clear()

    def end(self, texts: Iterable[int]) -> None:
        """These texts run no longer: their pages are free."""
        gone = set(texts)
        for text in gone:
            self._pool.release(self.pages[text])
            self.pages[text].clear()
        self.arrange([text for text in self.running if text not in gone])


def _release(pool: PagePool, pages: list[list[int]]) -> None:
    for held in pages:
        pool.release(held)


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
        self._has_source = bool(facts.get("fixed", 0))
        self.pool = PagePool(parts, facts["paged"]["page"], facts["paged"]["pages"], device)

    def missing(self, texts: int) -> int:
        return super().missing(texts) if self._has_source else 0

    def empty(self, rows: int) -> PagedState:
        # A recorded step is of one number of rows; on a CPU, fewer rows are less work.
        fixed = self.rows or (rows if self.device.type == "cuda" else None)
        return PagedState(self.pool, self._columns, self._table.dtype, rows, fixed)

    def fork(self, state: State, rows: Sequence[int], tokens: int) -> State:
        """Texts that begin with the `tokens` tokens of these rows: one copied page a text."""
        assert isinstance(state, PagedState)
        made = self.empty(len(rows))
        whole = tokens // self.pool.page
        with self.pool.lock:
            for i, row in enumerate(rows):
                made.add(i, [self.pool.hold(page) for page in state.pages[row][:whole]])
                if tokens % self.pool.page:
                    made.add(i, [self.pool.copy(state.pages[row][whole])])
        return made

    def begin(self, ids: Tensor, lengths: Sequence[int], chunk: int = 0) -> tuple[Tensor, State]:
        """As of `TokenLoop`: nothing is copied, the texts' pages go into one table."""
        if len(set(lengths)) == 1:
            return self.prefill(ids[:, -lengths[0] :], self.empty(len(lengths)), chunk)
        state, found = self.empty(len(lengths)), []
        for count in sorted(set(lengths)):
            texts = [text for text, n in enumerate(lengths) if n == count]
            part = self.empty(len(texts))
            logits, _ = self.prefill(ids[texts, -count:], part, chunk)
            state.take_over(texts, part)
            found.append((torch.tensor(texts, device=self.device), logits))
        state.arrange(range(len(lengths)))
        return gathered(found, len(lengths)), state

    def ended(self, state: State, running: Sequence[bool]) -> None:
        """Texts that have ended give their pages back, and no longer run along."""
        assert isinstance(state, PagedState)
        gone = [text for text in state.running if not running[text]]
        if gone and not self.fixed:
            with self.pool.lock:
                state.end(gone)

    def prefill(self, ids: Tensor, state: State, chunk: int = 0) -> tuple[Tensor, State]:
        assert isinstance(state, PagedState)
        count = ids.shape[1]
        if count < self.least:
            return self._one_by_one(ids, state)
        keys = [] if self.fixed else [self._keys(row) for row in ids.tolist()]
        with self.pool.lock:
            shared = self._share(ids, state, keys) if self._extend is not None else 0
            step = min(chunk or self.most, self.most) if shared else chunk
            if not shared:
                first = ids[:, : max(chunk, self.least)] if chunk else ids
                logits = self._call(self._prefill, first, [], state, [first.shape[1]])
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
        ends = [int(position) + ids.shape[1]]
        return self._call(extend, ids, [position], state, ends), state

    def decode(self, tokens: Tensor, position: Tensor, state: State) -> tuple[Tensor, State]:
        if self.each and not position.dim():
            position = position.expand(len(tokens)).contiguous()
        ends = [place + 1 for place in position.reshape(-1).tolist()]
        return self._call(self._decode, tokens[:, None], [position], state, ends)[:, -1], state

    def _call(
        self,
        run: Run,
        ids: Tensor,
        position: Sequence[Tensor],
        state: State,
        ends: Sequence[int],
    ) -> Tensor:
        """Runs a function; its logits, a row for each text. Of one that has ended they are zero.

        `ends`: how many tokens each text has then, or all of them have.
        """
        assert isinstance(state, PagedState)
        with self.pool.lock:
            for text in state.running:
                end = ends[text] if len(ends) > 1 else ends[0]
                more = min(-(-end // self.pool.page), self._columns) - len(state.pages[text])
                if more > 0:
                    state.add(text, self._taken(more))
            pick = state.pick
            if pick is not None:
                ids, position = ids[pick], [p[pick] if p.dim() else p for p in position]
            inputs = [ids.to(self._dtype), *position, *self.fixed, state[0], *self.pool.tensors]
            logits, *self.pool.tensors = run(inputs)
        return logits if pick is None else _by_text(logits, pick, state)

    def _taken(self, count: int) -> list[int]:
        """So many pages that nobody holds; none is held where there are fewer."""
        made: list[int] = []
        try:
            for _ in range(count):
                made.append(self.pool.take())
        except PagesError:
            self.pool.release(made)
            raise
        return made

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
        if len(keys) > 1 and alike > len(self.pool.known(keys[0][:most])):
            first = self.empty(1)  # released after its pages are held below
            self.prefill(ids[:1, : alike * self.pool.page], first)
        found = [self.pool.known(k[:most]) for k in keys]
        count = min(map(len, found))
        for row, pages in enumerate(found):
            if count:
                state.add(row, [self.pool.hold(page) for page in pages[:count]])
        return count * self.pool.page


def _by_text(logits: Tensor, pick: Tensor, state: PagedState) -> Tensor:
    """Rows of a call as rows of texts."""
    count = len(state.running)
    whole = logits.new_zeros(len(state.pages), *logits.shape[1:])
    whole[pick[:count]] = logits[:count]
    return whole
