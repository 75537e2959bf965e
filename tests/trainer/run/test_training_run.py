from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from manyhats.trainer.data.batch import collate
from manyhats.trainer.errors import DivergedError, SettingError
from manyhats.trainer.report.events import EvaluationReport, Event, RunBegan, RunEnded, StepReport
from manyhats.trainer.run.gradients import accumulate_gradients
from manyhats.trainer.run.optimizer import learning_rate_factor
from manyhats.trainer.run.training_run import TrainingRun
from support.fakes.training import (
    FakeAdapter,
    FakeDecoder,
    PoisonedDecoder,
    ScriptedDecoder,
    make_dataset,
    make_run,
    make_train_settings,
    run_to_end,
    with_data,
)


def grads_of(adapter: FakeAdapter) -> dict[str, Tensor]:
    grads = {name: parameter.grad for name, parameter in adapter.parameters.items()}
    assert all(grad is not None for grad in grads.values())
    return {name: grad for name, grad in grads.items() if grad is not None}


# Gradients


def test_accumulated_gradients_are_those_of_one_big_batch() -> None:
    rows = make_dataset(7).rows[:]
    parts, whole = FakeAdapter(), FakeAdapter()
    # Micro-batches of unlike sizes: a mean of their means would be another number.
    loss = accumulate_gradients(FakeDecoder(), parts, [rows[:1], rows[1:3], rows[3:]])
    big = accumulate_gradients(FakeDecoder(), whole, [rows])
    assert loss.loss == pytest.approx(big.loss, rel=1e-6)
    assert (loss.num_tokens, loss.num_targets) == (big.num_tokens, big.num_targets)
    assert loss.num_tokens == sum(len(row.token_ids) for row in rows)
    assert loss.num_targets == sum(row.num_targets for row in rows)
    for name, grad in grads_of(parts).items():
        torch.testing.assert_close(grad, grads_of(whole)[name], rtol=1e-5, atol=1e-7)


def test_gradients_are_those_of_the_mean_loss_by_autograd() -> None:
    rows = make_dataset(5).rows[:]
    adapter, direct = FakeAdapter(seed=3), FakeAdapter(seed=3)
    accumulate_gradients(FakeDecoder(), adapter, [rows[:2], rows[2:]])
    batch = collate(rows)
    (FakeDecoder().loss(batch, direct.lowered()) / len(batch.targets)).backward()
    for name, grad in grads_of(adapter).items():
        torch.testing.assert_close(grad, grads_of(direct)[name], rtol=1e-5, atol=1e-7)


def test_a_step_lowers_the_adapter_once() -> None:
    rows = make_dataset(6).rows[:]
    adapter = FakeAdapter()
    accumulate_gradients(FakeDecoder(), adapter, [rows[:2], rows[2:4], rows[4:]])
    assert adapter.num_lowered == 1


# Steps


def test_a_run_takes_all_its_steps_and_learns() -> None:
    run = make_run(make_train_settings(epochs=10))
    losses = run_to_end(run)
    assert len(losses) == run.num_steps == run.num_steps_taken == 60
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


def test_reports_say_what_a_step_was() -> None:
    settings = make_train_settings(learning_rate=0.02, warmup_steps=3, max_grad_norm=0.01)
    run = make_run(settings)
    reports = [run.step() for _ in range(run.num_steps)]
    assert [report.step for report in reports] == list(range(1, 13))
    assert [report.learning_rate for report in reports] == [
        0.02 * learning_rate_factor(settings.optimization, step, 12) for step in range(12)
    ]
    assert [report.epoch for report in reports][::6] == [pytest.approx(1 / 6), pytest.approx(7 / 6)]
    assert sum(report.num_tokens for report in reports[:6]) == make_dataset().rows.num_tokens
    assert sum(report.num_targets for report in reports[:6]) == make_dataset().rows.num_targets
    assert all(report.grad_norm > 0.01 for report in reports), "the norm is that before clipping"
    assert all(report.seconds > 0 for report in reports)


def test_the_method_has_a_learning_rate_of_its_own_where_none_is_named() -> None:
    settings = make_train_settings(learning_rate=None, warmup_steps=0)
    assert make_run(settings).step().learning_rate == 1e-3  # LoRA's


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    def losses(seed: int) -> list[float]:
        return run_to_end(make_run(make_train_settings(seed=seed), adapter=FakeAdapter(dropout=0.3)))

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_dropout_differs_from_step_to_step() -> None:
    settings = with_data(make_train_settings(learning_rate=1e-12, batch_size=24, epochs=4), shuffle=False)
    # Each step is the same whole epoch, and the parameters hardly move.
    adapter = FakeAdapter(dropout=0.5, seed=1)
    adapter.parameters["b"].data.normal_(generator=torch.Generator().manual_seed(0))
    losses = run_to_end(make_run(settings, adapter=adapter))
    assert len(set(losses)) == len(losses)


def test_a_step_leaves_the_global_generator_alone() -> None:
    run = make_run(adapter=FakeAdapter(dropout=0.3))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run.step()
    assert torch.equal(torch.rand(3), expected)


def test_interleaved_runs_are_what_each_is_alone() -> None:
    def runs() -> list[TrainingRun]:
        decoder = FakeDecoder()
        return [
            make_run(
                make_train_settings(task=f"t{seed}", seed=seed, epochs=seed + 1, gradient_accumulation=2),
                decoder=decoder,
                adapter=FakeAdapter(dropout=0.2, seed=seed),
                train=make_dataset(16, seed),
                held_out=make_dataset(5, 10 + seed),
            )
            for seed in range(3)
        ]

    alone = [run_to_end(run) for run in runs()]
    together: list[list[float]] = [[], [], []]
    waiting = runs()
    while any(not run.is_done for run in waiting):
        for losses, run in zip(together, waiting, strict=True):
            if not run.is_done:
                losses.append(run.step().loss)
    assert together == alone


# A loss that is not finite


@pytest.mark.parametrize(
    "poison",
    [lambda loss: loss * math.nan, lambda loss: loss * math.inf, lambda loss: loss + (loss * 0).sqrt()],
    ids=["nan", "inf", "nan gradient of a finite loss"],
)
def test_a_run_that_diverges_stops_before_its_parameters_move(
    poison: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    adapter = FakeAdapter()
    settings = make_train_settings(tmp_path, gradient_accumulation=2, checkpoint_steps=2, epochs=4)
    run = make_run(settings, decoder=PoisonedDecoder(8, poison), adapter=adapter)
    for _ in range(3):
        run.step()
    before = {name: parameter.detach().clone() for name, parameter in adapter.parameters.items()}
    with pytest.raises(DivergedError, match="loss of step 4 is not finite") as raised:
        run.step()
    assert raised.value.step == 4
    assert raised.value.checkpoint == tmp_path / "training/checkpoints/step-000002"
    assert raised.value.checkpoint.is_dir()
    assert all(torch.equal(adapter.parameters[name], value) for name, value in before.items())
    assert run.num_steps_taken == 3


def test_a_run_that_diverges_before_its_first_checkpoint_says_so() -> None:
    run = make_run(decoder=PoisonedDecoder(1, lambda loss: loss * math.nan))
    with pytest.raises(DivergedError, match="no checkpoint had been written") as raised:
        run.step()
    assert raised.value.checkpoint is None


def test_a_held_out_loss_that_is_not_finite_is_divergence() -> None:
    run = make_run(decoder=ScriptedDecoder([1.0, math.nan]), held_out=make_dataset(4, 1))
    with pytest.raises(DivergedError, match="step 12"):
        run_to_end(run)


# Evaluation


def evaluated_steps(events: list[Event]) -> list[int]:
    return [event.step for event in events if isinstance(event, EvaluationReport)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [6, 12]),
        ({"eval_steps": 5}, [5, 10, 12]),
        ({"eval_steps": 4}, [4, 8, 12]),
        ({"epochs": 1.5}, [6, 9]),
        ({"max_steps": 8}, [6, 8]),
    ],
)
def test_held_out_loss_is_evaluated_when_it_is_due_and_at_the_end(
    options: dict[str, float], expected: list[int]
) -> None:
    events: list[Event] = []
    run_to_end(make_run(make_train_settings(**options), held_out=make_dataset(4, 1), listener=events.append))
    assert evaluated_steps(events) == expected


def test_held_out_loss_is_the_mean_over_all_its_targets_without_dropout() -> None:
    held_out = make_dataset(9, 5)
    adapter = FakeAdapter(dropout=0.5)
    adapter.parameters["b"].data.normal_(generator=torch.Generator().manual_seed(0))
    run = make_run(adapter=adapter, held_out=held_out)
    batch = collate(held_out.rows[:])
    with torch.no_grad():
        expected = float(FakeDecoder().loss(batch, adapter.lowered())) / len(batch.targets)
    assert run.evaluate() == pytest.approx(expected, rel=1e-6)


def test_a_run_without_evaluation_data_cannot_be_evaluated() -> None:
    with pytest.raises(SettingError, match="eval: there is no evaluation data"):
        make_run().evaluate()


# Early stopping


def test_a_run_stops_once_the_held_out_loss_no_longer_falls_and_goes_back_to_its_best() -> None:
    values: dict[int, Tensor] = {}
    adapter = FakeAdapter()

    def keep(event: Event) -> None:
        if isinstance(event, EvaluationReport):
            values[event.step] = adapter.parameters["a"].detach().clone()

    run = make_run(
        make_train_settings(eval_steps=1, patience=2, epochs=9),
        decoder=ScriptedDecoder([3.0, 2.0, 2.5, 1.5, 1.5, 1.6]),
        adapter=adapter,
        held_out=make_dataset(4, 1),
        listener=keep,
    )
    losses = run_to_end(run)
    assert len(losses) == 6, "an equal loss is no better, and one that is worse counts the second time only"
    result = run.finish()
    assert result.stopped_early
    assert result.artifact_step == 4
    assert torch.equal(adapter.parameters["a"], values[4])
    assert not torch.equal(values[4], values[6])


def test_without_patience_the_last_parameters_stay() -> None:
    adapter = FakeAdapter()
    run = make_run(
        make_train_settings(eval_steps=4),
        decoder=ScriptedDecoder([1.0, 2.0, 3.0]),
        adapter=adapter,
        held_out=make_dataset(4, 1),
    )
    run_to_end(run)
    last = adapter.parameters["a"].detach().clone()
    result = run.finish()
    assert (result.artifact_step, result.stopped_early) == (12, False)
    assert torch.equal(adapter.parameters["a"], last)


def test_a_run_that_is_no_better_at_its_very_end_has_not_stopped_early() -> None:
    run = make_run(
        make_train_settings(patience=1), decoder=ScriptedDecoder([1.0, 2.0]), held_out=make_dataset(4, 1)
    )
    assert len(run_to_end(run)) == 12
    result = run.finish()
    assert (result.artifact_step, result.stopped_early) == (6, False)


def test_patience_needs_evaluation_data() -> None:
    with pytest.raises(SettingError, match="patience: early stopping needs evaluation data"):
        make_run(make_train_settings(patience=1))


# What it tells


def test_events_come_in_the_order_of_what_happens(tmp_path: Path) -> None:
    events: list[Event] = []
    settings = make_train_settings(tmp_path, epochs=0.5, eval_steps=2, checkpoint_steps=3)
    run_to_end(make_run(settings, held_out=make_dataset(4, 1), listener=events.append))
    assert [type(event).__name__ for event in events] == [
        "RunBegan",
        "StepReport",
        "StepReport",
        "EvaluationProgress",
        "EvaluationReport",
        "CheckpointReport",  # the best so far
        "StepReport",
        "EvaluationProgress",
        "EvaluationReport",
        "CheckpointReport",
        "RunEnded",
    ]
    assert events[0] == RunBegan(task="fake", step=0, num_steps=3, num_trainable=36)
    assert events[-1] == RunEnded(task="fake", step=3, stopped_early=False)
    steps = [event for event in events if isinstance(event, StepReport)]
    assert all(a.step + 1 == b.step for a, b in pairwise(steps))
