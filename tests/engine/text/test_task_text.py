"""Text files of adapters on a base's tokenizer: read as AutoTokenizer reads them, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from manyhats.adapters.errors import AdapterInvalidError, AdapterTooLargeError, AdapterUnsupportedError
from manyhats.adapters.formats.text_files import MAX_BYTES, check_rows
from manyhats.adapters.sites import TextFacts
from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.text.chat_template import render_chat
from manyhats.engine.text.task_text import TaskTexts
from manyhats.engine.text.text_process import TextProcesses
from manyhats.engine.text.tokenizer import ChatMessage
from manyhats.engine.text.tokenizer import Tokenizer as BaseTokenizer
from support.factories.tiny_models import CHAT_TEMPLATE, TINY_VOCAB_SIZE, save_tokenizer, tiny_tokenizer

OWN_TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}<tool>"
)
TEXTS = (
    "hello <tool> the world<tool>",
    "a<|a|>b <|a|> c",
    "x <|im_end|> y<|call|>(1)",
    "foo bar foobar FOO bar",
    "the <|im_start|>the",
    " <tool> <|a|>  ",
    "été € 😀 日本",
)
MESSAGES = [{"role": "user", "content": "hi <tool>"}, {"role": "assistant", "content": "<|a|> yes"}]

Write = Callable[[Path], None]


@pytest.fixture(scope="module")
def processes() -> Iterator[TextProcesses]:
    made = TextProcesses()
    yield made
    made.close()


@pytest.fixture(scope="module")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def texts(base_directory: Path, processes: TextProcesses) -> TaskTexts:
    return TaskTexts(BaseTokenizer.from_directory(base_directory), processes)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name in MAX_BYTES}


def auto_tokenizer(directory: Path) -> Any:
    transformers: Any = import_module("transformers")
    return transformers.AutoTokenizer.from_pretrained(directory)


def backend(*added: AddedToken, special: tuple[str, ...] = (), ordinary: tuple[str, ...] = ()) -> Tokenizer:
    made = tiny_tokenizer()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    made.add_tokens([AddedToken(text, normalized=False) for text in ordinary])
    made.add_tokens(list(added))
    return made


def saved(*added: AddedToken, config: Mapping[str, Any] | None = None, **tokens: tuple[str, ...]) -> Write:
    return lambda path: save_tokenizer(path, backend(*added, **tokens), **(config or {}))


def saved_by_transformers(change: Callable[[Any], object], **config: Any) -> Write:
    def write(path: Path) -> None:
        save_tokenizer(path, **config)
        tokenizer = auto_tokenizer(path)
        change(tokenizer)
        tokenizer.save_pretrained(path)

    return write


def with_files(write: Write, **contents: str) -> Write:
    def both(path: Path) -> None:
        write(path)
        for name, content in contents.items():
            suffix = ".jinja" if name == "chat_template" else ".json"
            (path / (name + suffix)).write_text(content, encoding="utf-8")

    return both


OWN: dict[str, Write] = {
    "a special token": saved(special=("<|a|>",)),
    "an ordinary token": saved(ordinary=("<tool>",)),
    "both": saved(special=("<|a|>",), ordinary=("<tool>",)),
    "many": saved(special=tuple(f"<|{n}|>" for n in range(20)), ordinary=("<tool>", "foo", "bar")),
    "lstrip": saved(AddedToken("<tool>", lstrip=True)),
    "rstrip": saved(AddedToken("<|a|>", rstrip=True, special=True)),
    "lstrip and rstrip": saved(AddedToken("<|a|>", rstrip=True, lstrip=True)),
    "single word": saved(AddedToken("foo", single_word=True), AddedToken("bar", single_word=True)),
    "normalized": saved(AddedToken("<tool>", normalized=True), AddedToken("FOO", normalized=True)),
    "white space in it": saved(AddedToken(" <tool>"), AddedToken("foo bar")),
    "other scripts": saved(AddedToken("日本"), AddedToken("été"), AddedToken("😀", special=True)),
    "an own end of sequence": saved(special=("<|call|>",), config={"eos_token": "<|call|>"}),
    "an end of sequence of the base's tokens": saved(config={"eos_token": "<|endoftext|>"}),
    "a token of the vocabulary made special": saved(AddedToken("the", special=True)),
    "extra_special_tokens": saved(special=("<|a|>",), config={"extra_special_tokens": ["<|a|>"]}),
    "a named token": saved(special=("<|call|>",), config={"call_token": "<|call|>"}),
    "added_tokens_decoder": saved(
        ordinary=("<tool>",),
        config={
            "added_tokens_decoder": {
                "267": {"content": "<tool>", "special": True, "normalized": False, "lstrip": True}
            }
        },
    ),
    "added_tokens.json alone": with_files(saved(), added_tokens='{"<tool>": 267, "<|a|>": 268}'),
    "special_tokens_map.json": with_files(
        saved(special=("<|a|>",)), special_tokens_map='{"eos_token": "<|a|>", "bos_token": "<|im_end|>"}'
    ),
    "saved with added tokens": saved_by_transformers(
        lambda made: (made.add_tokens(["<tool>", "foo"]), made.add_special_tokens({"eos_token": "<|call|>"}))
    ),
    "saved with a template": saved_by_transformers(lambda made: setattr(made, "chat_template", OWN_TEMPLATE)),
    "a template's file": with_files(saved(), chat_template=OWN_TEMPLATE),
    "a template in the config": saved(ordinary=("<tool>",), config={"chat_template": OWN_TEMPLATE}),
    "named templates": saved(
        config={
            "chat_template": [
                {"name": "tool_use", "template": "no"},
                {"name": "default", "template": OWN_TEMPLATE},
            ]
        }
    ),
    "a file before the config": with_files(
        saved(ordinary=("<tool>",), config={"chat_template": "no"}), chat_template=OWN_TEMPLATE
    ),
}


@pytest.mark.parametrize("write", OWN.values(), ids=OWN.keys())
def test_an_adapters_own_text_is_what_auto_tokenizer_makes_of_it(
    texts: TaskTexts, tmp_path: Path, write: Write
) -> None:
    write(tmp_path)
    ours, theirs = texts.read(files_of(tmp_path)).tokenizer, auto_tokenizer(tmp_path)
    assert ours is not texts.base
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=True)["input_ids"]
        assert ours.encode(text, add_special_tokens=True) == ids
        assert [ours.piece(token_id) for token_id in ids] == [theirs.decode([token_id]) for token_id in ids]
        for skip in (True, False):
            stream = ours.stream(skip_special_tokens=skip)
            assert "".join(map(stream.push, ids)) + stream.flush() == theirs.decode(
                ids, skip_special_tokens=skip
            )
    assert ours.encode_chat([ChatMessage(**each) for each in MESSAGES]) == theirs.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    assert ours.eos_token_ids == {theirs.eos_token_id}
    assert ours.vocab_size == len(theirs)


def pretty(path: Path) -> None:
    content = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(content, indent=7, sort_keys=True))


def older_merges(path: Path) -> None:
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    del content["model"]["ignore_merges"]
    (path / "tokenizer.json").write_text(json.dumps(content))


def padded(path: Path) -> None:
    made = Tokenizer.from_file(str(path / "tokenizer.json"))
    made.enable_padding(pad_id=2, pad_token="<|im_end|>")
    made.enable_truncation(8)
    made.save(str(path / "tokenizer.json"))


def offsets(path: Path) -> None:
    made = Tokenizer.from_file(str(path / "tokenizer.json"))
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    made.save(str(path / "tokenizer.json"))


SAME: dict[str, Callable[[Path], object]] = {
    "the same bytes": lambda path: None,
    "laid out otherwise": pretty,
    "merges in one string": older_merges,
    "padding and truncation": padded,
    "offsets": offsets,
    "saved by transformers": lambda path: auto_tokenizer(path).save_pretrained(path),
    "a special token that the file calls ordinary": lambda path: save_tokenizer(
        path, backend(AddedToken("<|im_end|>", special=False, normalized=False))
    ),
    "another pad token": lambda path: save_tokenizer(path, pad_token="<|endoftext|>", model_max_length=7),
    "no files but the base's template": lambda path: (
        (path / "tokenizer.json").unlink(),
        (path / "tokenizer_config.json").unlink(),
        (path / "chat_template.jinja").write_text(CHAT_TEMPLATE),
    ),
    "the template alone in the config": lambda path: (
        (path / "tokenizer.json").unlink(),
        (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE})),
    ),
    "no template": lambda path: save_tokenizer(path, chat_template=None),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME.keys())
def test_a_copy_of_the_bases_tokenizer_means_nothing_of_its_own(
    texts: TaskTexts, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    save_tokenizer(tmp_path)
    change(tmp_path)
    read = texts.read(files_of(tmp_path))
    assert read.facts == TextFacts()
    assert read.tokenizer is texts.base


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer"])
@pytest.mark.parametrize("adds", [False, True])
def test_bases_of_classes_that_rebuild_their_tokenizer_know_their_own_again(
    tmp_path: Path, processes: TextProcesses, tokenizer_class: str, adds: bool
) -> None:
    made = tiny_tokenizer()
    if tokenizer_class == "LlamaTokenizer":
        words = [
            "<unk>",
            "<s>",
            "</s>",
            *(f"<0x{byte:02X}>" for byte in range(256)),
            "▁",
            "t",
            "h",
            "th",
            "▁th",
        ]
        merges = [("t", "h"), ("▁", "th")]
        vocabulary = {word: i for i, word in enumerate(words)}
        made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
        made.add_special_tokens([AddedToken(text, special=True) for text in words[:3]])
    literals = (
        ("<s>", "</s>", "<unk>")
        if "Llama" in tokenizer_class
        else ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    )
    names = dict(zip(("bos_token", "eos_token", "unk_token"), literals, strict=True))
    base = tmp_path / "base"
    base.mkdir()
    save_tokenizer(base, made, tokenizer_class=tokenizer_class, pad_token=literals[1], **names)
    texts = TaskTexts(BaseTokenizer.from_directory(base), processes)
    theirs = auto_tokenizer(base)
    if adds:
        theirs.add_tokens(["<tool>"])
    theirs.save_pretrained(tmp_path / "adapter")
    read = texts.read(files_of(tmp_path / "adapter"))
    assert bool(read.facts.fingerprint) is adds
    again = auto_tokenizer(tmp_path / "adapter")
    for text in ("th <tool>th", " th  x", literals[1] + "th"):
        assert read.tokenizer.encode(text, add_special_tokens=True) == again(text)["input_ids"]


def changed(change: Callable[[Tokenizer], object]) -> Write:
    def write(path: Path) -> None:
        made = tiny_tokenizer()
        change(made)
        save_tokenizer(path, made)

    return write


def edited(edit: Callable[[dict[str, Any]], object]) -> Write:
    def write(path: Path) -> None:
        save_tokenizer(path)
        content = json.loads((path / "tokenizer.json").read_text())
        edit(content)
        (path / "tokenizer.json").write_text(json.dumps(content))

    return write


def swap(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def unigram(path: Path) -> None:
    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))
    save_tokenizer(path, made)


OTHER: dict[str, tuple[Write, str]] = {
    "another id": (edited(swap), "model.vocab has '"),
    "another token": (edited(lambda content: content["model"]["vocab"].update({"zz": 267})), "has 'zz'"),
    "a token less": (edited(lambda content: content["model"]["merges"].pop()), "model.merges has 7"),
    "merges in another order": (
        edited(lambda content: content["model"]["merges"].reverse()),
        "model.merges[0]",
    ),
    "another normalizer": (
        changed(lambda made: setattr(made, "normalizer", normalizers.Lowercase())),
        "normalizer",
    ),
    "another pre-tokenizer": (
        changed(lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))),
        "pre_tokenizer",
    ),
    "another decoder": (changed(lambda made: setattr(made, "decoder", decoders.Fuse())), "decoder"),
    "another post-processor": (
        changed(
            lambda made: setattr(
                made,
                "post_processor",
                processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]),
            )
        ),
        "post_processor",
    ),
    "another kind": (unigram, "model.type is 'Unigram', the base's 'BPE'"),
}


@pytest.mark.parametrize(("write", "difference"), OTHER.values(), ids=OTHER.keys())
def test_another_tokenizer_is_refused_and_the_first_difference_named(
    texts: TaskTexts, tmp_path: Path, write: Write, difference: str
) -> None:
    write(tmp_path)
    with pytest.raises(AdapterUnsupportedError) as refused:
        texts.read(files_of(tmp_path))
    assert refused.value.subject == "tokenizer.json"
    assert refused.value.description.startswith("is not the base's tokenizer plus added tokens: ")
    assert difference in refused.value.description


def test_tokens_beyond_the_embedding_are_refused_by_name(texts: TaskTexts, tmp_path: Path) -> None:
    room = TINY_VOCAB_SIZE - texts.base.vocab_size
    save_tokenizer(tmp_path, backend(ordinary=tuple(f"<{n}>" for n in range(room))))
    read = texts.read(files_of(tmp_path))
    assert read.tokenizer.vocab_size == read.facts.num_ids == TINY_VOCAB_SIZE
    check_rows(read.facts, TINY_VOCAB_SIZE)
    save_tokenizer(tmp_path, backend(ordinary=tuple(f"<{n}>" for n in range(room + 1))))
    facts = texts.check(files_of(tmp_path))
    check_rows(facts, TINY_VOCAB_SIZE + 1)
    with pytest.raises(AdapterUnsupportedError, match=f"adds '<{room}>' with the id 320, .* have 320 rows"):
        check_rows(facts, TINY_VOCAB_SIZE)


@pytest.mark.parametrize(
    ("files", "subject", "problem"),
    [
        ({"chat_template.jinja": "{% for %}"}, "chat_template.jinja", "line 1"),
        ({"chat_template.jinja": "\n\n{{ unclosed"}, "chat_template.jinja", "line 3"),
        ({"chat_template.jinja": "{{ a" + "(" * 5000}, "chat_template.jinja", "not compile"),
        ({"chat_template.jinja": "{% bogus %}"}, "chat_template.jinja", "bogus"),
        ({"tokenizer_config.json": '{"chat_template": "{% if %}"}'}, "tokenizer_config.json", "not compile"),
        ({"tokenizer.json": "{}"}, "tokenizer.json", ""),
        ({"tokenizer.json": "no JSON"}, "tokenizer.json", "not JSON"),
        ({"tokenizer.json": "[" * 100_000}, "tokenizer.json", ""),
        ({"tokenizer_config.json": '{"eos_token": 7}'}, "tokenizer_config.json", "eos_token"),
        ({"tokenizer_config.json": '{"added_tokens_decoder": []}'}, "tokenizer_config.json", ""),
        ({"added_tokens.json": '{"<tool>": "x"}'}, "added_tokens.json", "<tool>"),
        ({"special_tokens_map.json": '{"eos_token": {"lstrip": true}}'}, "special_tokens_map.json", ""),
        (
            {"tokenizer.json": '{"added_tokens": [{"id": 269, "content": "\\ud800"}]}'},
            "tokenizer.json",
            "U+D800",
        ),
        ({"tokenizer_config.json": '{"chat_template": "a\\uDFFF"}'}, "tokenizer_config.json", "U+DFFF"),
        ({"tokenizer_config.json": '{"eos_token": "\\udabcx"}'}, "tokenizer_config.json", "U+DABC"),
        ({"special_tokens_map.json": '{"\\ud800": "x"}'}, "special_tokens_map.json", "U+D800"),
        ({"added_tokens.json": '{"\\ud83d": 267}'}, "added_tokens.json", "half of a surrogate pair"),
    ],
)
def test_files_that_cannot_be_used_are_refused_by_name(
    texts: TaskTexts, files: Mapping[str, str], subject: str, problem: str
) -> None:
    with pytest.raises(AdapterInvalidError) as refused:
        texts.read({name: content.encode() for name, content in files.items()})
    assert refused.value.subject == subject
    assert problem in refused.value.description


def test_a_template_over_the_limit_is_refused_wherever_it_stands(texts: TaskTexts) -> None:
    template = "x" * (MAX_BYTES["chat_template.jinja"] + 1)
    for files in (
        {"chat_template.jinja": template.encode()},
        {"tokenizer_config.json": json.dumps({"chat_template": template}).encode()},
    ):
        with pytest.raises(AdapterTooLargeError):
            texts.read(files)


def test_notes_say_what_is_a_tasks_own(texts: TaskTexts, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, backend(special=("<|call|>",)), eos_token="<|call|>", chat_template=OWN_TEMPLATE)
    assert texts.read(files_of(tmp_path)).facts.notes == (
        "has a chat template of its own",
        "adds 1 tokens to the base's",
        "its answers also end with '<|call|>'",
    )


def test_files_that_mean_the_same_have_one_fingerprint(texts: TaskTexts, tmp_path: Path) -> None:
    fingerprints = set()
    for number, pad in enumerate(("<|im_end|>", "<|endoftext|>")):
        directory = tmp_path / str(number)
        directory.mkdir()
        save_tokenizer(directory, backend(ordinary=("<tool>",)), pad_token=pad)
        fingerprints.add(texts.read(files_of(directory)).facts.fingerprint)
    assert len(fingerprints) == 1


HOSTILE = {
    "an endless loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "doubling text": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a long repetition": "{{ 'a' * 10 ** 11 }}",
    "a wide format": "{{ '%999999999999d' % 1 }}",
    "a large number": "{{ 10 ** (10 ** 10) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "much output": "{% for a in range(99999) %}{{ messages[0].content * 100 }}{% endfor %}",
    "an exception": "{{ raise_exception('only in pairs') }}",
    "an undefined name": "{{ messages[7].content.nothing }}",
    "Python's insides": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_strangers_template_is_bounded_and_its_faults_are_the_requests(
    processes: TextProcesses, template: str
) -> None:
    with pytest.raises(FieldInvalidError) as refused:
        processes.render(template, [ChatMessage("user", "hello " * 20)], {})
    assert refused.value.field == "chat"
    assert processes.render("{{ messages[0].content }}", [ChatMessage("user", "well")], {}) == "well"


HALVES = [0xD800, 0xD801, 0xD83D, 0xDABC, 0xDBFF, 0xDC00, 0xDE00, 0xDFFF]
WRITERS = {
    "alone": '{{ "\\uHALF" }}',
    "behind text": 'well {{ messages[0].content ~ "\\uHALF" }}',
    "in a list": '{{ ["\\uHALF", 1] | join }}',
    "as JSON": '{{ "\\uHALF" | tojson }}',
}


@pytest.mark.parametrize("half", HALVES, ids=hex)
@pytest.mark.parametrize("template", WRITERS.values(), ids=WRITERS.keys())
def test_half_of_a_surrogate_pair_is_no_prompt(half: int, template: str) -> None:
    template = template.replace("HALF", f"{half:04x}")
    with pytest.raises(FieldInvalidError, match=f"writes U\\+{half:04X}, half of a surrogate pair"):
        render_chat(template, [ChatMessage("user", "hi")], {})


@pytest.mark.parametrize(
    "what", ['"\\ud800 bad"', '"bad" ~ "\\udfff" * 999', '"\U0001f600" * 1000', '"é" * 99999']
)
def test_what_a_template_raises_is_a_short_text(processes: TextProcesses, what: str) -> None:
    with pytest.raises(FieldInvalidError) as refused:
        processes.render("{{ raise_exception(" + what + ") }}", [ChatMessage("user", "hi")], {})
    assert refused.value.description.startswith("the chat template refused the messages: ")
    assert len(refused.value.description.encode()) < 600


@pytest.fixture
def one() -> Iterator[TextProcesses]:
    made = TextProcesses(1)
    yield made
    made.close()


def started(before: set[int]) -> psutil.Process:
    """The process that was started since."""
    (process,) = (each for each in psutil.Process().children() if each.pid not in before)
    return process


def children() -> set[int]:
    return {each.pid for each in psutil.Process().children()}


def test_a_process_that_died_between_requests_is_no_requests_fault(one: TextProcesses) -> None:
    for _ in range(2):
        before = children()
        assert one.render("{{ messages[0].content }}", [ChatMessage("user", "well")], {}) == "well"
        process = started(before)
        process.kill()
        psutil.wait_procs([process], timeout=10)
    assert one.render_in_a_moment("{{ messages[0].content }}", [ChatMessage("user", "well")], {}) == "well"


def test_bounds_of_a_request_end_with_it(one: TextProcesses) -> None:
    before = children()
    one.render("well", [ChatMessage("user", "hi")], {})
    process = started(before)
    for limit in (psutil.RLIMIT_AS, psutil.RLIMIT_CPU):
        assert process.rlimit(limit) == psutil.Process().rlimit(limit)


def test_what_a_template_leaves_takes_no_memory_from_others(one: TextProcesses) -> None:
    for number in range(6):
        greedy = "{% set x = '" + f"{number:03} " + "' * 15000000 %}{{ x | length }}"
        assert one.render(greedy, [ChatMessage("user", "hi")], {}) == "60000000"
    long = "{{ (messages[0].content * 1400) | length }}"
    assert one.render(long, [ChatMessage("user", "x" * 500_000)], {}) == "700000000"


def test_only_a_slow_template_is_not_done_in_a_moment(processes: TextProcesses) -> None:
    def rendered(template: str) -> str | None:
        return processes.render_in_a_moment(template, [ChatMessage("user", "hi")], {})

    assert rendered(HOSTILE["an endless loop"]) is None
    assert rendered(HOSTILE["a long repetition"]) is None
    assert rendered("{{ messages[0].content }}") == "hi"
    with pytest.raises(FieldInvalidError, match="only in pairs"):
        rendered(HOSTILE["an exception"])
