"""The example adapters as they are committed: loadable, small, and right when this engine serves them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import torch
from examples.catalogue import artifact_directory, base_task, parts_of
from examples.data import NUM_HELD_OUT, write_data
from examples.mixed_call import ask_all
from examples.mixed_call import table as answers_table
from examples.peft_adapters import behind_virtual_tokens, visible_tokens
from examples.results import read_results, table
from examples.settings import describe
from examples.tasks import TASKS
from examples.tasks.pirate import speak_pirate
from examples.tasks.task import ExampleTask, Item, held_out_items, train_items

from manyhats.adapters.artifact import AdapterMethod, AdapterRecord
from manyhats.adapters.primitives import LowRank
from manyhats.adapters.registration import Part, Parts, Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from manyhats.engine.checkpoints.loader import LoadedModel, load_model
from manyhats.engine.config import MIB, EngineConfig
from manyhats.engine.engine import Engine
from manyhats.engine.opening import open_engine
from manyhats.engine.output import FinishReason, StepOutput
from manyhats.engine.request import Request, SamplingParams, StoppingParams
from manyhats.engine.text.tokenizer import ChatMessage
from manyhats.trainer.data.batch import TokenizedRow, collate
from manyhats.trainer.data.reading import read_rows
from manyhats.trainer.settings.methods import LoraSettings
from manyhats.v1.generation_pb2 import GenerateRequest
from support.factories.default_model import DEFAULT_MODEL
from support.fakes.client import TEXT, make_status, running_server

EXAMPLES = Path(__file__).parent.parent / "examples"
NUM_SERVED = 6
# Where this was written each got 4 or more; the room is for other processors' rounding, which turns near misses
# either way.
LEAST_RIGHT = 3
MAX_BYTES = 2_000_000


@pytest.fixture(scope="module")
def base() -> LoadedModel:
    return load_model(DEFAULT_MODEL, quantization="nf4", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def store(base: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterStore]:
    store = open_store(tmp_path_factory.mktemp("store"), base.description, [EXAMPLES])
    yield store
    store.close()


@pytest.fixture(scope="module")
def records(store: AdapterStore) -> Mapping[str, AdapterRecord]:
    """Each task registered as ``make run`` does."""
    found = {}
    for name, task in TASKS.items():
        parts = [Part(str(path), weight) for path, weight in parts_of(task, EXAMPLES)]
        is_plain = len(parts) == 1
        registration = (
            store.register(Registration(name, Uri(parts[0].uri)))
            if is_plain
            else store.register(Registration(name, Parts(parts)))
        )
        found[name] = registration.record
    return found


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
    engine = open_engine(
        base,
        EngineConfig(kv_cache_bytes=64 * MIB, num_threads=1),
        store.lower,
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
    engine: Engine, base: LoadedModel, records: Mapping[str, AdapterRecord], task: str, message: str
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


def test_written_data_is_what_the_trainer_reads(tmp_path: Path) -> None:
    train, held_out = write_data(TASKS["language"], tmp_path / "data")
    wanted = {
        train: train_items(TASKS["language"]),
        held_out: held_out_items(TASKS["language"], NUM_HELD_OUT),
    }
    for path, items in wanted.items():
        rows = [row.fields for row in read_rows(str(path))]
        assert rows == [{"prompt": item.message, "completion": item.answer} for item in items]


# Training with PEFT


def test_packed_rows_see_the_shared_beginning_and_themselves_only() -> None:
    rows = [tokenized(prompt=(1, 2, 3), answer=(4, 5)), tokenized(prompt=(1, 2, 6, 7), answer=(8,))]
    batch = collate(rows)
    assert batch.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    seen = [row.nonzero().flatten().tolist() for row in visible_tokens(batch)]
    assert seen == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4],
        [0, 1, 5],
        [0, 1, 5, 6],
        [0, 1, 5, 6, 7],
    ]


def test_single_row_is_causal() -> None:
    batch = collate([tokenized(prompt=(1, 2, 3), answer=(4, 5))])
    assert torch.equal(visible_tokens(batch), torch.ones(5, 5, dtype=torch.bool).tril())


def test_virtual_tokens_are_seen_by_all_and_see_each_other_causally() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    assert behind_virtual_tokens(mask, 2).int().tolist() == expected


def tokenized(prompt: tuple[int, ...], answer: tuple[int, ...]) -> TokenizedRow:
    return TokenizedRow((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer))


# The artifacts


def test_there_is_one_adapter_and_one_call_per_task() -> None:
    prompts = json.loads((EXAMPLES / "prompts.json").read_text(encoding="utf-8"))
    directories = {artifact_directory(task, EXAMPLES) for task in TASKS.values()}
    assert {*(EXAMPLES / "adapters").iterdir(), *(EXAMPLES / "parts").iterdir()} == directories
    assert prompts == {
        name: {
            "chat": task.demo,
            "max_new_tokens": task.max_new_tokens,
            **({"classes": [*task.classes]} if task.classes else {}),
        }
        for name, task in TASKS.items()
    }


def test_a_task_that_is_trained_over_another_is_composed_with_it_as_it_was() -> None:
    composed = json.loads((EXAMPLES / "composed.json").read_text(encoding="utf-8"))
    over = {name: base_task(task) for name, task in TASKS.items()}
    assert set(composed) == {name for name, base in over.items() if base is not None}
    for name in composed:
        base = over[name]
        assert base is not None
        expected = {(artifact_directory(each, EXAMPLES), 1.0) for each in (base, TASKS[name])}
        assert set(parts_of(TASKS[name], EXAMPLES)) == expected


@pytest.mark.parametrize("name", TASKS)
def test_adapter_is_small_and_is_what_its_card_says(name: str) -> None:
    directory = artifact_directory(TASKS[name], EXAMPLES)
    assert sum(path.stat().st_size for path in directory.iterdir()) < MAX_BYTES
    card = (directory / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| (\S+) \| [\d,]+ \| `([0-9a-f]{64})` \|$", card, flags=re.MULTILINE))
    files = {path.name for path in directory.iterdir()} - {"README.md"}
    assert listed == {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in files}
    assert f"{describe(TASKS[name].adapter)};" in card


def test_results_of_all_tasks_are_in_the_documentation() -> None:
    results = read_results(EXAMPLES)
    assert set(results) == set(TASKS)
    text = (EXAMPLES.parent / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert "\n".join(table(results)) in text


@pytest.mark.parametrize("name", TASKS)
def test_result_is_of_the_artifact_as_it_is(name: str) -> None:
    result = read_results(EXAMPLES)[name]
    files = artifact_directory(TASKS[name], EXAMPLES).iterdir()
    assert result.num_bytes == sum(path.stat().st_size for path in files if path.name != "README.md")
    assert result.task > result.base


@pytest.mark.parametrize("name", TASKS)
def test_adapter_config_names_the_base_and_no_path(name: str) -> None:
    directory = artifact_directory(TASKS[name], EXAMPLES)
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    assert set(strings_with_slash(config)) == {"HuggingFaceTB/SmolLM2-135M-Instruct"}


def strings_with_slash(config: Mapping[str, object]) -> list[str]:
    return [value for value in config.values() if isinstance(value, str) and "/" in value]


def test_the_examples_are_of_every_method() -> None:
    methods = {task.adapter.method for task in TASKS.values()}
    others = {
        AdapterMethod.COMPOSED,
        AdapterMethod.TRAINABLE_TOKENS,
        AdapterMethod.UNION,
        AdapterMethod.REFT,
    }
    assert methods | others == set(AdapterMethod)


@pytest.mark.real_model
@pytest.mark.parametrize("name", TASKS)
def test_adapter_registers_as_its_method_and_without_notes(
    name: str, records: Mapping[str, AdapterRecord]
) -> None:
    task = TASKS[name]
    assert records[name].notes == ()
    is_plain = base_task(task) is None
    assert records[name].method is (task.adapter.method if is_plain else AdapterMethod.COMPOSED)


@pytest.mark.real_model
@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if type(task.adapter) is LoraSettings])
def test_lora_lowers_to_every_site(
    name: str, base: LoadedModel, store: AdapterStore, records: Mapping[str, AdapterRecord]
) -> None:
    settings = TASKS[name].adapter
    assert isinstance(settings, LoraSettings)
    deltas = [delta for delta in store.lower(records[name]).deltas if isinstance(delta, LowRank)]
    assert {(delta.site.layer, delta.site.name) for delta in deltas} == {
        (layer, module) for layer in range(base.architecture.num_layers) for module in settings.target_modules
    }
    assert {delta.rank for delta in deltas} == {settings.rank}


# The answers


@pytest.mark.real_model
@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_call_to_try_gets_the_answer_of_the_card(
    task: ExampleTask, served: Mapping[tuple[str, str], Served]
) -> None:
    card = (artifact_directory(task, EXAMPLES) / "README.md").read_text(encoding="utf-8")
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
        plain = served["", item.message].text
        assert not task.is_right(plain, item.answer)
        assert served[task.name, item.message].text[: len(plain)] != plain


# The mixed call


def mixed_call(server: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the script."""
    result = subprocess.run(
        [sys.executable, "-m", "examples.mixed_call", server],
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.returncode, result.stdout, result.stderr


def test_mixed_call_without_a_server_is_one_line() -> None:
    code, printed, said = mixed_call("127.0.0.1:1")
    assert (code, printed) == (1, "")
    assert said.startswith("error: cannot reach the server at 127.0.0.1:1")
    assert said.endswith("; `make run` says `ready` when it can be asked\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, "LOADING"),
        (grpc.StatusCode.UNAVAILABLE, "DRAINING"),
        (grpc.StatusCode.NOT_FOUND, "TASK_NOT_FOUND"),
        (grpc.StatusCode.UNAUTHENTICATED, ""),
    ],
)
def test_mixed_call_before_the_server_is_ready_is_one_line(code: grpc.StatusCode, reason: str) -> None:
    with running_server() as fake:
        fake.status = make_status(code, "the model is being loaded", reason=reason)
        exit_code, printed, said = mixed_call(fake.target)
    assert (exit_code, printed) == (1, "")
    assert re.fullmatch(r"error: the model is being loaded[^\n]*\n", said), said


async def test_mixed_call_asks_every_task_and_tells_who_answered() -> None:
    prompts = json.loads((EXAMPLES / "prompts.json").read_text(encoding="utf-8"))
    with running_server() as server:
        rows = await ask_all(server.target, prompts)
        asked = [request for request in server.requests if isinstance(request, GenerateRequest)]
    assert {request.task_id for request in asked} == set(TASKS)
    assert all(request.sampling.temperature == 0 for request in asked)
    assert rows == [(task, "lora", "2", TEXT) for task in TASKS]
    header, first, *_ = answers_table(rows)
    assert header.split() == ["task", "method", "version", "answer"]
    assert first.split(maxsplit=3) == ["captains-log", "lora", "2", TEXT]
