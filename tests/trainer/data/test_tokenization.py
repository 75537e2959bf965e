"""Rows become the tokens that the server makes of them, and what is learned is the completion and its end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.engine.errors import ModelError
from manyhats.engine.text.ending import find_ends
from manyhats.engine.text.prompt_text import ScoreTokens
from manyhats.engine.text.tokenizer import ChatMessage, Tokenizer
from manyhats.server.grpc import from_proto
from manyhats.server.service.prompts import Encoder
from manyhats.server.service.text_threads import TextThreads
from manyhats.trainer.data.contents import PromptForm
from manyhats.trainer.data.dataset import Dataset
from manyhats.trainer.data.labels import find_labels, labelled_items
from manyhats.trainer.errors import DataError, SettingError
from manyhats.v1.generation_pb2 import ChatMessage as ChatMessageProto
from manyhats.v1.generation_pb2 import ChatMessages, Continuation, ScoreRequest
from support.factories.default_model import default_model_directory
from support.factories.tiny_models import CHAT_TEMPLATE, EOS_TOKEN_ID
from support.factories.training_rows import TOKENIZER, learned, text_of, tokenized, tokenizer_of


def dataset_of(*rows: Mapping[str, object], **arguments: Any) -> Dataset:
    return tokenized(rows, **arguments)


def refusal(*rows: Mapping[str, object], **arguments: Any) -> str:
    with pytest.raises(DataError) as caught:
        dataset_of(*rows, **arguments)
    return str(caught.value)


async def score_tokens(request: ScoreRequest, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Prompt and continuations as the server tokenizes them."""
    encoder = Encoder(tokenizer, TextThreads(), tokenizer.vocab_size)
    received = ScoreRequest.FromString(request.SerializeToString())
    prompts = [from_proto.prompt(received), *from_proto.continuations(received)]
    return [await encoder.encode(prompt) for prompt in prompts]


@pytest.mark.parametrize("tokenizer", [TOKENIZER, tokenizer_of("<|im_start|> $A")], ids=["plain", "bos"])
@pytest.mark.parametrize(
    ("prompt", "completion"), [("Who goes", " there"), ("the ", "the"), ("a<|im_end|>", "ü\n")]
)
async def test_a_plain_prompt_and_completion_are_what_score_computes(
    tokenizer: Tokenizer, prompt: str, completion: str
) -> None:
    request = ScoreRequest(text=prompt, continuations=[Continuation(text=completion)])
    context, continuation = await score_tokens(request, tokenizer)
    row = {"prompt": prompt, "completion": completion}
    data = dataset_of(row, tokenizer=tokenizer, labels=[completion])
    assert data.rows[0].token_ids == (*context, *continuation, EOS_TOKEN_ID)
    assert data.rows[0].is_target == (False,) * len(context) + (True,) * (len(continuation) + 1)
    (item,) = labelled_items(data, [completion])
    assert item.score_tokens == ScoreTokens(context, ((*continuation, EOS_TOKEN_ID),), (0,))


@pytest.mark.parametrize("system", ["", "Be brief."])
async def test_a_chat_prompt_is_what_score_computes(system: str) -> None:
    messages = [ChatMessageProto(role="system", content=system)] if system else []
    messages.append(ChatMessageProto(role="user", content="Hi"))
    request = ScoreRequest(chat=ChatMessages(messages=messages), continuations=[Continuation(text="Ho")])
    context, continuation = await score_tokens(request, TOKENIZER)
    row = {"prompt": "Hi", "completion": "Ho"}
    for data in (
        dataset_of(row, chat=True, system=system),
        dataset_of({**row, "system": system}, chat=True, system="overruled" if system else ""),
    ):
        assert data.rows[0].token_ids == (*context, *continuation, EOS_TOKEN_ID)
        assert data.prompt_token_ids(0) == context


def test_all_of_a_text_but_its_first_token_is_learned_with_its_end() -> None:
    data = dataset_of({"text": "abc"}, tokenizer=tokenizer_of("<|im_start|> $A"))
    assert text_of(data.rows[0].token_ids) == "<|im_start|>abc<|im_end|>"
    assert data.rows[0].is_target == (False, True, True, True, True)
    assert (
        dataset_of({"text": "abc<|im_end|>"}).rows[0].token_ids
        == dataset_of({"text": "abc"}).rows[0].token_ids
    )


CONVERSATION = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": " four "},
]


@pytest.mark.parametrize("messages", [CONVERSATION, json.dumps(CONVERSATION)], ids=["list", "JSON"])
def test_every_turn_of_the_assistant_is_learned_after_what_the_server_renders_ahead_of_it(
    messages: object,
) -> None:
    data = dataset_of({"messages": messages})
    assert len(data.rows) == 1
    assert text_of(data.rows[0].token_ids) == (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n four <|im_end|>"
    )
    assert learned(data.rows[0]) == ["two<|im_end|>", " four <|im_end|>"]
    history = [ChatMessage(each["role"], each["content"]) for each in CONVERSATION[:3]]
    assert data.prompt_token_ids(0) == tuple(TOKENIZER.encode_chat(history))
    assert data.completions[0] == " four "


def test_a_system_message_stands_ahead_of_a_conversation_that_has_none() -> None:
    for data in (
        dataset_of({"messages": CONVERSATION}, system="Be brief."),
        dataset_of({"messages": CONVERSATION, "system": "Be brief."}),
        dataset_of({"messages": [{"role": "system", "content": "Be brief."}, *CONVERSATION]}, system="no"),
    ):
        assert text_of(data.rows[0].token_ids).startswith(
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user"
        )


def test_what_follows_the_last_turn_of_the_assistant_is_left_out() -> None:
    longer = [*CONVERSATION, {"role": "user", "content": "five"}]
    assert dataset_of({"messages": longer}).rows[0] == dataset_of({"messages": CONVERSATION}).rows[0]


# Keeps only the last turn's thoughts, as Qwen3's template does.
FORGETFUL = CHAT_TEMPLATE.replace(
    "message['content'] +", "(message['content'] if loop.last else message['content'].split('|')[-1]) +"
)


def test_a_turn_that_the_template_rewrites_later_gets_a_row_of_its_own() -> None:
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "hm|two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "five"},
        {"role": "assistant", "content": "so|six"},
    ]
    data = dataset_of({"messages": turns}, {"text": "a"}, tokenizer=tokenizer_of(template=FORGETFUL))
    assert [learned(row) for row in data.rows[:2]] == [
        ["hm|two<|im_end|>"],
        ["four<|im_end|>", "so|six<|im_end|>"],
    ]
    assert "assistant\ntwo<|im_end|>" in text_of(data.rows[1].token_ids)
    assert text_of(data.prompt_token_ids(0)) == "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    assert list(data.lines) == [1, 1, 2]
    assert data.completions == ("hm|two", "so|six", "")


def test_a_turn_that_the_template_strips_is_learned_stripped_and_in_the_same_row() -> None:
    stripping = CHAT_TEMPLATE.replace("message['content']", "message['content'].strip()")
    turns = [CONVERSATION[0], {"role": "assistant", "content": " two\n"}, *CONVERSATION[2:]]
    data = dataset_of({"messages": turns}, tokenizer=tokenizer_of(template=stripping))
    assert [learned(row) for row in data.rows] == [["two<|im_end|>", "four<|im_end|>"]]


def test_a_turns_end_is_learned_only_where_it_is_the_token_that_ends_a_generation() -> None:
    other_end = CHAT_TEMPLATE.replace("'<|im_end|>' + '\n'", "'</turn>'")
    data = dataset_of({"messages": CONVERSATION}, tokenizer=tokenizer_of(template=other_end))
    assert learned(data.rows[0]) == ["two", " four <|im_end|>"]


@given(
    contents=st.lists(st.text(st.sampled_from("ab \nthe.<|"), min_size=1, max_size=5), min_size=2, max_size=8)
)
def test_each_turn_is_learned_once_after_exactly_the_servers_prompt(contents: list[str]) -> None:
    contents = contents[: len(contents) // 2 * 2]
    turns = [ChatMessage(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    data = dataset_of({"messages": [{"role": each.role, "content": each.content} for each in turns]})
    found = []
    for row in data.rows:
        for place, is_target in enumerate(row.is_target):
            if is_target and not row.is_target[place - 1]:
                found.append(row.token_ids[:place])
    expected = [tuple(TOKENIZER.encode_chat(turns[:index])) for index in range(1, len(turns), 2)]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "has no value; it must have prompt and completion, or text, or messages"),
        ({"question": "a", "answer": "b"}, "has question, answer; it must have prompt and completion"),
        ({"text": "a", "id": 7}, "id: nothing reads it; remove it, or set `ignore_fields`"),
        ({"prompt": "a"}, "has a prompt but no completion"),
        ({"prompt": "a", "completion": None}, "has a prompt but no completion"),
        ({"completion": "a", "system": "b"}, "has a completion but no prompt"),
        ({"prompt": "a", "completion": ""}, "completion: is empty"),
        ({"prompt": "", "completion": "a"}, "prompt: is empty"),
        ({"prompt": "a", "completion": 1}, "completion: must be a string, not int"),
        ({"prompt": ["a"], "completion": "a"}, "prompt: must be a string, not list"),
        ({"prompt": "a", "completion": "b\ud800"}, "completion: has half a surrogate pair at character 2"),
        (
            {"prompt": "a", "completion": "b", "text": "c"},
            "has prompt+completion and text: which one is meant?",
        ),
        ({"text": "a", "messages": CONVERSATION}, "has text and messages: which one is meant?"),
        (
            {"prompt": "a", "completion": "b", "system": "c"},
            "system: does not apply to a plain-text prompt; set `chat`",
        ),
        ({"text": "a", "system": "b"}, "system: does not apply to a text"),
        ({"text": ""}, "text: is empty"),
        ({"text": True}, "text: must be a string, not bool"),
        ({"text": "<|im_end|>"}, "text: has no tokens to learn"),
        ({"messages": []}, "messages: none is the assistant's"),
        ({"messages": CONVERSATION[:1]}, "messages: none is the assistant's"),
        ({"messages": CONVERSATION[1:]}, "messages[0]: is the assistant's"),
        ({"messages": {"role": "user"}}, "messages: must be a list, not dict"),
        ({"messages": "hello"}, "messages: must be a list, or JSON of one"),
        ({"messages": "1"}, "messages: must be a list, not int"),
        (
            {"messages": f"[{'1' * 5000}]"},
            "messages: must be a list, or JSON of one: it has a number with too many digits",
        ),
        ({"messages": "[" * 100_000}, "messages: must be a list, or JSON of one: it is nested too deeply"),
        ({"messages": ["hello"]}, "messages[0]: must be an object with role and content, not str"),
        ({"messages": [{"from": "human", "value": "a"}]}, "messages[0]: has no role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]: has no content"),
        ({"messages": [{"role": "user", "content": [1]}]}, "messages[0].content: must be a string, not list"),
        ({"messages": [{"role": 1, "content": "a"}]}, "messages[0].role: must be a string, not int"),
        (
            {"messages": [CONVERSATION[0], {"role": "assistant", "content": ""}]},
            "messages[1].content: is empty",
        ),
        (
            {"messages": [CONVERSATION[0], {"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[1].tool_calls: the chat template does not read it",
        ),
        (
            {"messages": [{"role": "system", "content": "a"}, *CONVERSATION], "system": "b"},
            "system: messages begin with a system message too",
        ),
    ],
)
def test_a_row_that_cannot_be_learned_is_named_with_its_line(fields: dict[str, object], message: str) -> None:
    error = refusal({"text": "fine"}, fields)
    assert error.startswith("data.jsonl:2: ")
    assert message in error


def test_a_model_without_a_chat_template_is_told_where_a_row_needs_one() -> None:
    plain = tokenizer_of(template=None)
    assert refusal({"messages": CONVERSATION}, tokenizer=plain).startswith(
        "data.jsonl:1: chat: the model has no chat"
    )
    row = {"prompt": "a", "completion": "b"}
    assert "the model has no chat template" in refusal(row, tokenizer=plain, chat=True)
    assert len(dataset_of(row, tokenizer=plain).rows) == 1


def test_what_the_chat_template_refuses_is_named_with_its_line() -> None:
    strict = tokenizer_of(template="{{ raise_exception('roles must alternate') }}")
    assert "data.jsonl:1: chat: the chat template refused the messages: roles must alternate" in refusal(
        {"messages": CONVERSATION}, tokenizer=strict
    )


def test_a_system_message_that_would_go_unread_is_refused() -> None:
    assert "system: does not apply to a plain-text prompt" in refusal(
        {"prompt": "a", "completion": "b"}, system="c"
    )
    assert "system: does not apply to a text" in refusal({"text": "a"}, system="c")


LONG = {"prompt": "0123456789", "completion": "abc"}  # 14 tokens with the end
SHORT = {"prompt": "0", "completion": "a"}


def test_an_overlong_row_is_an_error_that_names_both_lengths() -> None:
    assert "data.jsonl:2: has 14 tokens; the limit is 13 (`max_length`)" in refusal(
        SHORT, LONG, max_length=13
    )
    assert len(dataset_of(SHORT, LONG, max_length=14).rows) == 2


def test_overlong_rows_are_skipped_and_counted() -> None:
    data = dataset_of(LONG, SHORT, LONG, max_length=13, overlong="skip")
    assert (len(data.rows), data.counts.skipped, list(data.lines)) == (1, 2, [2])
    assert (
        refusal(LONG, LONG, max_length=13, overlong="skip")
        == "data.jsonl: all 2 rows are longer than 13 tokens"
    )


@pytest.mark.parametrize(("max_length", "prompt"), [(13, "123456789"), (6, "89"), (5, "9")])
def test_truncation_keeps_a_completion_and_cuts_the_prompts_beginning(max_length: int, prompt: str) -> None:
    data = dataset_of(LONG, max_length=max_length, overlong="truncate")
    assert text_of(data.rows[0].token_ids) == f"{prompt}abc<|im_end|>"
    assert learned(data.rows[0]) == ["abc<|im_end|>"]
    assert text_of(data.prompt_token_ids(0)) == prompt
    assert (data.counts.skipped, data.counts.truncated) == (0, 1)


def test_a_completion_that_does_not_fit_is_skipped_by_truncation_too() -> None:
    data = dataset_of(LONG, SHORT, max_length=4, overlong="truncate")
    assert (len(data.rows), data.counts.skipped) == (1, 1)


def test_truncation_cuts_a_texts_end() -> None:
    data = dataset_of({"text": "abcdef"}, max_length=4, overlong="truncate")
    assert text_of(data.rows[0].token_ids) == "abcd"
    assert data.rows[0].is_target == (False, True, True, True)


def test_truncation_cuts_a_conversations_first_turns() -> None:
    whole = dataset_of({"messages": CONVERSATION}).rows[0]
    for max_length in range(2, len(whole.token_ids)):
        try:
            data = dataset_of({"messages": CONVERSATION}, max_length=max_length, overlong="truncate")
        except DataError:
            assert max_length <= len(" four ") + 1
            continue
        row = data.rows[0]
        assert row.token_ids == whole.token_ids[-max_length:]
        assert row.is_target[0] is False
        assert row.is_target[1:] == whole.is_target[-max_length + 1 :]
        assert learned(row)[-1] == " four <|im_end|>"


@given(st.lists(st.tuples(st.text("abc", min_size=1), st.text("xyz", min_size=1)), min_size=1, max_size=20))
def test_rows_come_back_from_memory_as_they_were_put_in(pairs: list[tuple[str, str]]) -> None:
    data = dataset_of(*({"prompt": prompt, "completion": completion} for prompt, completion in pairs))
    assert len(data.rows) == len(pairs)
    assert [text_of(row.token_ids) for row in data.rows] == [f"{a}{b}<|im_end|>" for a, b in pairs]
    assert [learned(row) for row in data.rows] == [[f"{b}<|im_end|>"] for _, b in pairs]
    assert [text_of(data.prompt_token_ids(i)) for i in range(len(pairs))] == [a for a, _ in pairs]
    assert data.rows.lengths.tolist() == [len(row.token_ids) for row in data.rows]
    assert data.rows.num_tokens == sum(len(row.token_ids) for row in data.rows)
    assert data.rows.num_targets == sum(row.num_targets for row in data.rows)
    assert data.rows[-1] == data.rows[len(pairs) - 1]
    assert data.rows[1:] == list(data.rows)[1:]
    with pytest.raises(IndexError):
        data.rows[len(pairs)]


def labelled(*completions: str, labels: Sequence[str] = ()) -> Dataset:
    return dataset_of(*({"prompt": "q", "completion": each} for each in completions), labels=labels)


def test_labels_are_those_given_or_the_distinct_completions() -> None:
    train = labelled(" yes", " no", " yes")
    assert find_labels(("auto",), train) == (" no", " yes")
    assert find_labels((" b", " a"), train) == (" b", " a")
    assert find_labels((), train) == ()


def test_labels_are_bounded() -> None:
    many = [f" {index}" for index in range(257)]
    assert len(find_labels(("auto",), labelled(*many[:256]))) == 256
    with pytest.raises(DataError, match=r"data\.jsonl:257: .* takes 256"):
        find_labels(("auto",), labelled(*many))
    with pytest.raises(SettingError, match="at most 256, not 257"):
        find_labels(tuple(many), labelled("a"))


def test_labels_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(SettingError, match="labels: ' a' appears twice"):
        find_labels((" a", " a"), labelled("a"))
    with pytest.raises(SettingError, match="labels: '' has no tokens"):
        labelled("a", labels=[""])
    with pytest.raises(SettingError, match=r"'a' and 'a<\|im_end\|>' have the same tokens"):
        labelled("a", labels=["a", "a<|im_end|>"])


def test_a_row_whose_completion_is_no_label_is_named() -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:2: its completion ' maybe' is not one of the 2 labels"):
        labelled_items(labelled(" yes", " maybe"), (" yes", " no"))
    with pytest.raises(DataError, match=r"data\.jsonl:1: has no completion to be a label"):
        find_labels(("auto",), dataset_of({"text": "a"}))


def test_labelled_items_keep_the_rows_order() -> None:
    labels = (" a", " b")
    items = labelled_items(labelled(" b", " a", " b", labels=labels), labels)
    assert [item.label for item in items] == [" b", " a", " b"]
    assert {item.prompt_token_ids for item in items} == {
        tuple(TOKENIZER.encode("q", add_special_tokens=True))
    }


@pytest.mark.parametrize(
    ("template", "eos_token_ids", "expected"),
    [
        (CHAT_TEMPLATE, {0, 1, 2}, 2),
        (CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>"), {0, 2}, 0),
        (CHAT_TEMPLATE.replace("<|im_end|>", "</s>"), {0, 2}, 2),
        ("{{ raise_exception('no') }}", {0, 2}, 2),
        (None, {0, 2}, 2),
        (None, {0, 1}, 0),
    ],
)
def test_a_completion_ends_as_the_templates_turns_do_else_with_the_models_eos(
    template: str | None, eos_token_ids: set[int], expected: int
) -> None:
    assert find_ends(tokenizer_of(template=template), eos_token_ids).token_id == expected


def test_a_base_without_an_end_is_refused() -> None:
    with pytest.raises(ModelError, match="eos_token_id"):
        find_ends(TOKENIZER, frozenset())


@pytest.mark.real_model
def test_the_default_models_conversations_are_one_row_as_transformers_renders_them() -> None:
    from transformers import AutoTokenizer

    directory: Path = default_model_directory()
    tokenizer = Tokenizer.from_directory(directory)
    assert find_ends(tokenizer, {2}).token_id == 2
    data = dataset_of({"messages": CONVERSATION}, tokenizer=tokenizer)
    reference = cast(Any, AutoTokenizer).from_pretrained(directory)
    text = reference.apply_chat_template(CONVERSATION, tokenize=False)
    assert len(data.rows) == 1
    assert reference.decode(data.rows[0].token_ids) == text.removesuffix("\n")
    assert data.rows[0].num_targets == len(reference.encode("two")) + len(reference.encode(" four ")) + 2


USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
HO = {"role": "assistant", "content": "Ho"}
PROMPTED = {"prompt": "Hi", "completion": "Ho"}


@pytest.mark.parametrize(
    ("rows", "is_chat", "form"),
    [
        ([PROMPTED, PROMPTED], False, PromptForm(is_chat=False)),
        ([PROMPTED], True, PromptForm(is_chat=True)),
        ([{"system": "Be brief.", **PROMPTED}], True, PromptForm(is_chat=True, system="Be brief.")),
        ([{"messages": [SYSTEM, USER, HO]}], False, PromptForm(is_chat=True, system="Be brief.")),
        ([{"messages": [USER, HO]}, PROMPTED], True, PromptForm(is_chat=True)),
        ([{"messages": [USER, HO]}, PROMPTED], False, None),
        ([{"messages": [SYSTEM, USER, HO]}, {"messages": [USER, HO]}], False, None),
        ([{"messages": [USER, HO, USER, HO]}], False, None),
        ([{"messages": [USER, USER, HO]}], False, None),
        ([{"text": "Hi Ho"}], False, None),
    ],
)
def test_how_prompts_are_made_of_one_text(
    rows: Sequence[Mapping[str, object]], is_chat: bool, form: PromptForm | None
) -> None:
    assert dataset_of(*rows, chat=is_chat).form == form
