"""Rows as other tools save them: ends and beginnings that are there already, marks, thoughts, tools, odd tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from manyhats.engine.text.chat_template import Rendering
from manyhats.engine.text.tokenizer import Tokenizer
from manyhats.trainer.data.dataset import Dataset
from manyhats.trainer.data.labels import labelled_items
from manyhats.trainer.data.reading import read_rows
from manyhats.trainer.errors import DataError
from support.factories.spaced_tokenizers import KINDS, spaced_tokenizer
from support.factories.tiny_models import CHAT_TEMPLATE, tiny_tokenizer
from support.factories.training_rows import NAMES, learned, text_of, tokenized, tokenizer_of

END, BEGIN, OTHER_END = 2, 1, 0
SPACED_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SPACED_CHAT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
RICH = (
    "{% if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% if documents %}{{ documents | length }}{% endif %}{% if style is defined %}{{ style }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.name %}{{ m.name + ':' }}{% endif %}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "{{ (m.content or '') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def refusal(row: Mapping[str, object], tokenizer: Tokenizer, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        tokenized([row], tokenizer, **options)
    return str(caught.value)


def all_learned(data: Dataset, tokenizer: Tokenizer) -> list[str]:
    """The text of each run of targets, of all rows."""
    return [text for row in data.rows for text in learned(row, tokenizer)]


# Ends and beginnings

ENDINGS = [
    "",
    "<|im_end|>",
    "<|im_end|>\n",
    "<|im_end|> \n\n",
    "<|im_end|><|im_end|>",
    "<|im_end|>\n<|im_end|>\n",
]
COMPLETIONS = ["no", " no", "no\n", "a<|im_end|>b", "ü"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("completion", COMPLETIONS)
@pytest.mark.parametrize("chat", [False, True])
def test_a_completion_has_one_end(completion: str, ending: str, chat: bool) -> None:
    tokenizer = tokenizer_of()
    plain = tokenized([{"prompt": "q", "completion": completion}], tokenizer, chat=chat)
    data = tokenized([{"prompt": "q", "completion": completion + ending}], tokenizer, chat=chat)
    assert data.rows[0] == plain.rows[0]
    assert data.completions == (completion,)
    assert data.counts.ends == bool(ending)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHAT_TEMPLATE.replace("<|im_end|>", "</turn>")])
def test_a_message_has_one_end_in_any_turn(ending: str, template: str) -> None:
    tokenizer = tokenizer_of(template=template)
    ending = ending if template == CHAT_TEMPLATE else ending.replace("<|im_end|>", "</turn>")

    def conversation(end: str) -> list[dict[str, object]]:
        turns = [("user", "one"), ("assistant", f"two{end}"), ("user", "three"), ("assistant", f"four{end}")]
        return [{"messages": [{"role": role, "content": content} for role, content in turns]}]

    data = tokenized(conversation(ending), tokenizer)
    assert list(data.rows) == list(tokenized(conversation(""), tokenizer).rows)
    assert data.counts.ends == (2 if ending else 0)


@pytest.mark.parametrize("ending", ENDINGS[1:])
@pytest.mark.parametrize("text", ["abc", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo", "a\n"])
def test_a_text_has_one_end_and_nothing_behind_it(text: str, ending: str) -> None:
    tokenizer = tokenizer_of()
    data = tokenized([{"text": text + ending}], tokenizer)
    assert data.rows[0] == tokenized([{"text": text}], tokenizer).rows[0]
    assert data.rows[0].token_ids[-1] == END


@pytest.mark.parametrize(
    "fields", [{"prompt": "q", "completion": "no<|endoftext|>"}, {"text": "no<|endoftext|>"}]
)
def test_another_end_of_the_model_is_an_end(fields: Mapping[str, object]) -> None:
    tokenizer = tokenizer_of()
    data = tokenized([fields], tokenizer, eos_token_ids=frozenset({END, OTHER_END}))
    assert data.rows[0].token_ids[-1] == OTHER_END
    assert END not in data.rows[0].token_ids


BEGINNINGS = [
    "<|im_start|> $A",
    "<|endoftext|> <|im_start|> $A",
    "<|im_start|> $A <|im_end|>",
    "$A <|im_end|>",
]


@pytest.mark.parametrize("single", BEGINNINGS)
@pytest.mark.parametrize("prompt", ["hi", "the", "a b", "\n", "ü"])
def test_a_rendered_beginning_stays_one_and_an_end_stands_last(single: str, prompt: str) -> None:
    tokenizer = tokenizer_of(single)
    backend = tiny_tokenizer()
    head = "".join(single.partition("$A")[0].split())
    for beginning in ("", head):
        data = tokenized([{"prompt": beginning + prompt, "completion": "yo"}], tokenizer)
        expected = [*backend.encode(head + prompt).ids, *backend.encode("yo").ids, END]
        assert list(data.rows[0].token_ids) == expected
        assert data.counts.beginnings == bool(beginning)
        text = tokenized([{"text": beginning + prompt}], tokenizer)
        assert list(text.rows[0].token_ids) == [*backend.encode(head + prompt).ids, END]
        assert text.rows[0].token_ids.count(END) == 1


# Tokens that the base has no embedding for

ROWS: list[dict[str, object]] = [
    {"prompt": "a <new>", "completion": "b"},
    {"prompt": "a", "completion": "<new>"},
    {"text": "<new> a"},
    {"messages": [{"role": "user", "content": "<new>"}, {"role": "assistant", "content": "b"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<new>"}]},
]


@pytest.mark.parametrize("row", ROWS)
def test_a_token_without_an_embedding_is_named_with_its_line_and_the_table(row: dict[str, object]) -> None:
    backend = tiny_tokenizer()
    vocab_size = backend.get_vocab_size()
    backend.add_tokens(["<new>"])
    tokenizer = tokenizer_of(backend=backend)
    error = refusal(row, tokenizer, vocab_size=vocab_size)
    assert error == (
        f"data.jsonl:1: has the token {vocab_size} ('<new>'); the base's embedding has {vocab_size} rows"
    )


def test_a_label_without_an_embedding_is_named() -> None:
    backend = tiny_tokenizer()
    vocab_size = backend.get_vocab_size()
    backend.add_tokens(["<new>"])
    error = refusal(
        {"prompt": "a", "completion": "b"},
        tokenizer_of(backend=backend),
        vocab_size=vocab_size,
        labels=["b", "<new>"],
    )
    assert f"the label '<new>' has the token {vocab_size}" in error


# Which turns are learned

MARKS = ("weight", "train", "training", "trainable", "loss")


def marked(mark: str, values: Sequence[object]) -> dict[str, object]:
    """A conversation of as many turns as there are values, of which None is no mark."""
    messages: list[dict[str, object]] = []
    for index, value in enumerate(values):
        messages.append({"role": "user", "content": f"q{index}"})
        turn: dict[str, object] = {"role": "assistant", "content": f"a{index}"}
        messages.append(turn if value is None else {**turn, mark: value})
    return {"messages": messages}


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("values", list(itertools.product([0, 1, None], repeat=3))[1:])
def test_turns_that_are_left_out_are_not_learned(mark: str, values: Sequence[int | None]) -> None:
    kept = [index for index, value in enumerate(values) if value != 0]
    tokenizer = tokenizer_of()
    if not kept:
        return
    is_bool = mark != "weight"
    given_values = [bool(value) if is_bool and value is not None else value for value in values]
    data = tokenized([marked(mark, given_values)], tokenizer)
    assert all_learned(data, tokenizer) == [f"a{index}<|im_end|>" for index in kept]
    assert len(data.rows) == 1


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("value", [2, 0.5, -1, "0", "false", [], {}, float("inf")])
def test_other_marks_are_refused_with_file_line_and_field(mark: str, value: object) -> None:
    error = refusal(marked(mark, [None, value]), tokenizer_of())
    assert error.startswith(f"data.jsonl:1: messages[3].{mark}: must be 0 or 1, false or true, not ")


def test_marks_that_leave_nothing_or_contradict_each_other_are_refused() -> None:
    tokenizer = tokenizer_of()
    assert "every turn of the assistant is left out" in refusal(marked("weight", [0, 0]), tokenizer)
    row: Any = marked("weight", [0])
    row["messages"][1]["train"] = True
    assert "messages[1]: weight and train contradict each other" in refusal(row, tokenizer)
    row = marked("train", [None])
    row["messages"][0]["train"] = True
    assert "messages[0].train: only turns of the assistant can be learned" in refusal(row, tokenizer)


def test_a_first_turn_that_is_left_out_is_context() -> None:
    tokenizer = tokenizer_of()
    greeting = {"role": "assistant", "content": "hello", "weight": 0}
    data = tokenized([{"messages": [greeting, *marked("weight", [1])["messages"]]}], tokenizer)  # type: ignore[misc]
    assert all_learned(data, tokenizer) == ["a0<|im_end|>"]
    assert "hello" in text_of(data.prompt_token_ids(0), tokenizer)


@pytest.mark.parametrize("ext", ["jsonl", "json", "csv", "parquet"])
def test_marks_are_read_from_every_kind_of_file(ext: str, tmp_path: Path) -> None:
    row = marked("weight", [0, 1])
    path = tmp_path / f"data.{ext}"
    match ext:
        case "parquet":
            pq.write_table(pa.Table.from_pylist([row]), path)
        case "csv":
            cell = json.dumps(row["messages"]).replace('"', '""')
            path.write_text(f'messages\n"{cell}"\n')
        case "json":
            path.write_text(json.dumps([row]))
        case _:
            path.write_text(json.dumps(row))
    tokenizer = tokenizer_of()
    assert all_learned(tokenized(list(read_rows(str(path))), tokenizer), tokenizer) == ["a1<|im_end|>"]


# What a chat template reads

TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
]
QUESTION = {"role": "user", "content": "2+2?"}
ANSWERS: list[dict[str, object]] = [
    {"role": "assistant", "content": "4"},
    {"role": "assistant", "content": " 4 "},
    {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
    {"role": "assistant", "content": "", "reasoning_content": "hm"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]},
    {"role": "assistant", "content": "x", "tool_calls": [{"id": 1}], "name": "bot"},
]
BESIDE: list[dict[str, Any]] = [
    {},
    {"tools": TOOLS},
    {"documents": [{"title": "t", "text": "x"}]},
    {"chat_template_kwargs": {"style": "brief"}},
    {"tools": TOOLS, "chat_template_kwargs": {"style": "é"}},
]


def by_transformers(
    messages: Sequence[Mapping[str, object]], template: str, beside: Mapping[str, Any]
) -> list[int]:
    reference: Any = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), **NAMES)
    return list(
        reference.apply_chat_template(
            messages,
            chat_template=template,
            tools=beside.get("tools"),
            documents=beside.get("documents"),
            return_dict=False,
            **beside.get("chat_template_kwargs", {}),
        )
    )


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("as_text", [False, True])
def test_what_the_template_reads_is_rendered_as_transformers_does(
    answer: dict[str, object], beside: dict[str, Any], as_text: bool
) -> None:
    tokenizer = tokenizer_of(template=RICH)
    messages = [QUESTION, answer, {"role": "user", "content": "sure?", "name": "me"}, ANSWERS[0]]
    fields: dict[str, object] = {"messages": messages, **beside}
    if as_text:
        fields = {name: json.dumps(value) for name, value in fields.items()}
    data = tokenized([fields], tokenizer)
    expected = by_transformers(messages, RICH, beside)
    (row,) = data.rows
    assert [*row.token_ids, *tiny_tokenizer().encode("\n").ids] == expected
    assert all_learned(data, tokenizer)[-1] == "4<|im_end|>"
    assert len(all_learned(data, tokenizer)) == 2


def test_thoughts_and_calls_are_learned_with_the_answer() -> None:
    tokenizer = tokenizer_of(template=RICH)
    data = tokenized([{"messages": [QUESTION, ANSWERS[2]]}], tokenizer)
    assert all_learned(data, tokenizer) == ["<think>two and two</think>4<|im_end|>"]


def test_a_prompt_has_tools_in_a_chat() -> None:
    tokenizer = tokenizer_of(template=RICH)
    row = {"prompt": "2+2?", "completion": "4", "tools": TOOLS}
    data = tokenized([row], tokenizer, chat=True)
    expected = by_transformers([QUESTION, ANSWERS[0]], RICH, {"tools": TOOLS})
    assert [*data.rows[0].token_ids, *tiny_tokenizer().encode("\n").ids] == expected
    assert "tools: does not apply to a plain-text prompt" in refusal(row, tokenizer)
    assert "tools: does not apply to a text" in refusal({"text": "a", "tools": TOOLS}, tokenizer)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"tools": TOOLS}, "tools"),
        ({"functions": TOOLS}, "functions"),
        ({"documents": [{"text": "a"}]}, "documents"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking"),
        ({"id": 7}, "id"),
        ({"label": ""}, "label"),
        *(
            ({"messages": [QUESTION, {"role": "assistant", "content": "4", key: "x"}]}, f"messages[1].{key}")
            for key in (
                "reasoning_content",
                "thinking",
                "reasoning",
                "name",
                "images",
                "tool_calls",
                "refusal",
            )
        ),
        ({"messages": [{**QUESTION, "name": "me"}, ANSWERS[0]]}, "messages[0].name"),
    ],
)
def test_what_nothing_reads_is_an_error_or_is_counted(fields: dict[str, object], name: str) -> None:
    tokenizer = tokenizer_of()
    row = {"messages": [QUESTION, ANSWERS[0]], **fields}
    assert refusal(row, tokenizer).startswith(f"data.jsonl:1: {name}: ")
    data = tokenized([row, row, {"text": "a"}], tokenizer, ignore_fields=True)
    general = name.replace("[0]", "[]").replace("[1]", "[]")
    assert data.counts.ignored == {general: 2}
    assert data.rows[0] == tokenized([{"messages": [QUESTION, ANSWERS[0]]}], tokenizer).rows[0]


def test_nulls_and_empty_values_say_nothing() -> None:
    tokenizer = tokenizer_of()
    answer = {**ANSWERS[0], "tool_calls": None, "reasoning_content": None, "name": "", "images": []}
    row = {"messages": [QUESTION, answer], "tools": None, "text": None, "id": None}
    assert (
        tokenized([row], tokenizer).rows[0]
        == tokenized([{"messages": [QUESTION, ANSWERS[0]]}], tokenizer).rows[0]
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": {}}, "tools: must be a list, not dict"),
        ({"tools": "[1,"}, "tools: must be a list, or JSON of one"),
        ({"documents": "nothing"}, "documents: must be a list, or JSON of one"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs: must be an object, not list"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages: cannot be set here"),
        ({"messages": '[{"role": "user", "role": "user"}]'}, "the key 'role' appears twice"),
        ({"messages": '[{"role": "user", "content": NaN}]'}, "NaN is not a number in JSON"),
        ({"messages": "[] []"}, "something follows it"),
        ({"tools": '[{"a": Infinity}]'}, "Infinity is not a number in JSON"),
    ],
)
def test_cells_are_read_as_strictly_as_files(fields: dict[str, object], message: str) -> None:
    row = {"messages": [QUESTION, ANSWERS[0]], **fields}
    assert message in refusal(row, tokenizer_of(template=RICH))


# Tokenizers that are not byte-level

SPACED_ROWS = [
    ("def f(", "x):"),
    ("It is", " Paris"),
    ("It is Par", "is"),
    ("the answer is", " 42"),
    ("q\n", "yes"),
    ("10", "0"),
    ("one ", "two"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>"])
def test_a_row_is_the_whole_texts_tokens(kind: str, single: str) -> None:
    tokenizer = Tokenizer(spaced_tokenizer(kind, single), special_tokens=SPACED_NAMES)
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in SPACED_ROWS]
    data = tokenized(rows, tokenizer, labels=["yes", " 42", "x):"])
    reference = spaced_tokenizer(kind, "")
    for row, (prompt, completion), labels in zip(data.rows, SPACED_ROWS, data.labels, strict=True):
        assert row.token_ids == (1, *reference.encode(prompt + completion).ids, 2)
        assert row.is_target[0] is False
        assert row.is_target[-1] is True
        for label, tokens in zip(["yes", " 42", "x):"], labels, strict=True):
            left = row.token_ids[: row.is_target.index(True) - tokens.num_taken]
            assert (*left, *tokens.token_ids) == (1, *reference.encode(prompt + label).ids, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_scored_as_they_are_learned(kind: str) -> None:
    tokenizer = Tokenizer(spaced_tokenizer(kind), special_tokens=SPACED_NAMES)
    labels = ["is", " Paris", "10", "1"]
    data = tokenized(
        [{"prompt": "It is Par", "completion": label} for label in labels], tokenizer, labels=labels
    )
    for index, item in enumerate(labelled_items(data, labels)):
        tokens = item.score_tokens
        whole = tokens.prompt_token_ids + tokens.continuations[index]
        assert whole == data.rows[index].token_ids
        num_given = len(tokens.prompt_token_ids) + tokens.num_given[index]
        assert data.rows[index].is_target.index(True) == num_given


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(
    contents=st.lists(
        st.lists(st.sampled_from(["the", " fox", "42", "x", ".", "yes", " "]), min_size=1, max_size=4).map(
            lambda parts: "".join(parts).lstrip() or "x"  # a space would run into the mark ahead of it
        ),
        min_size=2,
        max_size=40,
    )
)
def test_every_turn_of_a_conversation_is_learned_once_as_the_whole_has_it(
    kind: str, contents: list[str]
) -> None:
    tokenizer = Tokenizer(spaced_tokenizer(kind), special_tokens=SPACED_NAMES, chat_template=SPACED_CHAT)
    contents = contents[: len(contents) // 2 * 2]
    messages = [
        {"role": ("user", "assistant")[index % 2], "content": content}
        for index, content in enumerate(contents)
    ]
    data = tokenized([{"messages": messages}], tokenizer)
    whole = tokenizer.render_chat(messages, rendering=Rendering(add_generation_prompt=False)).removesuffix(
        "\n"
    )
    assert data.rows[-1].token_ids == tuple(tokenizer.encode(whole, add_special_tokens=False))
    assert len(data.rows) == 1
    ends = [place for place, token in enumerate(data.rows[0].token_ids) if token == 2]
    assert sum(data.rows[0].is_target[end] for end in ends) == len(contents) // 2
    assert all(not data.rows[0].is_target[end] for end in ends[::2])
