"""The token loop on a GPU: a step, its choice of a token included, is one recorded CUDA graph.

A *desk* is what a step reads and writes, always at the same addresses: the state, the token, its
position, the history (each token that was chosen, at its position). A recorded step runs @decode
and chooses the next tokens: by @advance, which was compiled with the model, or by torch's operators
(drawing from its generators, which graphs advance). The host only replays: it looks at the history
one step late, and at what has ended every few steps, and waits for nothing but the end.

Desks are kept from text to text, each with its state: as many as ran at the same time, at most two
idle ones. The first step of a desk with new options runs step by step, which lets libraries set
themselves up; the second is recorded.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from accel.config import logger
from accel.runtime.cuda_graph import RECORDING, leave_recording
from accel.runtime.decoding import Limits, State, TokenLoop
from accel.runtime.executor import CompiledFunction
from accel.runtime.plan import FunctionPlan, dtype_of
from accel.runtime.sampling import Chance, Sampling

_log = logger("runtime")
_IDLE = 2  # desks kept without a text
_GRAPHS = 4  # recorded steps of a desk
_LOOK = 8  # steps between two looks at whether all rows have ended
_STOPS = 16  # stop tokens of a recorded step: as many, or twice, four times...

Put = Callable[[Tensor], bool | None]


class DeviceLoop(TokenLoop):
    """A `TokenLoop` whose texts are chosen on the device. Thread-safe.

    Args:
        others: as for `TokenLoop`; `decode` is the compiled function, whose steps are recorded.
        advances: compiled greedy choices, by the number of stop tokens (`accel.compiler.choice`).
    """

    def __init__(
        self,
        plan: FunctionPlan,
        prefill: Any,
        decode: CompiledFunction,
        device: torch.device,
        extend: Any = None,
        advances: Mapping[int, CompiledFunction] | None = None,
    ) -> None:
        super().__init__(plan, prefill, decode, device, extend)
        self._function, self.advances = decode, dict(advances or {})
        self._capacity = int(plan.metadata["kv_cache"]["capacity"])
        self._idle: list[_Desk] = []
        self._lock = threading.Lock()

    def text(
        self,
        ids: Tensor,
        limits: Limits,
        sampling: Sampling,
        chance: Chance,
        put: Put | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        if sampling.reads_text or not sampling.recordable or limits.new < 2:
            return super().text(ids, limits, sampling, chance, put, lengths)
        desk = self._take(ids.shape[0])
        counts = list(lengths or [ids.shape[1]] * ids.shape[0])
        try:
            with torch.cuda.device(self.device), torch.no_grad():
                return desk.text(ids, counts, limits, sampling, chance, put)
        finally:
            with self._lock:
                self._idle = [*self._idle, desk][-_IDLE:]

    def _take(self, rows: int) -> _Desk:
        with self._lock:
            for desk in reversed(self._idle):
                if desk.rows == rows:
                    self._idle.remove(desk)
                    return desk
        return _Desk(self, rows)

    def step_from(self, rows: int, position: int) -> Callable[[], None]:
        """A greedy step at a desk of its own, for measuring: each call moves one token on."""
        with torch.cuda.device(self.device), torch.no_grad():
            desk = _Desk(self, rows)
            desk.position.fill_(position)
            return desk.step(Limits(2, frozenset(), 0), Sampling(), 0)

    # What desks use.

    def first(self, ids: Tensor, lengths: Sequence[int], state: State, chunk: int) -> Tensor:
        """Logits [B, V] of the last tokens of prompts; the state is written where it is."""
        if len(set(lengths)) > 1:
            logits, made = self.begin(ids, lengths, chunk)
            _keep(state, made)
            return logits
        ids = ids[:, -lengths[0] :]
        if not self.can_go_back:
            for part in state:
                part.zero_()
        logits, made = self.prefill(ids, state, chunk)
        _keep(state, made)
        return logits

    def steps(self, inputs: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        return self._function.reserve(inputs)

    def check(self) -> None:
        """Raises ExecutionError for what a kernel of a finished step reported."""
        self._function.raise_failure()

    def logits_like(self, rows: int) -> Tensor:
        """Memory for logits [B, 1, V] as @decode makes them."""
        spec = self._function.plan.values[self._function.plan.outputs[0]]
        sizes = [d if isinstance(d, int) else rows for d in spec.shape]
        return torch.empty(sizes, dtype=dtype_of(spec.dtype), device=self.device)

    @property
    def id_type(self) -> torch.dtype:
        return self._dtype

    @property
    def capacity(self) -> int:
        return self._capacity


class _Desk:
    """Fixed memory of a text of `rows` rows, and the steps recorded over it. One text at a time."""

    def __init__(self, loop: DeviceLoop, rows: int) -> None:
        self.loop, self.rows, device = loop, rows, loop.device
        self.state = loop.empty(rows)
        self.token = torch.zeros(rows, 1, dtype=loop.id_type, device=device)
        each = (rows,) if loop.each else ()
        self.position = torch.zeros(each, dtype=torch.int64, device=device)
        self.ends = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # of the prompts
        self.history = torch.zeros(rows, loop.capacity + 2, dtype=torch.int64, device=device)
        self.running = torch.ones(rows, 1, dtype=torch.bool, device=device)
        self.pad = torch.zeros((), dtype=torch.int64, device=device)
        self.random: list[torch.Generator] = []  # of recorded draws: one, or one for each row
        self._run: Callable[[Sequence[Tensor]], list[Tensor]] | None = None
        self._recorded: OrderedDict[Any, _Step] = OrderedDict()
        self._pool: Any = None

    def text(
        self,
        ids: Tensor,
        lengths: Sequence[int],
        limits: Limits,
        sampling: Sampling,
        chance: Chance,
        put: Put | None,
    ) -> Tensor:
        given = [chance] if isinstance(chance, torch.Generator) else list(chance or ())
        step = self.step(limits, sampling, len(given))
        for own, other in zip(self.random, given):
            own.set_state(other.get_state())
        self.ends.copy_(torch.tensor(lengths)[:, None])
        self.position.copy_(self.ends[:, 0] - 1 if self.position.dim() else self.ends[0, 0] - 1)
        self.running.fill_(True)
        self.pad.fill_(limits.pad)
        step.advance(self.loop.first(ids, lengths, self.state, limits.chunk))
        watch = _Watch(self, limits, put)
        for number in range(1, limits.new):
            if watch.is_over(number):
                break
            step()
        made = watch.finish(limits.new)
        for own, other in zip(self.random, given):
            other.set_state(own.get_state())
        self.loop.check()
        return self.columns(0, made)

    def columns(self, first: int, count: int) -> Tensor:
        """So many new tokens of each row from number `first` on: [B, count]."""
        places = torch.arange(first, first + count, device=self.ends.device) + self.ends
        return self.history.gather(1, places)

    def decode(self) -> Tensor:
        """@decode over this memory: logits [B, V]."""
        inputs = [self.token, self.position, *self.state]
        if self._run is None:
            self._run = self.loop.steps(inputs)
            self._pool = torch.cuda.graph_pool_handle()
        logits, *made = self._run(inputs)
        _keep(self.state, made)
        return logits[:, -1]

    def step(self, limits: Limits, sampling: Sampling, sources: int) -> _Step:
        """The step with these options; draws come from so many generators, or torch's own."""
        room = 0
        while room < len(limits.stops):
            room = max(_STOPS, 2 * room)
        key = (dataclasses.replace(sampling, seed=None), sources, room)
        step = self._recorded.pop(key, None)
        while len(self.random) < sources:
            self.random.append(torch.Generator(self.loop.device))
        if step is None:
            each = isinstance(sampling.seed, tuple)
            chance = self.random[:sources] if each else self.random[0] if sources else None
            step = _Step(self, sampling, chance, room)
        self._recorded[key] = step
        if len(self._recorded) > _GRAPHS:
            self._recorded.popitem(last=False)
        if room:
            stops = sorted(limits.stops)
            step.stops.copy_(torch.tensor([[*stops, *stops[:1] * (room - len(stops))]]))
        return step


class _Step:
    """One step of a desk: run the first time, recorded the second, replayed then."""

    def __init__(self, desk: _Desk, sampling: Sampling, chance: Chance, room: int) -> None:
        self.desk, self.sampling, self.chance = desk, sampling, chance
        self.stops = torch.zeros(1, room, dtype=torch.int64, device=desk.loop.device)
        self._advance: Callable[[Sequence[Tensor]], list[Tensor]] | None = None
        advance = desk.loop.advances.get(room)
        if advance is not None and sampling == Sampling():
            self._advance = advance.reserve(self._memory(desk.loop.logits_like(desk.rows)))
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        self._calls += 1
        if self._calls == 2:
            self._record()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run()

    def _run(self) -> None:
        self.advance(self.desk.decode())

    def advance(self, logits: Tensor) -> None:
        """Chooses the tokens after logits [B, V], and notes them."""
        desk = self.desk
        if self._advance is not None:
            memory = self._memory(logits[:, None])
            made = self._advance(memory)
            _keep(memory[1:], made)
            return
        tokens = self.sampling.choose(logits, desk.token, self.chance)[:, None]
        if self.stops.numel():
            tokens = torch.where(desk.running, tokens, desk.pad)
            ended = (tokens == self.stops).any(1, keepdim=True)
            desk.running.logical_and_(ended.logical_not_())
        desk.position.add_(1)
        place = desk.position.reshape(-1, 1).expand(desk.rows, 1)
        desk.history.scatter_(1, place, tokens)
        desk.token.copy_(tokens)

    def _memory(self, logits: Tensor) -> list[Tensor]:
        """The arguments of @advance, or of @advance_until: logits [B, 1, V], then state."""
        desk = self.desk
        made = [logits, desk.token, desk.position, desk.history]
        return [*made, desk.running, desk.pad, self.stops] if self.stops.numel() else made

    def _record(self) -> None:
        desk = self.desk
        stream = torch.cuda.Stream(desk.loop.device)
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        sources = self.chance or ()
        for source in [sources] if isinstance(sources, torch.Generator) else sources:
            graph.register_generator_state(source)
        try:
            with (
                RECORDING,
                torch.cuda.graph(graph, desk._pool, stream, capture_error_mode="thread_local"),
            ):
                self._run()
        except RuntimeError as error:
            leave_recording(desk.loop.device, desk._pool)
            _log.warning("decoding runs without a CUDA graph: %s", error)
            return
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = graph


class _Watch:
    """What the host learns of a text while it runs: tokens for `put`, and whether it has ended."""

    def __init__(self, desk: _Desk, limits: Limits, put: Put | None) -> None:
        self.desk, self.put, self.stops = desk, put, limits.stops
        self.pinned = torch.zeros(2, desk.rows, dtype=torch.int64, pin_memory=True)
        self.flag = torch.ones(desk.rows, 1, dtype=torch.bool, pin_memory=True)
        self.events = [torch.cuda.Event(), torch.cuda.Event()]
        self.looked: torch.cuda.Event | None = None
        self.seen = 0  # columns that `put` has got
        self.copied = 0  # and those on their way
        self.ended = [False] * desk.rows
        self.over = False

    def is_over(self, made: int) -> bool:
        """Whether no step is wanted after `made` columns."""
        if self.put is not None:
            self._copy(made)
            while self.seen < self.copied - 1 and not self.over:
                self._hand_out()
        elif self.stops:
            if self.looked is None and made % _LOOK == 0:
                self.flag.copy_(self.desk.running, non_blocking=True)
                self.looked = torch.cuda.Event()
                self.looked.record()
            elif self.looked is not None and self.looked.query():
                self.over, self.looked = not bool(self.flag.any()), None
        return self.over

    def finish(self, most: int) -> int:
        """Waits for the end of the text: how many columns it has."""
        desk = self.desk
        if self.put is not None:
            if not self.over:
                self._copy(most)
            while self.seen < self.copied and not self.over:
                self._hand_out()
            torch.cuda.current_stream().synchronize()
            return self.seen
        if not self.stops:
            torch.cuda.current_stream().synchronize()
            return most
        made = int(desk.position.reshape(-1)[0] + 1 - desk.ends[0, 0])
        texts = desk.columns(0, made).cpu()
        stopped = torch.isin(texts, torch.tensor(sorted(self.stops)))
        first = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, made)
        return int(first.max())

    def _copy(self, made: int) -> None:
        """Sends the newest column on its way to the host."""
        while self.copied < made:
            place = self.copied % 2
            if self.copied - self.seen == 2:
                self._hand_out()
            column = self.desk.history.gather(1, self.desk.ends + self.copied)[:, 0]
            self.pinned[place].copy_(column, non_blocking=True)
            self.events[place].record()
            self.copied += 1

    def _hand_out(self) -> None:
        place = self.seen % 2
        self.events[place].synchronize()
        column = self.pinned[place].clone()
        self.seen += 1
        assert self.put is not None
        self.over = bool(self.put(column)) or self.over
        if self.stops:
            ended = [int(t) in self.stops or e for t, e in zip(column, self.ended)]
            self.ended, self.over = ended, self.over or all(ended)


def stop_tokens(plan: FunctionPlan) -> int:
    """With how many stop tokens a compiled choice compares."""
    last = plan.values[plan.inputs[-1]]
    count = last.shape[-1] if last.name == "stops" else 0
    assert isinstance(count, int)
    return count


def _keep(state: State, made: Sequence[Tensor]) -> None:
    """The state is where it was; what a function returned elsewhere is copied there."""
    for own, new in zip(state, made):
        if own.data_ptr() != new.data_ptr():
            own.copy_(new)
