from __future__ import annotations

import pytest
import torch

from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint
from support.harnesses.engine import Prompt, Runner, load_tiny, random_ids, random_lora


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    model = load_tiny(make_checkpoint(tmp_path_factory.mktemp("preemption") / "model", seed=9), "nf4")
    adapters = {slot: random_lora(model.description, slot) for slot in (1, 2, 3)}
    return Runner(model, adapters=adapters)


PROMPTS = [
    Prompt(random_ids(seed, 5 + 7 * seed, TINY_VOCAB_SIZE), slot=seed % 4, new_tokens=30, joins=2 * seed)
    for seed in range(6)
]


@pytest.mark.bits
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("num_blocks", [5, 8])
def test_a_pool_too_small_for_all_gives_the_same_bits_as_a_large_one(
    runner: Runner, num_blocks: int, prefix_cache: bool
) -> None:
    expected = runner.run(PROMPTS, prefix_cache=prefix_cache)
    assert all(ran.num_preemptions == 0 for ran in expected)
    crowded = runner.run(PROMPTS, num_blocks=num_blocks, max_tokens=32, prefix_cache=prefix_cache)
    assert sum(ran.num_preemptions for ran in crowded) > 0
    for ran, other in zip(crowded, expected, strict=True):
        assert ran.token_ids == other.token_ids
        assert torch.equal(ran.stacked, other.stacked)


@pytest.mark.bits
def test_all_positions_logits_come_once_however_often_a_sequence_is_preempted(runner: Runner) -> None:
    expected = runner.run(PROMPTS, all_logits=True)
    crowded = runner.run(PROMPTS, num_blocks=6, max_tokens=16, all_logits=True)
    assert sum(ran.num_preemptions for ran in crowded) > 0
    for ran, other in zip(crowded, expected, strict=True):
        assert torch.equal(ran.stacked, other.stacked)
