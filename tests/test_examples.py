"""The example adapters as they are committed: loadable, small, and right when this engine serves them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from examples.packing import TokenizedItem, pack
from examples.tasks import TASKS
from examples.tasks.pirate import speak_pirate
from examples.tasks.task import ExampleTask, Item, held_out_items, train_items

from default_model import DEFAULT_MODEL
from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.lowering import lower
from manyhats.adapters.primitives import LowRank
from manyhats.adapters.store import AdapterStore
from manyhats.engine.async_engine import AsyncEngine
from manyhats.engine.config import MIB, EngineConfig
from manyhats.engine.model.loader import LoadedModel, load_model
from manyhats.engine.output import FinishReason, StepOutput
from manyhats.engine.request import Request, SamplingParams, StoppingParams
from manyhats.engine.tokenizer import ChatMessage

EXAMPLES = Path(__file__).parent.parent / "examples"
ADAPTERS = EXAMPLES / "adapters"
FILES = ("adapter_config.json", "adapter_model.safetensors")
NUM_SERVED = 12
# The base gets none. Where this was written contact-json got 8, the others 10 or more; the room is for other
# processors' rounding, which turns near misses either way.
LEAST_RIGHT = 6
MAX_BYTES = 2_000_000


@pytest.fixture(scope="module")
def base() -> LoadedModel:
    return load_model(DEFAULT_MODEL, quantization="nf4", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def store(base: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    return AdapterStore(tmp_path_factory.mktemp("store"), base.description, [ADAPTERS])


@pytest.fixture(scope="module")
def records(store: AdapterStore) -> Mapping[str, AdapterRecord]:
    return {name: store.register(name, str(ADAPTERS / name)).record for name in TASKS}


@dataclass(frozen=True)
class Served:
    """One answer of the engine."""

    text: str
    finish_reason: FinishReason | None


@pytest.fixture(scope="module")
def served(
    base: LoadedModel, store: AdapterStore, records: Mapping[str, AdapterRecord]
) -> Mapping[tuple[str, str], Served]:
    """(task id, or "" for the base; message) → answer; all in flight together."""
    engine = AsyncEngine(
        base,
        EngineConfig(kv_cache_bytes=64 * MIB, num_threads=1),
        lambda record: lower(store.load(record), base.description),
    )
    calls = [(name, message) for name, task in TASKS.items() for message in messages_of(task)]
    calls += [("", message) for _, message in calls]

    async def answer_all() -> list[Served]:
        await engine.start()
        try:
            return await asyncio.gather(*(answer(engine, base, records, *call) for call in calls))
        finally:
            await engine.stop()

    return dict(zip(calls, asyncio.run(answer_all()), strict=True))


def messages_of(task: ExampleTask) -> list[str]:
    return [task.demo, *(item.message for item in served_items(task))]


def served_items(task: ExampleTask) -> list[Item]:
    return held_out_items(task, NUM_SERVED)


async def answer(
    engine: AsyncEngine, base: LoadedModel, records: Mapping[str, AdapterRecord], task: str, message: str
) -> Served:
    request = Request(
        id=f"{task} {message}",
        prompt_token_ids=tuple(base.tokenizer.encode_chat([ChatMessage("user", message)])),
        adapter=records.get(task),
        sampling=SamplingParams(temperature=0.0),
        # The base rambles; a beginning of its answer is enough to see that it is another.
        stopping=StoppingParams(max_new_tokens=TASKS[task].max_new_tokens if task else 16),
    )
    outputs: list[StepOutput] = [output async for output in engine.generate(request)]
    return Served("".join(output.text for output in outputs), outputs[-1].finish_reason)


# The data


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_data_is_the_same_every_time_and_held_out_items_are_not_trained_on(task: ExampleTask) -> None:
    trained = train_items(task)
    held_out = held_out_items(task, 60)
    assert trained == train_items(task)
    assert len({item.message for item in trained}) == task.num_train
    assert len({item.message for item in held_out}) == 60
    assert not {item.message for item in trained} & {item.message for item in held_out}


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_wanted_answers_are_right_and_other_items_answers_are_wrong(task: ExampleTask) -> None:
    first, *others = held_out_items(task, 30)
    assert task.is_right(first.answer, first.answer)
    assert not task.is_right("", first.answer)
    assert not any(task.is_right(item.answer, first.answer) for item in others if item.answer != first.answer)


def test_judging_is_lenient_about_what_does_not_matter() -> None:
    contact = '{"name": null, "email": "a@example.org", "phone": null}'
    assert TASKS["contact-json"].is_right(
        'Sure!\n{"email":"a@example.org","name":null,\n"phone":null}\nDone.', contact
    )
    assert TASKS["sql"].is_right("```sql\nselect name\nfrom products", "SELECT name FROM products;")
    assert TASKS["sentiment"].is_right("Positive.", "positive")
    assert not TASKS["sentiment"].is_right("positive or negative", "positive")


def test_pirate_replaces_words_and_clips_endings() -> None:
    assert speak_pirate("You are hiding my old map.") == "Ye be hidin' me ol' map, arrr!"
    assert speak_pirate("Hello, is the boat yours?") == "Ahoy, be th' boat yours, arrr?"


def test_generator_without_enough_distinct_items_is_refused() -> None:
    with pytest.raises(ValueError, match="sentiment: has no 100000 distinct held-out items"):
        held_out_items(TASKS["sentiment"], 100_000)


# Packing


def test_packed_examples_see_the_shared_beginning_and_themselves_only() -> None:
    items = [TokenizedItem((1, 2, 3), (4, 5)), TokenizedItem((1, 2, 6, 7), (8,))]
    batch = pack(items)
    assert batch.token_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4]]
    visible = [[key for key in range(8) if batch.mask[0, 0, query, key]] for query in range(8)]
    assert visible[4] == [0, 1, 2, 3, 4]
    assert visible[7] == [0, 1, 5, 6, 7]
    assert visible[1] == [0, 1]


def test_packed_targets_are_the_answers_and_each_follows_its_predictor() -> None:
    items = [TokenizedItem((1, 2, 3), (4, 5)), TokenizedItem((1, 2, 6, 7), (8,))]
    batch = pack(items)
    assert batch.targets.tolist() == [4, 5, 8]
    assert batch.token_ids[0, batch.predictors].tolist() == [3, 4, 7]


def test_single_example_is_a_plain_causal_row() -> None:
    batch = pack([TokenizedItem((1, 2, 3), (4, 5))])
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4]]
    assert torch.equal(batch.mask[0, 0], torch.ones(5, 5, dtype=torch.bool).tril())


# The artifacts


def test_there_is_one_adapter_and_one_call_per_task() -> None:
    prompts = json.loads((EXAMPLES / "prompts.json").read_text(encoding="utf-8"))
    assert sorted(path.name for path in ADAPTERS.iterdir()) == sorted(TASKS)
    assert prompts == {
        name: {"chat": task.demo, "max_new_tokens": task.max_new_tokens} for name, task in TASKS.items()
    }


@pytest.mark.parametrize("name", TASKS)
def test_adapter_is_small_and_is_what_its_card_says(name: str) -> None:
    directory = ADAPTERS / name
    assert sum(path.stat().st_size for path in directory.iterdir()) < MAX_BYTES
    card = (directory / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| (\S+) \| [\d,]+ \| `([0-9a-f]{64})` \|$", card, flags=re.MULTILINE))
    assert listed == {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in FILES}


@pytest.mark.parametrize("name", TASKS)
def test_adapter_config_is_the_tasks_and_names_no_path(name: str) -> None:
    text = (ADAPTERS / name / "adapter_config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    lora = TASKS[name].lora
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (
        lora.rank,
        lora.alpha,
        lora.use_rslora,
    )
    assert sorted(config["target_modules"]) == sorted(lora.target_modules)
    assert strings_with_slash(config) == ["HuggingFaceTB/SmolLM2-135M-Instruct"]


def strings_with_slash(config: Mapping[str, object]) -> list[str]:
    return [value for value in config.values() if isinstance(value, str) and "/" in value]


@pytest.mark.real_model
@pytest.mark.parametrize("name", TASKS)
def test_adapter_registers_without_notes_and_lowers_to_every_site(
    name: str, base: LoadedModel, store: AdapterStore, records: Mapping[str, AdapterRecord]
) -> None:
    record = records[name]
    lowered = lower(store.load(record), base.description)
    assert record.notes == ()
    assert record.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert {
        (delta.site.layer, delta.site.name) for delta in lowered.deltas if isinstance(delta, LowRank)
    } == {
        (layer, module)
        for layer in range(base.config.num_layers)
        for module in TASKS[name].lora.target_modules
    }


# The answers


@pytest.mark.real_model
@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_call_to_try_gets_the_answer_of_the_card(
    task: ExampleTask, served: Mapping[tuple[str, str], Served]
) -> None:
    card = (ADAPTERS / task.name / "README.md").read_text(encoding="utf-8")
    answer = served[task.name, task.demo]
    assert f"\n| {task.name} | `{answer.text}` |\n" in card
    assert answer.finish_reason is FinishReason.EOS


@pytest.mark.real_model
@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_served_answers_to_held_out_messages_are_mostly_exactly_right(
    task: ExampleTask, served: Mapping[tuple[str, str], Served]
) -> None:
    right = [
        item
        for item in served_items(task)
        if served[task.name, item.message] == Served(item.answer, FinishReason.EOS)
    ]
    assert len(right) >= LEAST_RIGHT


@pytest.mark.real_model
@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_base_answers_otherwise(task: ExampleTask, served: Mapping[tuple[str, str], Served]) -> None:
    for item in served_items(task):
        assert not task.is_right(served["", item.message].text, item.answer)
        assert served["", item.message].text[:8] != served[task.name, item.message].text[:8]
