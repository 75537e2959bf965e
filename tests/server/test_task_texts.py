"""Tasks with chat templates, tokenizers and tokens of their own, on a real engine, over a real port."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, pre_tokenizers

from manyhats.client import AdapterUnsupportedError, AsyncClient, InvalidRequestError
from manyhats.server.lifetime.config_file import make_config
from support.factories.tiny_models import TINY_VOCAB_SIZE, make_checkpoint, save_tokenizer, tiny_tokenizer
from support.harnesses.engine_server import served_config
from support.oracles.peft import make_peft, peft_logits, save_peft
from support.oracles.transformers import load_transformers

OWN = "{% for m in messages %}[{{ m.role | upper }}] {{ m.content }}\n{% endfor %}[A]"
TALK = [{"role": "user", "content": "hello <tool> there"}]
FAILING = {
    "raising": "{{ raise_exception('roles must alternate') }}",
    "half": '{{ "\\ud800" }}{{ messages[0].content }}',
    "far-half": '{% for i in range(20000) %}x{% endfor %}{{ "\\udfff" }}',
    "raising-half": '{{ raise_exception("\\ud800 is bad") }}',
    "wordy": '{{ raise_exception("\U0001f600" * 1000) }}',
}
ENDLESS = {
    f"endless{n}": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + str(n)
    for n in range(8)
}
SPECIAL, TOOL = "<|call|>", "<tool>"


def tokenizer_with_tokens() -> Any:
    made = tiny_tokenizer()
    made.add_special_tokens([AddedToken(SPECIAL, special=True, normalized=False)])
    made.add_tokens([AddedToken(TOOL, special=False, normalized=False)])
    return made


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a root of adapters on it."""
    home = tmp_path_factory.mktemp("texts")
    make_checkpoint(home / "base", seed=5)
    peft: Any = import_module("peft")
    model = load_transformers(home / "base")
    plain = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    root = home / "root"
    save_peft(make_peft(model, plain), root / "plain")
    for name in ("template", "named", "other", "far", *FAILING, *ENDLESS):
        shutil.copytree(root / "plain", root / name)
    for name, template in (FAILING | ENDLESS).items():
        (root / name / "chat_template.jinja").write_text(template, encoding="utf-8")
    (root / "template" / "chat_template.jinja").write_text(OWN)
    save_tokenizer(root / "named", chat_template=[{"name": "default", "template": OWN}])
    other = tiny_tokenizer()
    other.add_tokens([f"<{n}>" for n in range(TINY_VOCAB_SIZE)])
    save_tokenizer(root / "far", other)
    other = tiny_tokenizer()
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    save_tokenizer(root / "other", other)
    first = tiny_tokenizer().get_vocab_size()
    trained = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        trainable_token_indices=[first, first + 1],
    )
    save_peft(make_peft(model, trained), root / "tokens")
    save_tokenizer(root / "tokens", tokenizer_with_tokens(), eos_token=SPECIAL, chat_template=OWN)
    return home


@asynccontextmanager
async def serving(home: Path, store: Path) -> AsyncIterator[AsyncClient]:
    config = make_config(
        {
            "model": str(home / "base"),
            "store": store,
            "adapter_roots": (home / "root",),
            "dtype": "float32",
            "quantization": "none",
            "num_threads": 1,
            "max_adapters": 4,
            "kv_cache_bytes": 4 << 20,
        }
    )
    async with served_config(config) as (address, _), AsyncClient(address) as client:
        yield client


def auto_tokenizer(directory: Path) -> Any:
    transformers: Any = import_module("transformers")
    return transformers.AutoTokenizer.from_pretrained(directory)


def rendered(home: Path, name: str) -> list[int]:
    tokenizer = auto_tokenizer(home / "root" / name)
    ids: list[int] = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    return ids


async def prompt_ids(client: AsyncClient, task: str) -> set[tuple[int, ...]]:
    """What each call makes of the conversation."""
    options: Any = {"task_id": task, "max_new_tokens": 1, "prompt_logprobs": True}
    answer = await client.generate(TALK, **options)
    chunks = [chunk async for chunk in client.generate_stream(TALK, **options)]
    tokenized = await client.tokenize(TALK, task_id=task)
    scored = await client.score(TALK, ["x"], task_id=task)
    assert scored.usage.prompt_tokens == len(tokenized.ids)
    return {
        tuple(tokenized.ids),
        tuple(token.id for token in answer.prompt_tokens),
        tuple(token.id for chunk in chunks for token in chunk.prompt_tokens),
    }


async def test_a_tasks_own_template_renders_its_conversations_everywhere(home: Path, tmp_path: Path) -> None:
    save_tokenizer(home / "root" / "template")  # what AutoTokenizer needs beside the template
    async with serving(home, tmp_path / "store") as client:
        for name in ("template", "named"):
            await client.register_adapter(name, name)
            assert await prompt_ids(client, name) == {tuple(rendered(home, name))}
        await client.register_adapter("plain", "plain")
        base = tuple((await client.tokenize(TALK)).ids)
        assert await prompt_ids(client, "plain") == await prompt_ids(client, "") == {base}
        assert base not in await prompt_ids(client, "template")


async def test_rows_beyond_the_base_s_are_read_by_their_ids_without_a_tokenizer(
    home: Path, tmp_path: Path
) -> None:
    peft: Any = import_module("peft")
    model, size = load_transformers(home / "base"), TINY_VOCAB_SIZE + 2
    model.resize_token_embeddings(size)
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
        modules_to_save=["embed_tokens", "lm_head"],
        base_model_name_or_path=str(home / "base"),
    )
    resized = save_peft(make_peft(model, config), home / "root" / "resized")
    ids = (5, size - 1, 7, size - 2)
    again = load_transformers(home / "base")
    again.resize_token_embeddings(size)
    logits = peft_logits(again, resized, ids).double().log_softmax(-1)
    async with serving(home, tmp_path / "store") as client:
        await client.register_adapter("resized", "resized")
        scored = await client.score(list(ids), [[size - 1], [5]], task_id="resized")
        found = [each.logprob for each in scored.scores]
        assert found == pytest.approx([float(logits[-1, size - 1]), float(logits[-1, 5])], abs=1e-4)
        assert len((await client.embed([list(ids)], task_id="resized")).values) == 1
        for call in (client.generate([size], task_id="resized"), client.embed([[size]], task_id="resized")):
            with pytest.raises(InvalidRequestError, match=f"{size} is outside the vocabulary of {size}"):
                await call
        with pytest.raises(InvalidRequestError, match=f"below {TINY_VOCAB_SIZE}"):
            await client.generate([size - 1])


async def test_own_tokens_are_read_spoken_and_stopped_at(home: Path, tmp_path: Path) -> None:
    directory = home / "root" / "tokens"
    theirs = auto_tokenizer(directory)
    prompt = f"hi {TOOL} x {SPECIAL}"
    ids = theirs(prompt)["input_ids"]
    logits = peft_logits(load_transformers(home / "base"), directory, tuple(ids))
    following = int(logits[-1].argmax())
    special, tool = theirs.convert_tokens_to_ids([SPECIAL, TOOL])
    async with serving(home, tmp_path / "store") as client:
        info = (await client.register_adapter("tokens", "tokens")).adapter
        assert info.parts[0].text_files == ("tokenizer.json", "tokenizer_config.json")
        assert f"its answers also end with '{SPECIAL}'" in info.notes
        tokenized = await client.tokenize(prompt, task_id="tokens")
        assert list(tokenized.ids) == ids
        assert SPECIAL in tokenized.pieces
        answer = await client.generate(prompt, task_id="tokens", max_new_tokens=1)
        assert answer.tokens[0].id == following

        said: Any = {"task_id": "tokens", "max_new_tokens": 3, "temperature": 0}
        answer = await client.generate("x", logit_bias={tool: 1e4}, **said)
        assert (answer.text, answer.tokens[0].text) == (TOOL * 3, TOOL)
        chunks = [chunk.text async for chunk in client.generate_stream("x", logit_bias={tool: 1e4}, **said)]
        assert "".join(chunks) == TOOL * 3
        stopped = await client.generate("x", logit_bias={tool: 1e4}, stop_sequences=TOOL * 2, **said)
        assert (stopped.text, len(stopped.tokens)) == ("", 2)

        ended = await client.generate("x", logit_bias={special: 1e4}, **said)
        assert (ended.finish_reason.value, len(ended.tokens), ended.text) == ("eos", 1, "")
        going = {**said, "ignore_eos": True, "skip_special_tokens": False}
        shown = await client.generate("x", logit_bias={special: 1e4}, **going)
        assert shown.text == SPECIAL * 3
        stopped = await client.generate("x", logit_bias={special: 1e4}, stop_sequences=SPECIAL, **going)
        assert (stopped.finish_reason.value, stopped.text) == ("stop_sequence", "")
        scored = await client.score("x", [TOOL, SPECIAL], task_id="tokens")
        assert [each.num_tokens for each in scored.scores] == [1, 1]

        # The base knows nothing of them.
        assert len((await client.tokenize(TOOL)).ids) > 1
        with_base = await client.generate("x", logit_bias={special: 1e4}, max_new_tokens=2, temperature=0)
        assert with_base.finish_reason.value == "length"


async def test_what_is_uploaded_composed_or_restarted_has_its_text(home: Path, tmp_path: Path) -> None:
    directory = home / "root" / "tokens"
    expected = [rendered(home, "tokens")]
    async with serving(home, tmp_path / "store") as client:
        registered = (await client.register_adapter("one", "tokens")).adapter
        uploaded = (await client.upload_adapter("two", directory)).adapter
        assert uploaded.digest == registered.digest
        await client.register_adapter("three", parts=[("tokens", 1.0), ("plain", 0.5)])
        for task in ("one", "two", "three", "one@1"):
            assert [list((await client.tokenize(TALK, task_id=task)).ids)] == expected
        with pytest.raises(AdapterUnsupportedError, match=r"parts\[1\]"):
            await client.register_adapter("four", parts=[("tokens", 1.0), ("template", 1.0)])
    async with serving(home, tmp_path / "store") as client:
        for task in ("one", "two", "three"):
            assert [list((await client.tokenize(TALK, task_id=task)).ids)] == expected
            answer = await client.generate(TALK, task_id=task, max_new_tokens=1)
            assert answer.usage.prompt_tokens == len(expected[0])


async def test_another_tokenizer_is_refused_by_name(home: Path, tmp_path: Path) -> None:
    async with serving(home, tmp_path / "store") as client:
        with pytest.raises(
            AdapterUnsupportedError, match=r"tokenizer\.json: is not the base's .* pre_tokenizer"
        ):
            await client.register_adapter("other", "other")
        with pytest.raises(AdapterUnsupportedError, match="embedding and head have 320 rows"):
            await client.register_adapter("far", "far")


async def test_a_template_that_fails_is_the_requests_fault(home: Path, tmp_path: Path) -> None:
    why = {
        "raising": "roles must alternate",
        "half": r"writes U\+D800, half of a surrogate pair",
        "far-half": r"writes U\+DFFF, half of a surrogate pair",
        "raising-half": "refused the messages: . is bad",
        "wordy": "refused the messages: \U0001f600",
    }
    async with serving(home, tmp_path / "store") as client:
        for name in FAILING:
            await client.register_adapter(name, name)
            for call in (client.generate, client.tokenize):
                with pytest.raises(InvalidRequestError, match=why[name]):
                    await call(TALK, task_id=name)
            with pytest.raises(InvalidRequestError, match=why[name]):
                await client.score(TALK, ["x"], task_id=name)
            with pytest.raises(InvalidRequestError, match=why[name]):
                async for _ in client.generate_stream(TALK, task_id=name):
                    pass
            assert (await client.generate("text", task_id=name, max_new_tokens=1)).tokens


async def test_templates_without_end_hold_nobody_up(home: Path, tmp_path: Path) -> None:
    async with serving(home, tmp_path / "store") as client:
        for name in ("template", *ENDLESS):
            await client.register_adapter(name, name)
        calls = [
            asyncio.ensure_future(client.tokenize(TALK, task_id=name)) for name in ENDLESS for _ in range(3)
        ]
        await asyncio.sleep(0)
        for _ in range(20):
            await client.tokenize(TALK)
            await client.tokenize(TALK, task_id="template")
        ended = [call for call in calls if call.done()]
        assert len(ended) <= 3
        (first, *_), _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        with pytest.raises(InvalidRequestError, match="too much time or memory"):
            await first
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that has no room for tokens, and a task whose embedding and head were resized for two."""
    home = tmp_path_factory.mktemp("full")
    checkpoint = make_checkpoint(home / "base", seed=5, vocab_size=tiny_tokenizer().get_vocab_size())
    peft: Any = import_module("peft")
    model: Any = load_transformers(checkpoint)
    model.resize_token_embeddings(tokenizer_with_tokens().get_vocab_size())
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    config.base_model_name_or_path = str(checkpoint)  # by which PEFT sees that it was resized
    directory = home / "root" / "added"
    tuned = make_peft(model, config)
    save_peft(tuned, directory)
    save_tokenizer(directory, tokenizer_with_tokens(), eos_token=SPECIAL, chat_template=OWN)
    shutil.copytree(directory, home / "root" / "more")
    more = tokenizer_with_tokens()
    more.add_tokens(["<more>"])
    save_tokenizer(home / "root" / "more", more)
    prompt = auto_tokenizer(directory)(f"hi {TOOL} x {SPECIAL}")["input_ids"]
    with torch.no_grad():
        torch.save(tuned(input_ids=torch.tensor([prompt])).logits[0, -1], home / "logits.pt")
    return home


async def test_tokens_beyond_the_base_s_are_read_spoken_and_stopped_at(full: Path, tmp_path: Path) -> None:
    theirs = auto_tokenizer(full / "root" / "added")
    size = tiny_tokenizer().get_vocab_size()
    special, tool = theirs.convert_tokens_to_ids([SPECIAL, TOOL])
    assert {special, tool} == {size, size + 1}
    prompt = f"hi {TOOL} x {SPECIAL}"
    said: Any = {"task_id": "added", "max_new_tokens": 3, "temperature": 0}
    async with serving(full, tmp_path / "store") as client:
        info = (await client.register_adapter("added", "added")).adapter
        assert f"its answers also end with '{SPECIAL}'" in info.notes
        tokenized = await client.tokenize(prompt, task_id="added")
        assert list(tokenized.ids) == theirs(prompt)["input_ids"]
        answer = await client.generate(
            prompt, task_id="added", max_new_tokens=1, top_logprobs=3, logprobs=True
        )
        best = torch.load(full / "logits.pt").log_softmax(-1).topk(3)
        assert [top.id for top in answer.tokens[0].top] == best.indices.tolist()
        found = torch.tensor([top.logprob for top in answer.tokens[0].top])
        torch.testing.assert_close(found, best.values, atol=1e-4, rtol=1e-4)

        answer = await client.generate("x", logit_bias={tool: 1e4}, **said)
        assert (answer.text, answer.tokens[0].text) == (TOOL * 3, TOOL)
        ended = await client.generate("x", logit_bias={special: 1e4}, **said)
        assert (ended.finish_reason.value, len(ended.tokens), ended.text) == ("eos", 1, "")
        stopped = await client.generate("x", logit_bias={tool: 1e4}, stop_sequences=TOOL * 2, **said)
        assert (stopped.text, len(stopped.tokens)) == ("", 2)
        kept = await client.generate(prompt, choice=["ab", "cd"], task_id="added", max_new_tokens=8)
        assert kept.text in ("ab", "cd")
        scored = await client.score("x", [TOOL, SPECIAL], task_id="added")
        assert [each.num_tokens for each in scored.scores] == [1, 1]
        assert await prompt_ids(client, "added") == {tuple(rendered(full, "added"))}

        # The base has none of them.
        with pytest.raises(InvalidRequestError, match="outside the vocabulary"):
            await client.generate("x", logit_bias={tool: 1.0})
        with pytest.raises(AdapterUnsupportedError, match=f"adds '<more>' with the id {size + 2}"):
            await client.register_adapter("more", "more")
    async with serving(full, tmp_path / "store") as client:  # as the store has it
        answer = await client.generate("x", logit_bias={tool: 1e4}, **said)
        assert answer.text == TOOL * 3
