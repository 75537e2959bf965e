from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer

from manyhats.engine.errors import FieldInvalidError, ModelError
from manyhats.engine.text.tokenizer import ChatMessage, Tokenizer
from support.factories.default_model import default_model_directory
from support.factories.tiny_models import CHAT_TEMPLATE, save_tokenizer, tiny_tokenizer
from support.oracles.golden import GOLDEN, needs_golden

TALK = (
    ChatMessage("system", "Be brief."),
    ChatMessage("user", "What is é?"),
    ChatMessage("assistant", "A letter."),
    ChatMessage("user", " And\n€? "),
)


@pytest.fixture
def tiny(tmp_path: Path) -> Tokenizer:
    save_tokenizer(tmp_path)
    return Tokenizer.from_directory(tmp_path)


def theirs_of(directory: Path) -> Any:
    # A class that takes tokenizer.json as it is, whatever the model next to it.
    return AutoTokenizer.from_pretrained(directory)


def edit_config(directory: Path, **fields: object) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **fields}))


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_decode_undoes_encode(text: str) -> None:
    tokenizer = Tokenizer(tiny_tokenizer(), special_tokens={})
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=True)) == text


def test_decode_skips_special_tokens_and_encode_reads_their_literals(tiny: Tokenizer) -> None:
    ids = tiny.encode("a<|im_end|>b", add_special_tokens=False)
    assert 2 in ids
    assert tiny.decode(ids) == "ab"
    assert tiny.piece(2) == "<|im_end|>"


def test_pieces_and_stream_are_the_detokenizers(tiny: Tokenizer) -> None:
    stream = tiny.stream()
    ids = tiny.encode("the €", add_special_tokens=False)
    assert "".join(stream.push(token_id) for token_id in ids) + stream.flush() == "the €"
    assert tiny.vocab_size == 267


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"bos_token": {"content": "<|im_start|>", "__type": "AddedToken"}},
        {"eos_token": "</new>"},
    ],
)
@pytest.mark.parametrize("has_template", [False, True])
def test_special_tokens_are_added_as_transformers_adds_them(
    tmp_path: Path, config: dict[str, Any], has_template: bool
) -> None:
    backend = tiny_tokenizer()
    if has_template:
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    save_tokenizer(tmp_path, backend, **config)
    ours, theirs = Tokenizer.from_directory(tmp_path), theirs_of(tmp_path)
    text = "the cat</new><|im_end|>"
    for add_special_tokens in (False, True):
        ids = ours.encode(text, add_special_tokens=add_special_tokens)
        assert ids == theirs.encode(text, add_special_tokens=add_special_tokens)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_truncation_and_padding_of_the_file_are_left_out(tmp_path: Path) -> None:
    backend = tiny_tokenizer()
    backend.enable_truncation(3)
    backend.enable_padding(length=20)
    save_tokenizer(tmp_path, backend)
    assert len(Tokenizer.from_directory(tmp_path).encode("abcdef", add_special_tokens=False)) == 6


def test_named_special_token_that_the_file_calls_ordinary_is_special(tmp_path: Path) -> None:
    backend = tiny_tokenizer()
    backend.add_tokens(["<end>"])
    save_tokenizer(tmp_path, backend, eos_token="<end>")
    tokenizer = Tokenizer.from_directory(tmp_path)
    end = tokenizer.special_token_id("eos_token")
    assert end is not None
    assert tokenizer.decode([end]) == ""
    assert tokenizer.stream().push(end) == ""


def test_chat_is_rendered_as_transformers_renders_it(tiny: Tokenizer, tmp_path: Path) -> None:
    theirs = theirs_of(tmp_path).apply_chat_template(
        [{"role": m.role, "content": m.content} for m in TALK], add_generation_prompt=True, return_dict=False
    )
    assert tiny.encode_chat(TALK) == theirs


TEMPLATES: Mapping[str, str] = {
    "trimmed blocks": (
        "{% for m in messages %}\n  {% if m.role == 'user' %}\nU:{{ m.content }}\n  {% endif %}\n{% endfor %}"
    ),
    "special tokens": "{{ bos_token }}{{ messages[-1]['content'] }}{{ eos_token }}{{ cls_token }}",
    "json": "{{ messages | tojson }}{{ {'b': 1, 'a': '<é>'} | tojson(indent=1, sort_keys=true) }}",
    "loop controls": (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }},{% endfor %}"
    ),
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": (
        "{% set n = namespace(c=0) %}{% for m in messages %}{% set n.c = n.c + 1 %}{% endfor %}{{ n.c }}"
    ),
    "dictionaries": "{% set d = dict(a=1, b='x') %}{{ d.b }}{{ dict.fromkeys(['k'], 2)['k'] }}",
    "no tools": "{% if tools is none and not documents %}none{% endif %}{{ add_generation_prompt }}",
}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_other_template_is_rendered_as_transformers_renders_it(
    tiny: Tokenizer, tmp_path: Path, name: str
) -> None:
    theirs = theirs_of(tmp_path).apply_chat_template(
        [{"role": m.role, "content": m.content} for m in TALK],
        chat_template=TEMPLATES[name],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert tiny.encode_chat(TALK, TEMPLATES[name]) == theirs


@pytest.mark.parametrize("place", ["file", "string", "list", "none"])
def test_template_is_found_wherever_checkpoints_keep_it(tmp_path: Path, place: str) -> None:
    save_tokenizer(tmp_path)
    edit_config(
        tmp_path,
        chat_template={
            "file": "not this",
            "string": CHAT_TEMPLATE,
            "list": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHAT_TEMPLATE}],
            "none": None,
        }[place],
    )
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.chat_template == (None if place == "none" else CHAT_TEMPLATE)


def test_chat_without_a_template_names_the_field(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(FieldInvalidError, match="chat: the model has no chat template") as caught:
        Tokenizer.from_directory(tmp_path).encode_chat(TALK)
    assert caught.value.field == "chat"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected"),
        ("{{ messages[9].content.strip() }}", "chat template refused"),
        ("{{ ().__class__.__bases__[0].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", r"unsafe|not safely callable"),
        ("{{ 1 / 0 }}", "division"),
        ("{% set n = namespace(_x=1) %}", "underscored name '_x'"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "underscored name '__class__'"),
        ("{{ range(10 ** 9) | list }}", "too big"),
    ],
)
def test_template_that_fails_is_the_requests_error(tiny: Tokenizer, template: str, message: str) -> None:
    with pytest.raises(FieldInvalidError, match=message):
        tiny.encode_chat(TALK, template)


def test_chat_without_messages_is_refused(tiny: Tokenizer) -> None:
    with pytest.raises(FieldInvalidError, match="has no messages"):
        tiny.encode_chat(())


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff"])
def test_tokenizer_that_cannot_be_read_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)


def test_config_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    for content in (b"{", b"[]"):
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
            Tokenizer.from_directory(tmp_path)


@needs_golden
@pytest.mark.real_model
def test_default_model_reads_the_golden_prompts() -> None:
    tokenizer = Tokenizer.from_directory(default_model_directory())
    prompts = json.loads((GOLDEN / "base" / "manifest.json").read_bytes())["prompts"]
    for prompt in prompts:
        assert tokenizer.encode(prompt["text"], add_special_tokens=True) == prompt["ids"]
    chat = (
        ChatMessage("system", "Answer in one short sentence."),
        ChatMessage("user", "Why do leaves change colour in autumn?"),
    )
    assert tokenizer.encode_chat(chat) == prompts[2]["ids"]
    assert tokenizer.special_token_id("eos_token") == 2
