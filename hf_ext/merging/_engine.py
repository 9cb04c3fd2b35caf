"""The passes over the blocks: read, ask the method, round once, write.

Threads take blocks, or whole tensors where a method's scans are local and the tensor is small. Each works
with one torch thread, so that sums are the same whatever the number of threads, and with buffers of its
own, so that the memory is bounded by (operands + a few) x block x threads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ._base import Block, MergeMethod
from ._checkpoint import DTYPES
from ._layout import Slot
from ._operands import Stored, Task, Workspace
from ._partial import Partial

A = TypeVar("A")
B = TypeVar("B")


class Engine:
    """Runs a method over tasks.

    Args:
        method: The method.
        tasks: The output tensors, in the order of their names.
        store: Where results go, and what has been done before.
        threads: Number of workers.
        block: Elements of a block; a multiple of the chunk of `_reductions`. None for whole tensors.
        seed: The merge's seed.
        advance: Called with the number of elements that a pass has finished.
    """

    def __init__(
        self,
        method: MergeMethod,
        tasks: Sequence[Task],
        store: Partial,
        *,
        threads: int,
        block: int | None,
        seed: int,
        advance: Callable[[int], object] = lambda count: None,
    ) -> None:
        self.method, self.tasks, self.store = method, tasks, store
        self.threads, self.seed, self.advance = threads, seed, advance
        self.block = None if method.granularity == "matrix" else block
        self.workspace = Workspace()
        self.states: list[Any] = []

    def run(self) -> None:
        """Do what has not been done.

        Raises:
            ValueError: A tensor is not finite, or the method refuses one; the text names it.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # folding small tensors with several costs more than it saves
        pool = ThreadPoolExecutor(
            self.threads, thread_name_prefix="hf_ext-merge", initializer=torch.set_num_threads, initargs=(1,)
        )
        try:
            merged = [task for task in self.tasks if task.merged]
            copied = [task for task in self.tasks if not task.merged]
            if not self.method.scans:
                self._map(pool, self.tasks, self.states)
            elif self.method.local:
                self._tensor_by_tensor(pool, merged)
                self._map(pool, copied, [])
            else:
                self.states = self._scan(pool, merged, stored=True)
                self._map(pool, self.tasks, self.states)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(before)  # new threads take the number that was set last

    # Passes ---------------------------------------------------------------------------------------

    def _blocks(self, task: Task) -> list[tuple[int, int]]:
        numel = task.info.numel
        if self.block is None or numel <= self.block:
            return [(0, numel)]
        return [(start, min(start + self.block, numel)) for start in range(0, numel, self.block)]

    def _is_done(self, task: Task, number: int) -> bool:
        return (task.info.index, number) in self.store.done

    def _map(self, pool: ThreadPoolExecutor, tasks: Iterable[Task], states: Sequence[Any]) -> None:
        todo = [
            (task, number, start, stop)
            for task in tasks
            for number, (start, stop) in enumerate(self._blocks(task))
            if not self._is_done(task, number)
        ]

        def work(item: tuple[Task, int, int, int]) -> list[Slot]:
            task, _, start, stop = item
            if not task.merged and self._copy(task, start, stop):
                return [task.slot] if task.slot is not None else []
            if task.make is not None:
                pairs, numbers = task.make(task)
                self.store.note(task.info.index, numbers)
                for slot, values in pairs:
                    self._put(f"{task.info.name} ({slot.name})", slot, 0, values, lambda: "")
                return [slot for slot, _ in pairs]
            return self._write(task, self._load(task, start, stop, states))

        for (task, number, start, stop), slots in self._ordered(pool, work, todo):
            self._record(task, [number], slots, stop - start)

    def _scan(self, pool: ThreadPoolExecutor, tasks: Sequence[Task], *, stored: bool) -> list[Any]:
        """Return the states of all scans, those of an earlier process included where they are stored."""
        states: list[Any] = list(self.store.scans) if stored else []
        items = [
            (task, start, stop, number)
            for task in tasks
            for number, (start, stop) in enumerate(self._blocks(task))
        ]
        for number in range(len(states), self.method.scans):
            if self.method.skips(number, states, len(items)):
                states.append(None)
                continue
            total: Any = None
            for block, part in self._ordered(pool, self._scanner(number, states), items):
                total = self.method.fold(number, total, *part)
                self.advance(block[2] - block[1])
            states.append(self.method.settle(number, total, [task.info for task in tasks], states))
            if stored:
                self.store.save_scans(states)
        return states

    def _scanner(
        self, number: int, states: Sequence[Any]
    ) -> Callable[[tuple[Task, int, int, int]], tuple[Any, Block]]:
        def work(item: tuple[Task, int, int, int]) -> tuple[Any, Block]:
            task, start, stop, _ = item
            block = self._load(task, start, stop, states)
            part = self._asked(block, lambda: self.method.scan(number, block))
            block.operands, block.base = [], None
            return part, block

        return work

    def _tensor_by_tensor(self, pool: ThreadPoolExecutor, tasks: Sequence[Task]) -> None:
        todo = [
            task
            for task in tasks
            if not all(self._is_done(task, number) for number in range(len(self._blocks(task))))
        ]
        # A tensor that would keep one thread busy for long is cut into blocks for all of them.
        large = {task.info.index for task in todo if len(self._blocks(task)) > 4}
        for task in todo:
            if task.info.index in large:
                self._map(pool, [task], self._scan(pool, [task], stored=False))
        small = [task for task in todo if task.info.index not in large]
        small.sort(key=lambda task: (-task.info.numel, task.info.index))  # the long ones first
        for task, slots in self._ordered(pool, self._whole, small):
            count = len(self._blocks(task))
            self._record(task, range(count), slots, task.info.numel * (1 + self.method.scans))

    def _whole(self, task: Task) -> list[Slot]:
        """Scan and map one tensor in this thread; one that is a single block is read once."""
        states: list[Any] = []
        spans = self._blocks(task)
        only = self._load(task, *spans[0], states) if len(spans) == 1 else None
        for number in range(self.method.scans):
            if self.method.skips(number, states, len(spans)):
                states.append(None)
                continue
            total: Any = None
            for start, stop in spans:
                block = only or self._load(task, start, stop, states)
                part = self._asked(block, lambda number=number, block=block: self.method.scan(number, block))
                total = self.method.fold(number, total, part, block)
            states.append(self.method.settle(number, total, [task.info], states))
        slots: list[Slot] = []
        for start, stop in spans:
            slots += self._write(task, only or self._load(task, start, stop, states))
        return slots

    # Blocks ---------------------------------------------------------------------------------------

    def _load(
        self, task: Task, start: int, stop: int, states: Sequence[Any], *, all_at_once: bool = False
    ) -> Block:
        count, take = stop - start, self.workspace.take
        one_by_one = self.method.one_by_one and not all_at_once
        base: Tensor | None = None
        if task.base is not None:
            base = take("base", count)
            task.base.read(start, stop, base, self.workspace)
        flat = base

        def read(number: int) -> Tensor:
            values = take(f"operand {0 if one_by_one else number}", count)
            task.operands[number].read(start, stop, values, self.workspace)
            values = values.sub_(flat) if task.subtract and flat is not None else values
            return values.view(task.info.shape) if self.method.granularity == "matrix" else values

        # A sequence, which methods that take their operands in turn use as they would a list.
        in_turn = cast(list[Tensor], _OneByOne(read, len(task.operands)))
        operands = in_turn if one_by_one else list(in_turn)
        if self.method.granularity == "matrix":
            base = None if base is None else base.view(task.info.shape)
        block = Block(task.info, start, stop, operands, base, states, self.seed, self.store.scratch)
        block.workspace = self.workspace
        return block

    def _copy(self, task: Task, start: int, stop: int) -> bool:
        """Copy the bytes of a block where the stored type stays; return whether that was so."""
        operand, slot = task.operands[0], task.slot
        if slot is None or not isinstance(operand, Stored) or operand.entry.dtype != slot.dtype:
            return False
        raw = self.workspace.take("raw", stop - start, DTYPES[slot.dtype])
        operand.checkpoint.read(operand.entry, start, raw)
        if raw.numel():
            view = raw.view(torch.uint8).numpy().data
            self.store.write(slot, start * operand.entry.itemsize, view)
        return True

    def _asked(self, block: Block, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except ValueError as error:
            if block.tensor.name in str(error):
                raise
            raise ValueError(f"{block.tensor.name}: {error}") from error

    def _write(self, task: Task, block: Block) -> list[Slot]:
        result = self._asked(block, lambda: self.method.map(block)) if task.merged else block.operands[0]
        if task.add_base and block.base is not None:
            result = torch.add(block.base, result, out=result)
        if task.finish is not None:
            pairs, numbers = task.finish(task, result.view(task.info.shape))
            self.store.note(task.info.index, numbers)
        else:
            assert task.slot is not None
            pairs = [(task.slot, result)]
        place = f"{block.tensor.name}, elements {block.start} to {block.stop - 1}"
        for slot, values in pairs:
            self._put(place, slot, block.start, values, lambda: self._culprits(task, block))
        return [slot for slot, _ in pairs]

    def _put(self, place: str, slot: Slot, start: int, values: Tensor, culprits: Callable[[], str]) -> None:
        """Round values to the stored type and write them, unless they are not finite."""
        flat = values.reshape(-1)
        dtype = DTYPES[slot.dtype]
        rounded = flat
        if dtype != flat.dtype:
            rounded = self.workspace.take("rounded", flat.numel(), dtype).copy_(flat)
        # The sum of finite numbers is finite, short of overflow, and far cheaper than a look at each.
        certain = bool(torch.isfinite(flat.sum())) and dtype != torch.float16
        if not certain and not bool(torch.isfinite(rounded).all()):
            found = culprits()
            if found:
                raise ValueError(f"{place}: NaN or infinite values in {found}")
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(f"{place}: the result is not finite in {kind}, though the parents are")
        if rounded.numel():
            self.store.write(slot, start * dtype.itemsize, rounded.view(torch.uint8).numpy().data)

    def _culprits(self, task: Task, block: Block) -> str:
        # What was read may have been overwritten.
        again = self._load(task, block.start, block.stop, [], all_at_once=True)
        parts = [(o.label, values) for o, values in zip(task.operands, again.operands, strict=True)]
        if again.base is not None and task.base is not None:
            parts.insert(0, (task.base.label, again.base))
            if not bool(torch.isfinite(again.base).all()):  # task vectors carry it on
                return task.base.label
        wrong = {label for label, values in parts if not bool(torch.isfinite(values).all())}
        return ", ".join(sorted(wrong))

    def _record(self, task: Task, numbers: Iterable[int], slots: Sequence[Slot], count: int) -> None:
        nbytes = count * 4
        self.store.record([(task.info.index, number) for number in numbers], slots, nbytes)
        self.advance(count)

    # Threads --------------------------------------------------------------------------------------

    def _ordered(
        self, pool: ThreadPoolExecutor, work: Callable[[A], B], items: Iterable[A]
    ) -> Iterator[tuple[A, B]]:
        """Yield each item with its result in the order of the items, with few results waiting at a time."""
        waiting: deque[tuple[A, Future[B]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > 2 * self.threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


class _OneByOne(Sequence[Tensor]):
    """Operands that are read when they are asked for."""

    def __init__(self, read: Callable[[int], Tensor], length: int) -> None:
        self.read, self.length = read, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < self.length:
            raise IndexError(number)
        return self.read(number)


def available_threads() -> int:
    """Return the number of processors that this process may use, 8 at most."""
    return max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))
