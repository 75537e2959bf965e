"""Composition: what adds up exactly is added up, what does not is refused by the part's name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsupportedError,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.composition import AdapterPart, compose, composed_digest
from manyhats.adapters.lowering.lowering import lower
from manyhats.adapters.primitives import (
    Affine,
    Bottleneck,
    BottleneckInput,
    Delta,
    EmbeddingLowRank,
    EmbeddingRows,
    HeadRows,
    HeadWeight,
    InputScale,
    KVPrefix,
    LayerNorm,
    LoweredAdapter,
    LowRank,
    PromptEmbeddings,
)
from manyhats.adapters.sites import Site
from support.factories.adapters import ALL_LINEARS, lora_config, lora_tensors
from support.factories.prefixes import artifact_of, prefix_config, prefix_tensors, tiny_base

BASE = tiny_base()
LIMITS = AdapterLimits()
SITE = Site(0, "q_proj")
FEED_FORWARD = Site(1, "feed_forward")


def adapter(
    *deltas: Delta, name: str = "a", prefix: KVPrefix | PromptEmbeddings | None = None
) -> LoweredAdapter:
    return LoweredAdapter(digest=f"sha256:{name}", deltas=deltas, prefix=prefix)


def parts_of(*adapters: LoweredAdapter, weights: Sequence[float] | None = None) -> list[AdapterPart]:
    return [
        AdapterPart(f"parts[{i}]", each, 1.0 if weights is None else weights[i])
        for i, each in enumerate(adapters)
    ]


def low_rank(
    rank: int = 2, *, site: Site = SITE, seed: int = 0, scale: float = 0.5, dtype: torch.dtype = torch.float32
) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator)
    return LowRank(site, a.to(dtype), b.to(dtype), scale)


def update(delta: LowRank) -> Tensor:
    """The change of the weight, [d_out, d_in], in float64."""
    return delta.scale * delta.b.double() @ delta.a.double()


def bottleneck(**fields: object) -> Bottleneck:
    plain = Bottleneck(
        site=FEED_FORWARD,
        input=BottleneckInput.SUM,
        down=torch.randn(2, 4),
        down_bias=torch.randn(2),
        up=torch.randn(4, 2),
        up_bias=torch.randn(4),
        activation="relu",
        scale=torch.tensor([4.0]),
    )
    return replace(plain, **fields)  # type: ignore[arg-type]


_SCALES = st.floats(-8, 8).filter(lambda value: abs(value) > 1e-3)
_DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), _SCALES, _SCALES, _DTYPES), min_size=1, max_size=4),
)
def test_low_rank_deltas_of_any_ranks_sum_with_their_weights(
    drawn: list[tuple[int, float, float, torch.dtype]],
) -> None:
    deltas = [low_rank(r, seed=i, scale=s, dtype=d) for i, (r, s, _, d) in enumerate(drawn)]
    weights = [weight for _, _, weight, _ in drawn]
    parts = parts_of(*(adapter(d, name=str(i)) for i, d in enumerate(deltas)), weights=weights)
    (combined,) = compose(parts, LIMITS).deltas
    assert isinstance(combined, LowRank)
    assert combined.rank == sum(rank for rank, _, _, _ in drawn)
    expected = torch.stack([w * update(d) for w, d in zip(weights, deltas, strict=True)]).sum(0)
    torch.testing.assert_close(update(combined), expected, atol=1e-4, rtol=1e-5)


def test_equal_scales_leave_the_matrices_as_they_are_stored() -> None:
    first = low_rank(2, seed=1, dtype=torch.bfloat16)
    second = low_rank(3, seed=2, dtype=torch.bfloat16)
    (combined,) = compose(parts_of(adapter(first, name="1"), adapter(second, name="2")), LIMITS).deltas
    assert isinstance(combined, LowRank)
    assert combined.scale == 0.5
    assert torch.equal(combined.a, torch.cat((first.a, second.a)))
    assert torch.equal(combined.b, torch.cat((first.b, second.b), dim=1))
    assert combined.a.dtype is torch.bfloat16


def test_deltas_of_which_each_changes_nothing_change_nothing_together() -> None:
    parts = parts_of(adapter(low_rank(scale=0.0), name="1"), adapter(low_rank(scale=0.0), name="2"))
    (combined,) = compose(parts, LIMITS).deltas
    assert isinstance(combined, LowRank)
    assert combined.scale == 0


def test_parts_at_different_places_keep_their_own_deltas() -> None:
    one, other = low_rank(site=Site(0, "q_proj")), low_rank(site=Site(1, "q_proj"), seed=3)
    ia3 = Affine(Site(0, "k_proj"), torch.randn(5), None)
    composed = compose(parts_of(adapter(other, name="1"), adapter(one, ia3, name="2")), LIMITS)
    assert composed.deltas == (ia3, one, other)


def test_every_order_of_the_parts_gives_the_same_bits() -> None:
    adapters = [adapter(low_rank(seed=i, scale=0.3 * (i + 1)), name=str(i)) for i in range(3)]
    weights = (0.3, -1.0, 2.5)
    composed = []
    for order in permutations(range(3)):
        parts = parts_of(*(adapters[i] for i in order), weights=[weights[i] for i in order])
        composed.append(compose(parts, LIMITS))
    first = composed[0].deltas[0]
    assert isinstance(first, LowRank)
    for other in composed:
        delta = other.deltas[0]
        assert isinstance(delta, LowRank)
        assert other.digest == composed[0].digest
        assert delta.scale == first.scale
        assert torch.equal(delta.a, first.a)
        assert torch.equal(delta.b, first.b)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["sha256:a", "sha256:b", "sha256:c"]), _SCALES), max_size=4),
    st.lists(st.tuples(st.sampled_from(["sha256:a", "sha256:b", "sha256:c"]), _SCALES), max_size=4),
)
def test_digests_are_equal_only_for_the_same_parts_and_weights(
    one: list[tuple[str, float]], other: list[tuple[str, float]]
) -> None:
    assert composed_digest(one) == composed_digest(one[::-1])
    assert (composed_digest(one) == composed_digest(other)) == (sorted(one) == sorted(other))


def test_a_composition_of_one_is_another_adapter_than_its_part() -> None:
    single = adapter(low_rank())
    assert compose(parts_of(single), LIMITS).digest not in (single.digest, "")
    assert composed_digest([("x", 1)]) == composed_digest([("x", 1.0)])


def test_the_biases_of_low_rank_deltas_sum_with_their_weights() -> None:
    first, second = torch.randn(5), torch.randn(5)
    parts = parts_of(
        adapter(low_rank(seed=1), Affine(SITE, None, first), name="1"),
        adapter(low_rank(seed=2), Affine(SITE, None, second), name="2"),
        adapter(low_rank(seed=3), name="3"),
        weights=(2.0, -0.5, 1.0),
    )
    low, affine = compose(parts, LIMITS).deltas
    assert isinstance(low, LowRank)
    assert isinstance(affine, Affine)
    assert low.rank == 6
    assert affine.scale is None
    torch.testing.assert_close(affine.offset, 2 * first - 0.5 * second)


def test_rescalings_multiply() -> None:
    one, other = torch.randn(5), torch.randn(5)
    (affine,) = compose(
        parts_of(adapter(Affine(SITE, one, None), name="1"), adapter(Affine(SITE, other, None), name="2")),
        LIMITS,
    ).deltas
    (inputs,) = compose(
        parts_of(adapter(InputScale(SITE, one), name="1"), adapter(InputScale(SITE, other), name="2")), LIMITS
    ).deltas
    assert isinstance(affine, Affine)
    assert isinstance(inputs, InputScale)
    torch.testing.assert_close(affine.scale, one * other)
    assert affine.offset is None
    torch.testing.assert_close(inputs.scale, one * other)


def test_embedding_deltas_sum() -> None:
    one = EmbeddingLowRank(torch.randn(9, 2), torch.randn(4, 2), 0.5)
    other = EmbeddingLowRank(torch.randn(9, 3), torch.randn(4, 3), 2.0)
    parts = parts_of(adapter(one, name="1"), adapter(other, name="2"), weights=(3.0, 1.0))
    (combined,) = compose(parts, LIMITS).deltas
    assert isinstance(combined, EmbeddingLowRank)
    torch.testing.assert_close(
        combined.scale * combined.a @ combined.b.T, 1.5 * one.a @ one.b.T + 2.0 * other.a @ other.b.T
    )


@pytest.mark.parametrize("kind", [EmbeddingRows, HeadRows])
def test_rows_of_different_tokens_are_joined(kind: type[EmbeddingRows] | type[HeadRows]) -> None:
    one = kind(torch.tensor([7, 1]), torch.randn(2, 4))
    other = kind(torch.tensor([3]), torch.randn(1, 4))
    (joined,) = compose(parts_of(adapter(one, name="1"), adapter(other, name="2")), LIMITS).deltas
    assert isinstance(joined, kind)
    assert dict(zip(joined.ids.tolist(), joined.rows, strict=True)).keys() == {7, 1, 3}
    assert torch.equal(joined.rows[joined.ids.tolist().index(3)], other.rows[0])


def test_a_prefix_goes_with_deltas() -> None:
    prefix = lower(artifact_of(prefix_config(BASE), prefix_tensors(BASE)), BASE)
    lora = lower(artifact_of(lora_config(BASE, rank=2), lora_tensors(BASE, rank=2)), BASE)
    for parts in (parts_of(prefix, lora, weights=(1, 0.5)), parts_of(lora, prefix, weights=(0.5, 1))):
        composed = compose(parts, LIMITS)
        assert composed.prefix is prefix.prefix
        assert len(composed.deltas) == 2 * len(ALL_LINEARS)


def test_a_weight_scales_what_a_plain_bottleneck_adds() -> None:
    (weighted,) = compose(parts_of(adapter(bottleneck()), weights=[0.25]), LIMITS).deltas
    assert isinstance(weighted, Bottleneck)
    torch.testing.assert_close(weighted.scale, torch.tensor([1.0]))


PREFIX = KVPrefix(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
NORM = LayerNorm(torch.ones(4), torch.zeros(4))
ROWS = (torch.tensor([5]), torch.randn(1, 4))

MEETINGS: dict[str, tuple[Delta, Delta, str]] = {
    "bottlenecks": (bottleneck(), bottleneck(), "a bottleneck"),
    "LoRA on IA3": (Affine(SITE, torch.ones(5), None), low_rank(), "a low-rank delta"),
    "IA3 on LoRA": (low_rank(), InputScale(SITE, torch.ones(6)), "a rescaling"),
    "DoRA on IA3": (Affine(SITE, torch.ones(5), None), Affine(SITE, torch.ones(5), torch.ones(5)), "offset"),
    "output and input": (Affine(SITE, torch.ones(5), None), InputScale(SITE, torch.ones(6)), "a rescaling"),
    "rows of one token": (EmbeddingRows(*ROWS), EmbeddingRows(*ROWS), "rows in place"),
    "head rows of one token": (HeadRows(*ROWS), HeadRows(*ROWS), "rows in place"),
    "rows and an embedding delta": (
        EmbeddingRows(*ROWS),
        EmbeddingLowRank(torch.ones(9, 1), torch.ones(4, 1), 1.0),
        "a low-rank delta",
    ),
    "heads": (HeadWeight(torch.ones(9, 4)), HeadWeight(torch.ones(9, 4)), "a weight in place"),
    "a head and LoRA on it": (HeadWeight(torch.ones(9, 4)), low_rank(site=Site(-1, "lm_head")), "a low-rank"),
}


@pytest.mark.parametrize(("one", "other", "what"), MEETINGS.values(), ids=MEETINGS.keys())
def test_what_depends_on_an_order_is_refused_and_both_parts_named(
    one: Delta, other: Delta, what: str
) -> None:
    with pytest.raises(AdapterUnsupportedError, match="cannot be combined exactly") as caught:
        compose(parts_of(adapter(one, name="1"), adapter(other, name="2")), LIMITS)
    assert caught.value.subject == "parts[1]"
    assert "parts[0]" in caught.value.description
    assert what in caught.value.description


@pytest.mark.parametrize(
    "refused",
    [
        adapter(Affine(SITE, torch.ones(5), None)),
        adapter(Affine(SITE, torch.ones(5), torch.ones(5)), low_rank()),
        adapter(InputScale(SITE, torch.ones(6))),
        adapter(EmbeddingRows(*ROWS)),
        adapter(HeadRows(*ROWS)),
        adapter(HeadWeight(torch.ones(9, 4))),
        adapter(bottleneck(norm_after=NORM)),
        adapter(bottleneck(keep=0.0)),
        adapter(bottleneck(carry=1.0)),
        adapter(prefix=PREFIX),
        adapter(low_rank(), prefix=PromptEmbeddings(torch.zeros(1, 4))),
    ],
)
def test_a_weight_is_refused_where_it_has_no_meaning(refused: LoweredAdapter) -> None:
    compose(parts_of(refused), LIMITS)
    with pytest.raises(AdapterUnsupportedError, match="has no meaning") as caught:
        compose(parts_of(adapter(low_rank(site=Site(1, "o_proj"))), refused, weights=(1, 0.5)), LIMITS)
    assert caught.value.subject == "parts[1]"


def test_two_prefixes_are_refused() -> None:
    parts = parts_of(
        adapter(prefix=PREFIX), adapter(low_rank()), adapter(prefix=PromptEmbeddings(torch.zeros(1, 4)))
    )
    with pytest.raises(AdapterUnsupportedError, match="so has parts") as caught:
        compose(parts, LIMITS)
    assert caught.value.subject == "parts[2]"


@pytest.mark.parametrize("weight", [0.0, -0.0, math.nan, math.inf, 1e7, -1e7])
def test_weights_are_finite_bounded_and_not_zero(weight: float) -> None:
    with pytest.raises(AdapterInvalidError) as caught:
        compose(parts_of(adapter(low_rank()), adapter(low_rank()), weights=(1.0, weight)), LIMITS)
    assert caught.value.subject == "parts[1]"


@pytest.mark.parametrize(
    ("num_parts", "limits", "error"),
    [
        (0, AdapterLimits(), AdapterInvalidError),
        (3, AdapterLimits(max_parts=2), AdapterTooLargeError),
        (3, AdapterLimits(max_rank=5), AdapterTooLargeError),
    ],
)
def test_parts_and_their_ranks_together_have_limits(
    num_parts: int, limits: AdapterLimits, error: type[AdapterError]
) -> None:
    parts = parts_of(*(adapter(low_rank(2, seed=i), name=str(i)) for i in range(num_parts)))
    with pytest.raises(error):
        compose(parts, limits)
    if num_parts:
        compose(parts, AdapterLimits(max_parts=3, max_rank=6))
