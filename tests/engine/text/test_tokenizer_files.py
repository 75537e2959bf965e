"""Directories whose files disagree or are older, read as transformers' ``AutoTokenizer`` reads them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from manyhats.engine.errors import ModelError
from manyhats.engine.text.tokenizer import ChatMessage, Tokenizer
from manyhats.engine.text.tokenizer_files import TEXT_FILES, read_text_files
from support.factories import tokenizer_directories as directories
from support.factories.tiny_models import save_tokenizer, tiny_tokenizer

SEEDS = 24


def assert_reads_alike(ours: Tokenizer, theirs: Any) -> None:
    """Ids, decoded text, special ids, template variables and chats are the same."""
    for text in directories.TEXTS:
        for add_special_tokens in (False, True):
            ids = theirs.encode(text, add_special_tokens=add_special_tokens)
            assert ours.encode(text, add_special_tokens=add_special_tokens) == ids, text
            whole = theirs.decode(ids, skip_special_tokens=True)
            assert ours.decode(ids) == whole, text
            stream = ours.stream()
            assert "".join([stream.push(token_id) for token_id in ids]) + stream.flush() == whole, text
    for name in directories.NAMES:
        literal = theirs.special_tokens_map.get(name)
        assert ours.special_token_id(name) == (literal and theirs.convert_tokens_to_ids(literal)), name
    for chat in directories.CHATS:
        rendered = theirs.apply_chat_template(
            list(chat), chat_template=directories.TEMPLATE, add_generation_prompt=True, return_dict=False
        )
        messages = [ChatMessage(**message) for message in chat]
        assert ours.encode_chat(messages, directories.TEMPLATE) == rendered
    assert ours.vocab_size == len(theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("source", sorted(directories.SOURCES))
def test_files_that_disagree_are_read_as_transformers_reads_them(
    tmp_path: Path, source: str, seed: int
) -> None:
    directories.make(tmp_path, source, seed)
    assert_reads_alike(Tokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", directories.MODEL_TYPES)
@pytest.mark.parametrize("kind", range(len(directories.KINDS)))
@pytest.mark.parametrize("legacy", [None, True])
def test_a_model_class_is_set_up_as_transformers_sets_it_up(
    tmp_path: Path, model_type: str, kind: int, legacy: bool | None
) -> None:
    directories.make(tmp_path, "added_tokens_decoder", kind)
    config = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    named = directories.CLASS_OF_MODEL[model_type]
    config |= {"tokenizer_class": named} | ({} if legacy is None else {"legacy": legacy})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert_reads_alike(Tokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path))


def test_files_contents_make_the_tokenizer_of_their_directory(tmp_path: Path) -> None:
    directories.make(tmp_path, "added_tokens", 3)
    files = read_text_files(tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json", "added_tokens.json"} <= set(files) <= set(TEXT_FILES)
    ours, theirs = Tokenizer.from_files(files, "somewhere"), Tokenizer.from_directory(tmp_path)
    for text in directories.TEXTS:
        ids = ours.encode(text, add_special_tokens=True)
        assert ids == theirs.encode(text, add_special_tokens=True)
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", {"eos_token": 2}, r"eos_token must be a string, or an object with content"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, r"added_tokens_decoder: 'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"3": {}}}, r"added_tokens_decoder\.3 is not a"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, r"added_tokens_decoder must be an object"),
        ("tokenizer_config.json", {"extra_special_tokens": "<a>"}, r"extra_special_tokens must be a list"),
        ("tokenizer_config.json", {"extra_special_tokens": [3]}, r"extra_special_tokens must be a string"),
        ("tokenizer_config.json", {"tokenizer_class": 3}, r"tokenizer_class must be a string, not 3"),
        ("special_tokens_map.json", {"eos_token": {"content": 1}}, r"eos_token is not a token"),
        ("special_tokens_map.json", [], r"not a JSON object"),
        ("added_tokens.json", {"<a>": "x"}, r"'<a>': its id must be an integer, not 'x'"),
        ("config.json", {"model_type": 1}, r"model_type must be a string"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_by_file_and_field(
    tmp_path: Path, name: str, content: object, message: str
) -> None:
    save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message) as caught:
        Tokenizer.from_directory(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "special_tokens_map.json"])
def test_special_tokens_that_older_libraries_saved_as_objects_without_type_are_read(
    tmp_path: Path, place: str
) -> None:
    # transformers fails on these; the tokens that they mean are plain all the same.
    save_tokenizer(tmp_path)
    content = {
        "eos_token": {"content": "</s>"},
        "additional_special_tokens": [{"content": "<a>", "lstrip": True}],
    }
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / place).write_text(json.dumps(content))
    tokenizer = Tokenizer.from_directory(tmp_path)
    ids = tokenizer.encode("x <a></s>", add_special_tokens=False)
    assert len(ids) == 3
    assert ids[2] == tokenizer.special_token_id("eos_token")
    assert tokenizer.decode(ids) == "x"


def test_a_vocabulary_without_its_unknown_token_is_read_and_fails_on_what_it_lacks_alone(
    tmp_path: Path,
) -> None:
    backend = Backend(models.BPE(vocab={"<bos>": 0, "h": 1, "i": 2, "hi": 3}, merges=[("h", "i")]))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer"}))
    ours, theirs = Tokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("hi<eos>", add_special_tokens=True) == theirs.encode("hi<eos>")
    with pytest.raises(Exception, match="Unk token"):
        theirs.encode("x")


def test_code_that_a_tokenizer_names_is_never_run(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}})
    )
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')\n")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the cat", add_special_tokens=True)) == "the cat"


def test_a_token_that_was_special_once_is_skipped_by_streams_as_by_decoding(tmp_path: Path) -> None:
    backend = tiny_tokenizer()
    backend.add_tokens([AddedToken("<a>", special=True)])
    table = {"267": {"content": "<a>", "special": False}}
    save_tokenizer(tmp_path, backend, added_tokens_decoder=table)
    tokenizer = Tokenizer.from_directory(tmp_path)
    ids = tokenizer.encode("x<a>y", add_special_tokens=False)
    assert tokenizer.decode(ids) == "xy"
    stream = tokenizer.stream()
    assert [*(stream.push(token_id) for token_id in ids), stream.flush()] == ["x", "", "y", ""]


def test_reading_the_served_families_tokenizers_imports_no_transformers(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from manyhats.engine.text.tokenizer import Tokenizer\n"
        "[Tokenizer.from_directory(path) for path in Path(sys.argv[1]).iterdir()]\n"
        "print('transformers' in sys.modules)"
    )
    for model_type, name in directories.CLASS_OF_MODEL.items():
        directory = tmp_path / model_type
        directories.make(directory, "added_tokens_decoder", 0)
        config = json.loads((directory / "tokenizer_config.json").read_bytes())
        (directory / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": name}))
        (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "False"
