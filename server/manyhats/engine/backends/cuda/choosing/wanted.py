"""What is wanted from a step's logits, as bytes for one copy, and where kernels leave what they find."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from manyhats.engine.backends.cuda.triton import wanted as places
from manyhats.engine.backends.wants import Array, Choices, Wants

Bytes = npt.NDArray[np.uint8]

_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Field:
    """An array in a buffer of bytes, ``place`` from its beginning."""

    place: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @property
    def size(self) -> int:
        """Its elements."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.place + self.dtype.itemsize * self.size

    def of(self, buffer: Bytes) -> Array:
        """A view of it."""
        return buffer[self.place : self.end].view(self.dtype).reshape(self.shape)


def fields_of(arrays: Sequence[tuple[tuple[int, ...], npt.DTypeLike]], first: int = 0) -> tuple[Field, ...]:
    """Fields of these shapes and types, one behind the other."""
    fields = []
    for shape, dtype in arrays:
        field = Field(-(-first // _ALIGNMENT) * _ALIGNMENT, shape, np.dtype(dtype))
        fields.append(field)
        first = field.end
    return tuple(fields)


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Rows and tokens whose log-probabilities are wanted: the targets, then what choices choose.

    Attributes:
        rows: [P].
        ids: [P], −1 − i for the token of choice i.
        num_top: [P], how many of the row's most likely, at most V.
        choices: the choices that want one, in the order of the last pairs.
    """

    rows: Array
    ids: Array
    num_top: Array
    choices: Array

    @classmethod
    def of(cls, wants: Wants, vocab_size: int) -> Pairs:
        """Those of a step."""
        targets, choices = wants.targets, wants.choices
        asking = np.flatnonzero(choices.num_logprobs >= 0)
        return cls(
            np.concatenate((targets.rows, choices.rows[asking])),
            np.concatenate((targets.ids, -1 - asking)),
            np.minimum(np.concatenate((targets.num_top, choices.num_logprobs[asking])), vocab_size),
            asking,
        )

    @property
    def num(self) -> int:
        """P."""
        return len(self.rows)

    @property
    def ends(self) -> Array:
        """[P + 1], where each one's most likely tokens begin, and where the last one's end."""
        ends: Array = np.concatenate(((0,), np.cumsum(self.num_top)))
        return ends


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Where kernels leave what they find; ``triton.wanted`` says what each field is.

    ``whole`` is [W, V] float32 and ``hidden`` [H, E] float32.
    """

    tokens: Field
    ranks: Field
    logprobs: Field
    top_ids: Field
    top_logprobs: Field
    bad: Field
    whole: Field
    hidden: Field

    @classmethod
    def of(
        cls, wants: Wants, pairs: Pairs, bad: tuple[int, int], vocab_size: int, hidden: tuple[int, int]
    ) -> Found:
        """For a step; ``bad`` and ``hidden`` are shapes."""
        num_top = int(pairs.num_top.sum())
        return cls(
            *fields_of(
                (
                    ((wants.choices.num_rows,), np.int32),
                    ((pairs.num,), np.int32),
                    ((pairs.num,), np.float64),
                    ((num_top,), np.int32),
                    ((num_top,), np.float64),
                    (bad, np.int8),
                    ((wants.whole.size, vocab_size), np.float32),
                    (hidden, np.float32),
                )
            )
        )

    @property
    def num_bytes(self) -> int:
        """Of all fields."""
        return self.hidden.end

    @property
    def places(self) -> list[int]:
        """Of what kernels write, in the header's order."""
        fields = (self.tokens, self.ranks, self.logprobs, self.top_ids, self.top_logprobs, self.bad)
        return [field.place for field in fields]


@dataclass(frozen=True, slots=True, eq=False)
class Upload:
    """What is wanted, as it goes to the device.

    Attributes:
        header: [17] int64, see ``triton.wanted``.
        arrays: what follows it.
        fields: their places.
    """

    header: Array
    arrays: tuple[Array, ...]
    fields: tuple[Field, ...]

    @classmethod
    def of(cls, wants: Wants, pairs: Pairs, found: Found, num_rows: int, vocab_size: int) -> Upload:
        """Lay it out; M is ``num_rows``."""
        choices = wants.choices
        masks = choices.masks
        arrays = (
            _ints(choices, vocab_size),
            _numbers(choices),
            choices.edit_ids.astype(np.int32),
            choices.edit_bias,
            2 * choices.edit_counts.astype(np.int32) + choices.edit_seen,
            masks,
            np.stack((pairs.rows, pairs.ids, pairs.num_top, pairs.ends[:-1]), axis=1).astype(np.int32),
            wants.whole.astype(np.int32),
        )
        fields = fields_of([(array.shape, array.dtype) for array in arrays], 8 * places.HEADER.value)
        counts = [num_rows, choices.num_rows, pairs.num, masks.shape[1]]
        inputs = [field.place for field in fields[:-1]]
        return cls(np.array(counts + inputs + found.places, dtype=np.int64), arrays, fields)

    @property
    def num_bytes(self) -> int:
        """Of all of it."""
        return self.fields[-1].end

    @property
    def whole(self) -> Field:
        """[W] int32, the rows that are wanted whole."""
        return self.fields[-1]

    def write(self, buffer: Bytes) -> None:
        """Writes it to the beginning of a buffer."""
        buffer[: self.header.nbytes].view(np.int64)[:] = self.header
        for field, array in zip(self.fields, self.arrays, strict=True):
            field.of(buffer)[...] = array


def _ints(choices: Choices, vocab_size: int) -> Array:
    """[S, 8] int32, see ``triton.wanted.INTS``."""
    filters = ((choices.top_k > 0) | (choices.top_p < 1) | (choices.min_p > 0) | (choices.typical_p < 1)) & (
        choices.temperature > 0
    )
    has_edits = np.diff(choices.edit_start) > 0
    ints = np.zeros((choices.num_rows, 8), dtype=np.int32)
    ints[:, 0] = choices.rows
    ints[:, 1] = np.minimum(choices.top_k, vocab_size)
    ints[:, 2] = choices.edit_start[:-1]
    ints[:, 3] = choices.edit_start[1:]
    ints[:, 4] = choices.mask_rows
    ints[:, 5] = filters | has_edits | (choices.mask_rows >= 0)
    return ints


def _numbers(choices: Choices) -> Array:
    """[S, 8] float64, see ``triton.wanted.NUMBERS``."""
    with np.errstate(divide="ignore"):
        log_min_p = np.log(choices.min_p)
    columns = (
        choices.temperature,
        choices.top_p,
        log_min_p,
        choices.typical_p,
        choices.point,
        choices.repetition_penalty,
        choices.presence_penalty,
        choices.frequency_penalty,
    )
    return np.stack(columns, axis=1).astype(np.float64)
