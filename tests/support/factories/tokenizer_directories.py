"""Directories of tiny tokenizers whose files disagree, as generations of libraries left them, drawn by a seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

MARK = "▁"
STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OWN = ("image_token", "tool_token", "eot_token", "extra_token")
NAMES = (*STANDARD, *OWN)
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")

# Some are in the vocabulary, some are added by tokenizer.json, some by no file but the others.
IN_VOCABULARY = ("<unk>", "<s>", "</s>", "<turn>")
IN_FILE = ("<tool>", "<new>", "<pad>")
ELSEWHERE = ("<img>", "<eot>", "[SEP]", "<other>")
LITERALS = (*IN_VOCABULARY, *IN_FILE, *ELSEWHERE)

TEXTS = (
    "",
    "hello there",
    " hello  there ",
    "a<turn> b <tool>\n c<new>d",
    "<s>hello</s> <img> 12345 it's.",
    "x <eot>y[SEP]z <other> <pad><unk>",
    "hello<img>there<tool>hello",
    "Hello , it 's naïve ! <turn>",
    "\n\nhello\n <s> a",
    "é😀 ▁x <0x41>",
)
CHATS = (
    ({"role": "user", "content": "hello"},),
    ({"role": "system", "content": " a <tool> b"}, {"role": "user", "content": "it's <img> 12"}),
)
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}" + "|".join(
    f"{{{{ {name} }}}}" for name in NAMES
)

_WORDS = ("he", "hel", "hell", "hello", "th", "the", "ther", "there", "it", "12")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789<>/[]|.,!' \n:_SEPH"


def _merges(words: tuple[str, ...], start: str = "") -> list[tuple[str, str]]:
    merges = [(word[:-1], word[-1]) for word in words]
    return [*merges, (start, "hello"), (start, "there")] if start else merges


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(dict.fromkeys([*IN_VOCABULARY, *tokens]))}


def byte_level(random: Random) -> Tokenizer:
    """BPE over bytes, as GPT-2, Llama 3 and Qwen have it."""
    merges = _merges(_WORDS, "Ġ")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=_numbered(tokens), merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=random.random() < 0.3)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = random.choice([byte_level, pre_tokenizers.Sequence([digits, byte_level])])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_parts(random: Random, tokenizer: Tokenizer) -> Tokenizer:
    start = random.choice(["prepend", "first", "always", "never"])
    if start == "prepend":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(MARK, start, split=random.random() < 0.5)
    parts = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = random.choice([decoders.Sequence(parts), decoders.Metaspace(MARK, "always")])
    return tokenizer


def sentencepiece_bpe(random: Random) -> Tokenizer:
    """BPE with byte fallback, as Llama 2, Mistral and Gemma have it."""
    merges = _merges(_WORDS, MARK)
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += [MARK, *_LETTERS.replace(" ", ""), *("".join(merge) for merge in merges)]
    model = models.BPE(
        vocab=_numbered(tokens),
        merges=merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=random.random() < 0.7,
    )
    return _sentencepiece_parts(random, Tokenizer(model))


def unigram(random: Random) -> Tokenizer:
    """Unigram, as T5 and others have it."""
    pieces = [(token, 0.0) for token in IN_VOCABULARY]
    pieces += [(piece, -3.0) for piece in (MARK, *_LETTERS.replace(" ", ""))]
    pieces += [(piece, -2.0) for piece in (MARK + "hello", MARK + "there", "hel", "lo", "ere")]
    return _sentencepiece_parts(random, Tokenizer(models.Unigram(pieces, unk_id=0)))


def wordpiece(random: Random) -> Tokenizer:
    """WordPiece, as BERT has it."""
    tokens = [
        *_LETTERS.replace(" ", ""),
        *(f"##{letter}" for letter in _LETTERS.strip()),
        "hello",
        "##there",
        "it",
    ]
    tokenizer = Tokenizer(models.WordPiece(vocab=_numbered(tokens), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=random.random() < 0.5)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=random.random() < 0.5)
    return tokenizer


KINDS: tuple[Callable[[Random], Tokenizer], ...] = (byte_level, sentencepiece_bpe, unigram, wordpiece)


def _flags(random: Random, *names: str) -> dict[str, bool]:
    return {name: random.random() < 0.35 for name in names}


def base(directory: Path, random: Random, kind: Callable[[Random], Tokenizer]) -> None:
    """Save a ``tokenizer.json`` with added tokens, maybe a post-processor, padding, truncation."""
    tokenizer = kind(random)
    for literal in random.sample([*IN_VOCABULARY, *IN_FILE], 5):
        tokenizer.add_tokens([AddedToken(literal, **_flags(random, *FLAGS))])
    if tokenizer.token_to_id("<s>") is not None and random.random() < 0.5:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    if random.random() < 0.2:
        tokenizer.enable_padding(pad_token=random.choice(LITERALS), length=4)
    if random.random() < 0.2:
        tokenizer.enable_truncation(3)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))


def _named(random: Random, names: tuple[str, ...], *, is_map: bool = False) -> dict[str, Any]:
    """Some parts, each as text or as an object."""
    parts: dict[str, Any] = {}
    for name in random.sample(names, random.randint(0, len(names))):
        literal = random.choice(LITERALS)
        if random.random() < 0.4:
            token: dict[str, Any] = {"content": literal, **_flags(random, *FLAGS[:4])}
            parts[name] = token if is_map else {**token, "__type": "AddedToken", **_flags(random, "special")}
        else:
            parts[name] = literal
    return parts


def _save(directory: Path, name: str, content: Mapping[str, Any]) -> None:
    (directory / name).write_text(json.dumps(content), encoding="utf-8")


def _added_tokens_decoder(random: Random, directory: Path) -> dict[str, Any]:
    literals = random.sample(LITERALS, random.randint(0, len(LITERALS)))
    first = random.choice([0, 3, 300])
    return {
        "added_tokens_decoder": {
            str(first + i): {"content": literal, **_flags(random, *FLAGS)}
            for i, literal in enumerate(literals)
        }
    }


def _special_tokens_map(random: Random, directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = _named(random, NAMES, is_map=True)
    if random.random() < 0.5:
        content["additional_special_tokens"] = random.sample(LITERALS, 2)
    if random.random() < 0.3:
        content["extra_special_tokens"] = random.choice(
            [["<img>", {"content": "<tool>", **_flags(random, *FLAGS[:4])}], {"tool_token": "<tool>"}]
        )
    _save(directory, "special_tokens_map.json", content)
    return {}


def _added_tokens(random: Random, directory: Path) -> dict[str, Any]:
    literals = random.sample(LITERALS, random.randint(1, len(LITERALS)))
    _save(directory, "added_tokens.json", {literal: 290 + 2 * i for i, literal in enumerate(literals)})
    return _special_tokens_map(random, directory) if random.random() < 0.5 else {}


def _extra(random: Random, directory: Path) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    typed = {"__type": "AddedToken", "content": "<img>", **_flags(random, *FLAGS)}
    if random.random() < 0.7:
        fields["extra_special_tokens"] = random.choice(
            [[], {}, ["<tool>", "<img>"], ["<other>", typed], {"tool_token": "<tool>", "voice": "<eot>"}]
        )
    if random.random() < 0.5:
        fields["additional_special_tokens"] = random.choice([["<turn>", "<eot>"], [typed], []])
    if random.random() < 0.5:
        fields |= _added_tokens_decoder(random, directory)
    elif random.random() < 0.5:
        fields |= _special_tokens_map(random, directory)
    return fields


def _options(random: Random, directory: Path) -> dict[str, Any]:
    options = {
        "clean_up_tokenization_spaces": random.random() < 0.7,
        "split_special_tokens": random.random() < 0.4,
        "add_bos_token": random.random() < 0.5,
        "add_eos_token": random.random() < 0.5,
        "add_prefix_space": random.random() < 0.5,
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": random.random() < 0.3,
        "legacy": random.random() < 0.5,
    }
    kept = random.sample(sorted(options), 4)
    return {name: options[name] for name in kept} | _added_tokens_decoder(random, directory)


CLASSES = (
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "GemmaTokenizer",
    "GemmaTokenizerFast",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "PreTrainedTokenizer",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "BloomTokenizerFast",
    "CodeLlamaTokenizer",
    "GPTNeoXTokenizerFast",
    "CohereTokenizer",
    "TokenizerOfNobody",
)
CLASS_OF_MODEL: Mapping[str, str] = {
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizerFast",
    "gemma3_text": "GemmaTokenizer",
    "granite": "GPT2Tokenizer",
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizerFast",
    "olmo2": "GPT2Tokenizer",
    "phi3": "LlamaTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "smollm3": "PreTrainedTokenizerFast",
}
"""``model_type`` → the ``tokenizer_class`` that its checkpoints name."""
MODEL_TYPES = tuple(CLASS_OF_MODEL)


def _class(random: Random, directory: Path) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if random.random() < 0.9:
        fields["tokenizer_class"] = random.choice(CLASSES)
    for name in ("legacy", "add_prefix_space"):
        if random.random() < 0.6:
            fields[name] = random.choice([True, False, None] if name == "legacy" else [True, False])
    if random.random() < 0.6:
        model = {"model_type": random.choice(MODEL_TYPES)}
        if random.random() < 0.3:
            model["tokenizer_class"] = random.choice(CLASSES[:12])
        _save(directory, "config.json", model)
    if random.random() < 0.5:
        fields |= _added_tokens_decoder(random, directory)
    return fields


SOURCES: Mapping[str, Callable[[Random, Path], dict[str, Any]]] = {
    "added_tokens_decoder": _added_tokens_decoder,
    "special_tokens_map": _special_tokens_map,
    "added_tokens": _added_tokens,
    "extra_special_tokens": _extra,
    "options": _options,
    "class": _class,
}


def make(directory: Path, source: str, seed: int) -> None:
    """Make the directory of that seed, in which ``source`` is where the files disagree."""
    random = Random(f"{source} {seed}")
    base(directory, random, KINDS[seed % len(KINDS)])
    config = _named(random, NAMES) if random.random() < 0.8 else {}
    _save(directory, "tokenizer_config.json", config | SOURCES[source](random, directory))
