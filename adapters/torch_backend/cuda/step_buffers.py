"""What crosses between host and device in a step: one copy there, one copy back, and the tokens that stay.

A buffer belongs to one launched step until its result was read, so that no copy in flight is overwritten.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence as Seq
from itertools import chain

import torch
from torch import Tensor

from adapters.torch_backend.cuda.machine import Machine


class StepBuffer:
    """Pinned memory for one step in flight, both ways."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._sent = machine.pinned(1024)
        self._received = machine.pinned(256)
        self._done = machine.event()

    def upload(
        self, ints: Seq[Seq[int]], floats: Seq[Seq[float]] = (), *, into: Tensor | None = None
    ) -> list[Tensor]:
        """One copy of all lists to the device, to the front of `into (words,)` int64 where that is given.

        Returns a view for each list, int64 and then float64.
        """
        lengths = [len(numbers) for numbers in chain(ints, floats)]
        num_words = sum(lengths)
        num_floats = sum(lengths[len(ints) :])
        if len(self._sent) < num_words:
            self._sent = self._machine.pinned(2 * num_words)
        # All at once by `struct`: NumPy takes twice as long for lists, and a step at 256 rows has thousands.
        numbers = chain.from_iterable(chain(ints, floats))
        words = self._sent.numpy().data
        struct.pack_into(f"{num_words - num_floats}q{num_floats}d", words, 0, *numbers)
        if into is None:
            into = torch.empty(num_words, dtype=torch.int64, device=self._machine.device)
        into[:num_words].copy_(self._sent[:num_words], non_blocking=True)
        parts = torch.split(into[:num_words], lengths)
        return [*parts[: len(ints)], *(part.view(torch.float64) for part in parts[len(ints) :])]

    def download(self, tokens: Tensor) -> None:
        """Start to bring `tokens (n,)` int64 to the host."""
        if len(self._received) < len(tokens):
            self._received = self._machine.pinned(2 * len(tokens))
        self._received[: len(tokens)].copy_(tokens, non_blocking=True)
        self._done.record()

    def received(self, num_tokens: int) -> list[int]:
        """Wait for what `download` started."""
        self._done.synchronize()
        tokens: list[int] = self._received[:num_tokens].tolist()
        return tokens


class BufferPool:
    """Lends buffers; one that is not given back is not lent again."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._free: list[StepBuffer] = []

    def take(self) -> StepBuffer:
        return self._free.pop() if self._free else StepBuffer(self._machine)

    def give_back(self, buffer: StepBuffer) -> None:
        self._free.append(buffer)


class TokenTable:
    """Every token that a slot's sequence has, by position, on the device: `(slots, max_len + 1)`."""

    def __init__(self, num_slots: int, max_len: int, device: torch.device) -> None:
        self.width = max_len + 1
        self.ids = torch.zeros(num_slots, self.width, dtype=torch.int64, device=device)

    def put(self, slots: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Note the `tokens (n,)` at these positions."""
        self.ids.view(-1).index_copy_(0, slots * self.width + positions, tokens)

    def complete(self, ids: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """`ids (n,)` with the known token where one is negative; all of them are noted."""
        flat = slots * self.width + positions
        ids = torch.where(ids < 0, self.ids.view(-1)[flat], ids)
        self.ids.view(-1).index_copy_(0, flat, ids)
        return ids
