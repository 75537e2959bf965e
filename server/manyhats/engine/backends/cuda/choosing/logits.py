"""Logits that stay on the device, and what is computed from them there: nothing waits before ``Pending.result``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from manyhats.engine.backends.cuda.choosing.choose import AtMost, Choosing
from manyhats.engine.backends.cuda.choosing.outcome import outcome_of
from manyhats.engine.backends.cuda.choosing.wanted import Bytes, Field, Found, Pairs, Upload
from manyhats.engine.backends.cuda.exchange import Exchange, grown
from manyhats.engine.backends.cuda.failures import reported
from manyhats.engine.backends.cuda.runtime import Runtime
from manyhats.engine.backends.wants import Outcome, Wants, check_ids

ReadT = TypeVar("ReadT")


class Finisher:
    """Finishes a model's steps, one after another on one stream; several may be in flight.

    Attributes:
        choosing: the kernels.
        wants: bytes on the device, what is wanted; grows, and has then moved.
        found: the same of what is found.

    Args:
        choosing: the kernels.
        runtime: of the device where they run.
        room: bytes to begin with, for each of both and on either side.
    """

    def __init__(self, choosing: Choosing, runtime: Runtime, room: int = 1 << 20) -> None:
        self.choosing = choosing
        self._runtime = runtime
        self._room = room
        self._idle: list[Exchange] = []
        self.wants = torch.empty(room, dtype=torch.uint8, device=runtime.device)
        self.found = torch.empty(room, dtype=torch.uint8, device=runtime.device)

    def upload(self, upload: Upload) -> Exchange:
        """Launch the copy of what is wanted, from memory that no other step in flight has."""
        exchange = self._idle.pop() if self._idle else Exchange(self._runtime, self._room)
        num_bytes = upload.num_bytes
        exchange.wants.make_room(num_bytes)
        upload.write(exchange.wants.array)
        if len(self.wants) < num_bytes:
            self.wants = self.wants.new_empty(grown(num_bytes))
        self._runtime.copy(self.wants[:num_bytes], exchange.wants.tensor[:num_bytes])
        return exchange

    def make_room(self, num_bytes: int) -> None:
        """Make room on the device for what is found."""
        if len(self.found) < num_bytes:
            self.found = self.found.new_empty(grown(num_bytes))

    def download(self, exchange: Exchange, num_bytes: int) -> None:
        """Launch the copy of what was found."""
        exchange.found.make_room(num_bytes)
        self._runtime.copy(exchange.found.tensor[:num_bytes], self.found[:num_bytes])
        exchange.record()

    def collect(self, exchange: Exchange, read: Callable[[Bytes], ReadT]) -> ReadT:
        """Wait for what was found and read it, all of it: the memory is then another step's."""
        exchange.wait()
        found = read(exchange.found.array)
        self._idle.append(exchange)
        return found


class DevicePending:
    """``Pending`` of a step whose kernels and copies are launched.

    Attributes:
        found: where what was found lies in the finisher's memory, until the next step is finished.
    """

    def __init__(self, finisher: Finisher, exchange: Exchange, found: Found, pairs: Pairs) -> None:
        self._finisher = finisher
        self._exchange = exchange
        self.found = found
        self._pairs = pairs
        self._outcome: Outcome | None = None

    def result(self) -> Outcome:
        """Wait for the outcome; nothing else does."""
        if self._outcome is None:
            read = partial(outcome_of, self.found, self._pairs)
            with reported():
                self._outcome = self._finisher.collect(self._exchange, read)
        return self._outcome


class DeviceLogits:
    """``Logits`` [M, V] float32 on the device.

    Args:
        values: the logits, contiguous; [0, 0] for a model without a head.
        finisher: of the model.
        wanted: hidden values to return, [H, E] float32; None for none.
    """

    def __init__(self, values: Tensor, finisher: Finisher, wanted: Tensor | None = None) -> None:
        self.values = values
        self._wanted = values.new_empty(0, 0) if wanted is None else wanted
        self._finisher = finisher

    @torch.inference_mode()
    def finish(self, wants: Wants) -> DevicePending:
        """Launch it all.

        Raises:
            IndexError: a target is not a token.
        """
        num_rows, vocab_size = self.values.shape
        if wants.targets.ids.size:
            check_ids(wants.targets.ids, vocab_size)
        finisher = self._finisher
        pairs = Pairs.of(wants, vocab_size)
        num_parts = finisher.choosing.num_parts(vocab_size)
        found = Found.of(wants, pairs, (num_rows, num_parts), vocab_size, self._hidden_shape)
        upload = Upload.of(wants, pairs, found, num_rows, vocab_size)
        exchange = finisher.upload(upload)
        finisher.make_room(found.num_bytes)
        if num_rows:
            is_drawn = bool(wants.choices.temperature.any())
            at_most = AtMost(wants.choices.num_rows, is_drawn, pairs.num)
            finisher.choosing.launch(self.values, finisher.wants, finisher.found, at_most)
        self._copy_rows(upload, found)
        finisher.download(exchange, found.num_bytes)
        return DevicePending(finisher, exchange, found, pairs)

    @property
    def _hidden_shape(self) -> tuple[int, int]:
        num_rows, size = self._wanted.shape
        return num_rows, size

    def _copy_rows(self, upload: Upload, found: Found) -> None:
        """Whole rows and hidden values to what is found."""
        finisher = self._finisher
        if found.whole.size:
            rows = on_device(upload.whole, finisher.wants, torch.int32)
            torch.index_select(
                self.values, 0, rows, out=on_device(found.whole, finisher.found, torch.float32)
            )
        if found.hidden.size:
            on_device(found.hidden, finisher.found, torch.float32).copy_(self._wanted)


def on_device(field: Field, buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """A view of a field in a buffer on the device."""
    return buffer[field.place : field.end].view(dtype).view(field.shape)
