"""The few operations that every method is lowered to; the engine's kernels run these and know no method.

Deltas act at their site, row by row; a KV prefix lies before the sequence. For one linear of one layer the order is:
``InputScale`` on its input, the base linear, ``Affine`` on its output, then ``LowRank``, of the input as it was. No
method has both ``InputScale`` and ``LowRank`` at one linear, and no composition may.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from manyhats.adapters.heads import TaskHead
from manyhats.adapters.sites import EMBEDDING, HEAD, Site

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """Factors that a whole text shares: ``g = mean over its rows x of σ(x Wᵀ + b)``.

    Only an encoder has all rows of a text at once.

    Attributes:
        weight: W [n, d_in].
        bias: b [n].

    Source: Mao et al. 2022 (arXiv:2110.07577), as AdapterHub computes it.
    """

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A low-rank delta of one linear: ``y += g · scale · (x Aᵀ) Bᵀ``.

    Attributes:
        site: the linear; ``lm_head`` too.
        a: [R, d_in].
        b: [d_out, R].
        scale: dimensionless; alpha / R for plain LoRA.
        gate: g, of the linear's input; None for 1.

    Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1.
    """

    site: Site
    a: Tensor
    b: Tensor
    scale: float
    gate: Gate | None = None

    @property
    def rank(self) -> int:
        """R."""
        return int(self.a.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """A linear's output, bias included, rescaled and shifted: ``y = y · g · scale + offset``.

    Attributes:
        site: the linear.
        scale: [d_out], or None for 1.
        offset: [d_out], or None for 0.
        gate: g, of the linear's input; None for 1.

    Source: IA3, Liu et al. 2022 (arXiv:2205.05638); DoRA, Liu et al. 2024 (arXiv:2402.09353).
    """

    site: Site
    scale: Tensor | None
    offset: Tensor | None
    gate: Gate | None = None


@dataclass(frozen=True, slots=True, eq=False)
class InputScale:
    """A linear's input rescaled: ``W(x ⊙ scale) + b``; scale [d_in].

    Source: IA3, Liu et al. 2022 (arXiv:2205.05638), on feed-forward modules.
    """

    site: Site
    scale: Tensor


class BottleneckInput(Enum):
    """What a bottleneck reads, of the residual stream r entering a sub-layer and the sub-layer's output m.

    N is the norm of the stream that follows the sub-layer, on bases that have one.
    """

    OUTPUT = "m"
    SUM = "r + m"
    RESIDUAL = "r"
    NORMED = "N(r + m)"


@dataclass(frozen=True, slots=True, eq=False)
class LayerNorm:
    """``(x − mean) / √(variance + eps) · weight + bias``; weight and bias [D]."""

    weight: Tensor
    bias: Tensor
    eps: float = 1e-5


@dataclass(frozen=True, slots=True)
class TextEnds:
    """Which rows of a text pass through a bottleneck: those near its ends.

    Only an encoder knows the last ones.

    Attributes:
        first: how many of its first rows.
        last: how many of its last rows; a row that is both is one of these.
        is_split: whether the first rows have the first half of the bottleneck, and the last rows the second.
    """

    first: int
    last: int
    is_split: bool

    def part(self, row: int, length: int, size: int) -> range:
        """Which of the bottleneck's values a row has, of a text of so many rows."""
        half = size // 2 if self.is_split else 0
        if row >= length - self.last:
            return range(half, size)
        return range(size - half) if row < self.first else range(0)


@dataclass(frozen=True, slots=True, eq=False)
class Bottleneck:
    """A bottleneck adapter on a sub-layer's output m, r being the residual stream that entered it.

    ``f = g · scale · (U · act(D · norm_before(input) + b_d) + b_u)``, then ``m' = keep · m + carry · r + carry_normed ·
    N(r + m) + (f, or norm_after(f + norm_residual))``. The stream continues as ``r + m'``, or as ``N(r + m')`` where
    the base norms it, unless the adapter ``skips_norm``. For seq_bn, double_seq_bn and par_bn keep is 1, nothing is
    carried, and there are no norms of the adapter's own. At a layer's ``output``, and at the couplings on the
    embeddings, r and m are the stream itself, which continues as m'.

    Attributes:
        site: ``attention``, ``feed_forward`` or ``output`` of a layer, or a coupling.
        input: what it reads.
        down: D [b, hidden]. down_bias: [b].
        up: U [hidden, b]. up_bias: [hidden].
        activation: its name, one of ``activations.ACTIVATIONS``.
        scale: [hidden] or [1].
        norm_before, norm_after: or None.
        norm_residual: what is added to f inside ``norm_after``; None for nothing.
        keep: factor of m outside ``norm_after``.
        carry: factor of r.
        carry_normed: factor of N(r + m).
        skips_norm: whether the stream continues without the base's norm of it.
        gate: g, of the input; None for 1.
        ends: the rows that it changes; None for all.

    Source: Houlsby et al. 2019 (arXiv:1902.00751); Pfeiffer et al. 2021 (arXiv:2005.00247); He et al. 2022
    (arXiv:2110.04366).
    """

    site: Site
    input: BottleneckInput
    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    activation: str
    scale: Tensor
    norm_before: LayerNorm | None = None
    norm_after: LayerNorm | None = None
    norm_residual: BottleneckInput | None = None
    keep: float = 1.0
    carry: float = 0.0
    carry_normed: float = 0.0
    skips_norm: bool = False
    gate: Gate | None = None
    ends: TextEnds | None = None


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingLowRank:
    """A low-rank delta of the embedding: ``E[id] += scale · A[id] Bᵀ``; A [V, R], B [D, R].

    The delta is added before any embedding multiplier of the architecture.
    """

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingRows:
    """Rows that replace the embedding's: ``E[ids[i]] = rows[i]``; ids [n] int64, rows [n, D]."""

    ids: Tensor
    rows: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class HeadRows:
    """Rows that replace the output head's: logit ``ids[i]`` is ``rows[i] · h + bias[i]``; ids, bias [n], rows [n, E].

    The bias is None for none.
    """

    ids: Tensor
    rows: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class HeadWeight:
    """An output head that replaces the base's: weight [V, E], and bias [V], None for none."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PrefixGate:
    """One layer's keys and values of a ``KVPrefix``, times g.

    Attributes:
        site: ``prefix`` of a layer.
        gate: g, of the attention's input; n is 1, or 2: of keys, and of values.

    Source: Mao et al. 2022 (arXiv:2110.07577), as AdapterHub computes it.
    """

    site: Site
    gate: Gate


Delta = (
    LowRank
    | Affine
    | InputScale
    | Bottleneck
    | PrefixGate
    | EmbeddingLowRank
    | EmbeddingRows
    | HeadRows
    | HeadWeight
)


def site_of(delta: Delta) -> Site:
    """Where a delta acts; all that touch the embedding, or the head, meet there."""
    match delta:
        case LowRank() | Affine() | InputScale() | Bottleneck() | PrefixGate():
            return delta.site
        case EmbeddingLowRank() | EmbeddingRows():
            return EMBEDDING
        case HeadRows() | HeadWeight():
            return HEAD


def by_site(deltas: Iterable[Delta]) -> dict[Site, list[Delta]]:
    """Deltas by the site where they act; those of one site in their order."""
    found: dict[Site, list[Delta]] = {}
    for delta in deltas:
        found.setdefault(site_of(delta), []).append(delta)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class KVPrefix:
    """Keys and values before the sequence, used as they are: keys are never rotated.

    Attributes:
        keys: [L, P, Hkv, K].
        values: the same shape.
        position_offset: real token t has position ``P + t + position_offset``.

    Source: Li and Liang 2021 (arXiv:2101.00190).
    """

    keys: Tensor
    values: Tensor
    position_offset: int

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        return int(self.keys.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class PromptEmbeddings:
    """Virtual tokens before the sequence, which the engine runs with the adapter's own deltas.

    Of a decoder it keeps their keys and values while there is room; an encoder runs them with each text.

    Attributes:
        embeddings: [P, E]. They are what the embedding gives for a token, and have positions 0 … P − 1.
        are_normed: whether they enter behind the norm of an encoder's embeddings, with neither position nor type. Then
            real token t has position t.
        are_read: whether what reads a text's first row reads the first of them.

    Source: Lester et al. 2021 (arXiv:2104.08691).
    """

    embeddings: Tensor
    are_normed: bool = False
    are_read: bool = True

    @property
    def position_offset(self) -> int:
        """Real token t has position ``P + t + position_offset``."""
        return -self.num_virtual_tokens if self.are_normed else 0

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        return int(self.embeddings.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class LoweredAdapter:
    """One adapter as primitives, ready for the engine; ``digest`` names the artifact it came from.

    ``head`` is what its task reads texts with; None if it generates. ``vocab_size`` is the number of its task's tokens;
    None if they are the base's.
    """

    digest: str
    deltas: tuple[Delta, ...]
    prefix: KVPrefix | PromptEmbeddings | None = None
    head: TaskHead | None = None
    vocab_size: int | None = None


def num_tokens(deltas: Iterable[Delta], vocab_size: int) -> int:
    """The tokens of a task with these deltas: those of its head, or of the base's and of rows beyond.

    Args:
        deltas: the task's.
        vocab_size: V, the base's.
    """
    largest = vocab_size
    for delta in deltas:
        if isinstance(delta, HeadWeight):
            return int(delta.weight.shape[0])
        if isinstance(delta, EmbeddingRows | HeadRows):
            largest = max(largest, int(delta.ids.max()) + 1)
    return largest
