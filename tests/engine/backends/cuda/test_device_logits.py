"""What is finished on the device is what is finished on the host, and nothing waits for it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from support.gpu.interpreter import DEVICE  # isort: skip  kernels are imported after it
from manyhats.engine.backends.cuda.choosing import choose as launching
from manyhats.engine.backends.cuda.choosing.choose import AtMost, Tiles
from manyhats.engine.backends.cuda.choosing.logits import DeviceLogits
from manyhats.engine.backends.cuda.choosing.wanted import Found, Pairs, Upload
from manyhats.engine.backends.logits import HostLogits
from manyhats.engine.backends.torch.choosing import TorchChooser
from manyhats.engine.backends.wants import NO_WANTS, Outcome, Targets, TokenLogprob, Wants
from manyhats.engine.request import SamplingParams
from manyhats.engine.sampling.sampler import SamplingRow
from support.gpu.choosing import finish, finisher, wants_of
from support.gpu.no_sync import WaitsForTheDeviceError, may_sync, no_sync

SMALL = Tiles(part=64, edits=4, tile=64, listed=64, num_warps=1)
V = 150
DRAWN = SamplingParams(temperature=1.0, top_p=0.9)
ROWS = [
    SamplingRow(params=DRAWN, seed=3, num_logprobs=3),
    SamplingRow(params=SamplingParams(), num_logprobs=0),
    SamplingRow(params=DRAWN, seed=1),
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written to holds NaN, and the largest integers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_logits(seed: int, rows: int, vocab_size: int = V) -> Tensor:
    return 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def targets(*given: tuple[int, int, int]) -> Targets:
    """Of (row, id, num_top)."""
    return Targets(*np.array(given, np.int64).reshape(-1, 3).T)


def on_host(logits: Tensor, wants: Wants, hidden: Tensor | None = None) -> Outcome:
    return HostLogits(logits.clone(), TorchChooser(), hidden).finish(wants).result()


def check_alike(found: Outcome, expected: Outcome) -> None:
    assert [token.id for token in found.tokens] == [token.id for token in expected.tokens]
    for token, other in zip(found.tokens, expected.tokens, strict=True):
        assert (token.logprob is None) == (other.logprob is None)
        if token.logprob is not None and other.logprob is not None:
            check_logprob(token.logprob, other.logprob)
    for target, other_target in zip(found.targets, expected.targets, strict=True):
        check_logprob(target, other_target)
    np.testing.assert_array_equal(found.whole, expected.whole)
    np.testing.assert_array_equal(found.hidden, expected.hidden)
    assert found.bad_rows == expected.bad_rows


def check_logprob(found: TokenLogprob, expected: TokenLogprob) -> None:
    assert (found.rank, found.top_ids) == (expected.rank, expected.top_ids)
    assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert list(found.top_logprobs) == pytest.approx(list(expected.top_logprobs), abs=1e-5)


def test_an_outcome_is_that_of_the_host() -> None:
    logits, hidden = random_logits(0, 4), torch.randn(3, 7)
    given = targets((3, 0, 0), (0, 149, 5), (3, 64, 2), (3, 0, 1))
    wants = wants_of(ROWS, V, given, whole=(3, 1))
    found = DeviceLogits(logits.to(DEVICE), finisher(V, SMALL), hidden.to(DEVICE)).finish(wants).result()
    check_alike(found, on_host(logits, wants, hidden))


def test_the_most_likely_of_equals_go_by_id_and_share_a_rank() -> None:
    logits = torch.zeros(2, V)
    logits[0, [3, 70, 71]] = 2.0
    logits[1] = -1.0
    wants = wants_of([], V, targets((0, 71, 5), (1, 149, 70), (0, 5, 0)))
    found = finish(logits, wants, SMALL)
    check_alike(found, on_host(logits, wants))
    assert list(found.targets[0].top_ids) == [3, 70, 71, 0, 1]
    assert [each.rank for each in found.targets] == [1, 1, 4]


def test_more_of_the_most_likely_than_there_are_tokens_gives_all() -> None:
    wants = wants_of([], 5, targets((0, 2, 9)))
    logits = random_logits(1, 1, 5)
    check_alike(finish(logits, wants, SMALL), on_host(logits, wants))


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, -1e4, 1e4], [1e30, -1e30, 0.0]])
    rows = [SamplingRow(params=SamplingParams(temperature=1.0, top_p=0.4), seed=1, num_logprobs=3)] * 2
    check_alike(finish(logits, wants_of(rows, 3), SMALL), on_host(logits, wants_of(rows, 3)))


def test_a_row_that_may_have_no_token_has_no_logprob() -> None:
    rows = [SamplingRow(params=SamplingParams(), forbid=tuple(range(5)), num_logprobs=2), ROWS[1]]
    logits = random_logits(2, 2, 5)
    found = finish(logits, wants_of(rows, 5), SMALL)
    assert (found.tokens[0].id, found.tokens[0].logprob) == (-1, None)
    check_alike(found, on_host(logits, wants_of(rows, 5)))


def test_rows_that_are_not_finite_are_named_and_touch_no_other() -> None:
    logits = random_logits(0, 5)
    wants = wants_of([*ROWS, ROWS[0], ROWS[0]], V, targets((1, 2, 3), (2, 100, 1)), whole=(1,))
    expected = finish(logits, wants, SMALL)
    logits[1, 70] = torch.nan
    logits[3, 149] = -torch.inf
    logits[4] = torch.inf
    found = finish(logits, wants, SMALL)
    assert (expected.bad_rows, found.bad_rows) == (frozenset(), frozenset((1, 3, 4)))
    assert (found.tokens[0], found.tokens[2]) == (expected.tokens[0], expected.tokens[2])
    assert found.targets[1] == expected.targets[1]
    assert all(-1 <= token.id < V for token in found.tokens)


def test_a_logprob_is_the_same_in_bits_alone_and_in_any_batch() -> None:
    logits = random_logits(4, 3)
    together = finish(logits, wants_of([], V, targets((0, 1, 3), (1, 1, 0), (2, 149, 4))), SMALL).targets
    alone = finish(logits[2:], wants_of([], V, targets((0, 149, 4))), SMALL).targets
    assert alone[0] == together[2]


def test_a_target_outside_the_vocabulary_is_an_error() -> None:
    with pytest.raises(IndexError, match="vocabulary of 150"):
        finish(random_logits(0, 1), wants_of([], V, targets((0, 150, 0))), SMALL)


def test_nothing_is_found_where_nothing_is_wanted() -> None:
    check_alike(finish(random_logits(0, 1), NO_WANTS, SMALL), on_host(random_logits(0, 1), NO_WANTS))


def test_a_model_without_a_head_returns_its_hidden_values() -> None:
    hidden = torch.randn(2, 3)
    empty = torch.empty(0, 0, device=DEVICE)
    found = DeviceLogits(empty, finisher(0), hidden.to(DEVICE)).finish(NO_WANTS).result()
    check_alike(found, on_host(torch.empty(0, 0), NO_WANTS, hidden))


def test_steps_may_be_in_flight_together_and_an_outcome_stays() -> None:
    of_model = finisher(V, SMALL)
    first, second = random_logits(0, 3), random_logits(1, 3)
    wants, later = wants_of(ROWS, V, whole=(2,)), wants_of(ROWS[:2], V, targets((1, 1, 100)), whole=(0, 1))
    pending = DeviceLogits(first.to(DEVICE), of_model).finish(wants)
    after = DeviceLogits(second.to(DEVICE), of_model).finish(later)
    outcome = pending.result()
    check_alike(outcome, on_host(first, wants))
    check_alike(after.result(), on_host(second, later))
    DeviceLogits(second.to(DEVICE), of_model).finish(wants).result()
    check_alike(outcome, on_host(first, wants))
    assert pending.result() is outcome


def test_kernels_launched_for_more_than_is_wanted_find_the_same() -> None:
    """As a graph launches them: rows, choices and log-probabilities that are not there touch nothing."""
    logits = torch.full((6, V), torch.nan)
    logits[:3] = random_logits(0, 3)
    wants = wants_of(ROWS, V, targets((2, 4, 3)))
    pairs = Pairs.of(wants, V)
    of_model = finisher(V, SMALL)
    num_parts = of_model.choosing.num_parts(V)
    found = Found.of(wants, pairs, (3, num_parts), V, (0, 0))
    of_model.upload(Upload.of(wants, pairs, found, 3, V))
    buffers = []
    for rows, at_most in ((3, AtMost(3, True, pairs.num)), (6, AtMost(7, True, pairs.num + 4))):
        buffer = torch.full((found.num_bytes + 512,), 77, dtype=torch.uint8, device=DEVICE)
        of_model.choosing.launch(logits[:rows].to(DEVICE), of_model.wants, buffer, at_most)
        buffers.append(buffer.cpu())
    assert torch.equal(*buffers)
    assert (buffers[0][found.num_bytes :] == 77).all()


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter, which copies what a kernel is given to the host, may; what launches it may not."""
    if DEVICE != "cpu":
        return
    for name in ("survey", "weigh", "gather", "choose", "logprobs"):
        monkeypatch.setattr(launching, name, _Interpreted(getattr(launching, name)))


class _Interpreted:
    def __init__(self, kernel: object) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        def launch(*args: object, **kwargs: object) -> None:
            with may_sync():
                self._kernel[grid](*args, **kwargs)  # type: ignore[index]

        return launch


@pytest.mark.usefixtures("interpreted")
def test_nothing_waits_before_the_result() -> None:
    logits, hidden = random_logits(0, 3), torch.randn(2, 5)
    wants = wants_of(ROWS, V, targets((2, 4, 3)), whole=(0,))
    device_logits = DeviceLogits(logits.to(DEVICE), finisher(V, SMALL), hidden.to(DEVICE))
    with no_sync():
        pending = device_logits.finish(wants)
        with pytest.raises(WaitsForTheDeviceError):
            device_logits.values.cpu()
        with may_sync():
            found = pending.result()
    check_alike(found, on_host(logits, wants, hidden))
