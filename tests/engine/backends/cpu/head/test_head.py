"""Logits of a head in eight bits: those that matter are the head's own, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.head.logits import CpuLogits, PackedHead
from manyhats.engine.backends.cpu.int16.packing import pack_int8
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.cpu.packing import pack_linear
from manyhats.engine.backends.cpu.program import Program
from manyhats.engine.backends.logits import HostLogits
from manyhats.engine.backends.wants import NO_TARGETS, Array, Outcome, Targets, TokenLogprob, Wants
from manyhats.engine.model import architecture
from manyhats.engine.model.nf4 import BLOCK_SIZE
from manyhats.engine.model.weights import Linear
from manyhats.engine.request import SamplingParams
from manyhats.engine.sampling.penalties import LogitChanges
from manyhats.engine.sampling.sampler import SamplingRow, choices_of
from support.harnesses.linears import assert_rows_depend_on_themselves, assert_rows_keep_what_is_not_finite
from support.harnesses.sampling import mask_of

SIZE = 192
KERNELS = CpuKernels(2, is_exact=False)
KERNELS.uses_int16 = True
PLAIN = architecture.Head(is_tied=True, size=64)
CAPPED = architecture.Head(is_tied=True, size=64, divisor=2.5, softcap=8.0)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_head(
    vocab_size: int, seed: int = 0, shape: architecture.Head = PLAIN, dtype: torch.dtype = torch.bfloat16
) -> PackedHead:
    weight = (random(vocab_size, SIZE, seed=seed) * 0.2).to(dtype)
    packed = PackedHead(*KERNELS.pack_head(Linear(weight, random(vocab_size, seed=seed + 1))), shape)
    assert packed.fast is not None
    return packed


def nearly_right(head: PackedHead, hidden: Tensor) -> Tensor:
    assert head.fast is not None
    return KERNELS.linear(hidden, head.fast)


def refined(head: PackedHead, hidden: Tensor) -> Tensor:
    """What a forward's program leaves."""
    values = nearly_right(head, hidden)
    program = Program()
    program.refine(0, 1, head.own)
    rows, numbers = program.arrays()
    rows[:, col.ROWS] = col.NUM_ROWS
    frame = np.zeros(col.FRAME_SIZE, dtype=np.int64)
    frame[col.NUM_ROWS] = hidden.shape[0]
    KERNELS.run((rows, numbers), frame, [hidden, values], None, program.num_scratch_values)
    return values


def exact(head: PackedHead, hidden: Tensor) -> Tensor:
    logits = KERNELS.linear(hidden, head.own)
    if head.shape.divisor != 1.0:
        logits.div_(head.shape.divisor)
    if head.shape.softcap is not None:
        KERNELS.softcap(logits, head.shape.softcap)
    return logits


def finish_both(head: PackedHead, hidden: Tensor, wants: Wants) -> tuple[Outcome, Outcome]:
    fast = CpuLogits(head, hidden, refined(head, hidden), KERNELS).finish(wants).result()
    return fast, HostLogits(exact(head, hidden), KERNELS).finish(wants).result()


def wants_of(rows: Sequence[SamplingRow], vocab_size: int, **others: Any) -> Wants:
    wanted: dict[str, Any] = {"targets": NO_TARGETS, "whole": np.empty(0, np.int32)} | others
    return Wants(choices_of(rows, range(len(rows)), vocab_size), **wanted)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 21),
    groups=st.integers(4, 40),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_eight_bits_err_by_half_a_step_of_a_block_s_largest(
    rows: int, groups: int, seed: int, dtype: torch.dtype
) -> None:
    weight = random(16 * groups, SIZE, seed=seed).to(dtype)
    weight[3, :BLOCK_SIZE] = 0
    weight[5] *= 1e4
    packed = pack_int8(Linear(weight, None))
    decoded = KERNELS.linear(torch.eye(SIZE), packed).T
    blocks = weight.float().view(16 * groups, -1, BLOCK_SIZE)
    steps = (blocks.abs().amax(2, keepdim=True) / 127).expand_as(blocks).reshape(decoded.shape)
    assert bool(((decoded - weight.float()).abs() <= 0.502 * steps + 2e-5 * weight.float().abs()).all())
    x = random(rows, SIZE, seed=seed + 1)
    expected = x.double() @ decoded.double().T
    size_of_terms = x.abs().double() @ decoded.abs().double().T
    assert bool(((KERNELS.linear(x, packed) - expected).abs() <= 2**-12 * size_of_terms).all())


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 21), seed=st.integers(0, 2**16), data=st.data())
def test_a_row_in_eight_bits_depends_on_itself_alone(rows: int, seed: int, data: st.DataObject) -> None:
    packed = pack_int8(Linear(random(16 * 7, SIZE, seed=seed), random(16 * 7, seed=1)))
    some = data.draw(st.permutations(range(rows)))[: data.draw(st.integers(1, rows))]
    x = random(rows, SIZE, seed=seed)
    assert_rows_depend_on_themselves((CpuKernels(1), KERNELS), packed, x, some)
    if rows > 2:
        assert_rows_keep_what_is_not_finite(KERNELS, packed, x, nan_row=0, inf_row=1)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(4, 70),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_the_likeliest_64_at_least_become_what_the_head_gives(
    rows: int, groups: int, seed: int, dtype: torch.dtype
) -> None:
    head, hidden = make_head(16 * groups, seed, dtype=dtype), random(rows, SIZE, seed=seed)
    before, after, true = nearly_right(head, hidden), refined(head, hidden), exact(head, hidden)
    is_exact = after == true
    likeliest = before.topk(64, dim=1).indices
    assert bool(is_exact.gather(1, likeliest).all())
    assert bool((is_exact | (after == before)).all())
    for row in range(rows):
        assert torch.equal(refined(head, hidden[row : row + 1])[0], after[row])


def test_few_others_become_exact_with_them() -> None:
    """Also where the tokens of one place in the vocabulary are all unlikely."""
    head, hidden = make_head(16_384, 5), random(8, SIZE, seed=6)
    head.own.bias[8_000:9_000] = -1e3
    assert head.fast is not None
    head.fast.bias[8_000:9_000] = -1e3
    num_changed = (refined(head, hidden) != nearly_right(head, hidden)).sum(dim=1)
    assert 40 < int(num_changed.min()) <= int(num_changed.max()) < 700


@settings(max_examples=30, deadline=None)
@given(
    kinds=st.lists(
        st.sampled_from(["plain", "bias", "penalties", "mask", "few", "all"]), min_size=1, max_size=9
    ),
    seed=st.integers(0, 2**16),
    shape=st.sampled_from([PLAIN, CAPPED]),
    data=st.data(),
)
def test_greedy_rows_choose_what_they_would_of_exact_logits(
    kinds: list[str], seed: int, shape: architecture.Head, data: st.DataObject
) -> None:
    vocab_size = 16 * data.draw(st.integers(4, 50))
    head, hidden = make_head(vocab_size, seed, shape), random(len(kinds), SIZE, seed=seed + 1)
    generator = np.random.default_rng(seed)
    rows = [greedy_row(kind, exact(head, hidden)[index], generator) for index, kind in enumerate(kinds)]
    fast, true = finish_both(head, hidden, wants_of(rows, vocab_size))
    assert [token.id for token in fast.tokens] == [token.id for token in true.tokens]
    for token, expected in zip(fast.tokens, true.tokens, strict=True):
        assert (token.logprob is None) == (expected.logprob is None)
        if token.logprob and expected.logprob:
            assert token.logprob.logprob == pytest.approx(expected.logprob.logprob, abs=0.01)
            assert token.logprob.top_ids[:3] == expected.logprob.top_ids[:3]


def greedy_row(kind: str, logits: Tensor, generator: np.random.Generator) -> SamplingRow:
    """A row whose likeliest tokens are made unlikely, or may not come."""
    vocab_size, likeliest = logits.shape[0], logits.argsort(descending=True).tolist()
    params: dict[str, Any] = {"temperature": 0.0}
    allowed = None
    if kind == "bias":
        params["logit_bias"] = dict.fromkeys(likeliest[:50], -5.0) | {likeliest[-1]: 3.0}
    elif kind == "penalties":
        params |= {"repetition_penalty": 3.0, "frequency_penalty": 1.5}
    elif kind in ("mask", "few", "all"):
        bits = generator.random(vocab_size) < {"mask": 0.5, "few": 0.03, "all": 2.0}[kind]
        bits[likeliest[:20]] = kind == "all"
        bits[likeliest[-1]] = True
        allowed = mask_of(bits.tolist())
    sampling = SamplingParams(**params)
    seen = likeliest[:64] if kind == "penalties" else []
    edits = LogitChanges(sampling, seen, seen[:10]).edits
    return SamplingRow(params=sampling, edits=edits, allowed=allowed, num_logprobs=3)


@pytest.mark.parametrize("shape", [PLAIN, CAPPED])
def test_targets_rows_that_are_wanted_whole_and_sampled_tokens_are_exact(shape: architecture.Head) -> None:
    head, hidden = make_head(800, 3, shape), random(12, SIZE, seed=4)
    true = exact(head, hidden)
    unlikely = true.argsort(dim=1)[:, :5]
    targets = Targets(
        np.repeat(np.arange(12), 5), unlikely.flatten().numpy(), np.tile(np.arange(5, dtype=np.int64), 12)
    )
    rows = [
        SamplingRow(params=SamplingParams(temperature=1.0), seed=seed, num_logprobs=0) for seed in range(12)
    ]
    whole = np.array([7, 2], dtype=np.int32)
    fast, _ = finish_both(head, hidden, wants_of(rows, 800, targets=targets, whole=whole))
    assert torch.equal(torch.from_numpy(fast.whole), true[[7, 2]])
    logprobs = true.double().log_softmax(dim=1)
    for place, found in enumerate(fast.targets):
        row, token = int(targets.rows[place]), int(targets.ids[place])
        assert found.logprob == pytest.approx(float(logprobs[row, token]), abs=0.005)
        assert len(found.top_ids) == targets.num_top[place]
        assert list(found.top_ids) == true[row].argsort(descending=True)[: len(found.top_ids)].tolist()
    for row, token in enumerate(fast.tokens):
        assert token.logprob is not None
        assert token.logprob.logprob == pytest.approx(float(logprobs[row, token.id]), abs=0.005)


@settings(max_examples=25, deadline=None)
@given(
    num_allowed=st.lists(st.sampled_from([0, 1, 63, 64, 65, 400, 720]), min_size=1, max_size=5),
    num_edits=st.integers(0, 70),
    seed=st.integers(0, 2**16),
)
def test_edited_tokens_and_the_likeliest_that_a_mask_allows_become_exact(
    num_allowed: list[int], num_edits: int, seed: int
) -> None:
    """In a vocabulary that ends in the middle of a mask's word, whose other bits may be anything."""
    vocab_size = 720
    head, hidden = make_head(vocab_size, seed), random(len(num_allowed), SIZE, seed=seed + 1)
    generator = np.random.default_rng(seed)
    rows, edited, allowed = [], [], []
    for count in num_allowed:
        bits = np.zeros(vocab_size, dtype=np.bool_)
        bits[generator.choice(vocab_size, count, replace=False)] = True
        mask = mask_of(bits.tolist())
        mask.view(np.uint16)[-1] = generator.integers(2**16)
        edited.append(generator.choice(vocab_size, num_edits, replace=False))
        params = SamplingParams(logit_bias=dict.fromkeys(edited[-1].tolist(), 1.0))
        rows.append(SamplingRow(params=params, edits=LogitChanges(params).edits, allowed=mask))
        bits[edited[-1]] = False
        allowed.append(torch.from_numpy(np.flatnonzero(bits)))
    logits = CpuLogits(head, hidden, refined(head, hidden), KERNELS)
    logits.finish(wants_of(rows, vocab_size))
    true = exact(head, hidden)
    for row, (own, others) in enumerate(zip(edited, allowed, strict=True)):
        likeliest = others[true[row, others].argsort(descending=True)[:20]]
        for ids in (torch.from_numpy(own), likeliest):
            assert torch.equal(logits.values[row, ids], true[row, ids])


@pytest.mark.parametrize("shape", [PLAIN, CAPPED])
def test_a_token_s_logprob_does_not_depend_on_the_others_that_are_asked_for(shape: architecture.Head) -> None:
    head, hidden = make_head(800, 3, shape), random(1, SIZE, seed=4)
    ids = exact(head, hidden)[0].argsort()[:400].numpy()
    together = targets_of_one_row(head, hidden, ids)
    for place in (0, 100, 399):
        assert targets_of_one_row(head, hidden, ids[place : place + 1]) == together[place : place + 1]


def targets_of_one_row(head: PackedHead, hidden: Tensor, ids: Array) -> list[TokenLogprob]:
    zeros = np.zeros(len(ids), np.int64)
    wants = wants_of([], head.own.out_features, targets=Targets(zeros, ids, zeros))
    fast, _ = finish_both(head, hidden, wants)
    return list(fast.targets)


@pytest.mark.parametrize("num_top", [20, 64, 100])
def test_as_many_of_the_likeliest_tokens_as_may_be_wanted_are_exact(num_top: int) -> None:
    head, hidden = make_head(1600, 3), random(12, SIZE, seed=4)
    rows = [SamplingRow(params=SamplingParams(), num_logprobs=num_top) for _ in range(12)]
    targets = Targets(np.arange(12), np.arange(12), np.full(12, num_top))
    for wants in (wants_of(rows, 1600), wants_of([], 1600, targets=targets)):
        fast, true = finish_both(head, hidden, wants)
        found = [token.logprob for token in fast.tokens if token.logprob] or fast.targets
        expected = [token.logprob for token in true.tokens if token.logprob] or true.targets
        assert [each.top_ids for each in found] == [each.top_ids for each in expected]


def test_a_row_that_is_not_finite_is_told_if_its_every_token_is_edited() -> None:
    head, hidden = make_head(64, 3), random(3, SIZE, seed=4)
    hidden[1, 7] = torch.nan
    bias = SamplingParams(temperature=0.0, logit_bias=dict.fromkeys(range(64), 1.0))
    rows = [SamplingRow(params=bias, edits=LogitChanges(bias).edits) for _ in range(3)]
    fast, true = finish_both(head, hidden, wants_of(rows, 64))
    assert fast.bad_rows == true.bad_rows == {1}


def test_rows_that_are_not_finite_are_told_and_touch_no_other() -> None:
    head, hidden = make_head(320, 3), random(5, SIZE, seed=4)
    bias = SamplingParams(temperature=0.0, logit_bias={5: 1.0})
    rows = [SamplingRow(params=bias, edits=LogitChanges(bias).edits, num_logprobs=2) for _ in range(5)]
    targets = Targets(np.arange(5), np.arange(5), np.zeros(5, np.int64))
    good, _ = finish_both(head, hidden, wants_of(rows, 320, targets=targets))
    hidden[1, 7], hidden[3, 0] = torch.nan, torch.inf
    fast, _ = finish_both(head, hidden, wants_of(rows, 320, targets=targets))
    assert fast.bad_rows == {1, 3}
    for row in (0, 2, 4):
        assert fast.tokens[row] == good.tokens[row]
        assert fast.targets[row] == good.targets[row]


@pytest.mark.parametrize(
    "part",
    [
        Linear(random(72, SIZE, seed=1), None),
        Linear(random(64, 96, seed=1), None),
    ],
    ids=["outputs", "inputs"],
)
def test_a_head_that_it_cannot_lay_out_is_exact(part: Linear) -> None:
    own, fast = KERNELS.pack_head(part)
    assert fast is None
    assert own.weights is not None
    assert KERNELS.pack_head(Linear(random(64, SIZE, seed=1), None))[1] is not None
    assert CpuKernels(1).pack_head(Linear(random(64, SIZE, seed=1), None))[1] is None


def test_bytes_are_one_for_each_weight_beside_its_own() -> None:
    packed = pack_int8(Linear(random(960, 576, seed=1).bfloat16(), None))
    assert packed.num_bytes <= 1.05 * 960 * 576
    assert pack_linear([Linear(random(960, 576, seed=1).bfloat16(), None)]).num_bytes == 2 * 960 * 576
