"""Which transformers class a tokenizer's files are for, and how that class uses ``tokenizer.json``.

Most take the file as it is. Others use only its vocabulary and merges and set up the rest themselves, whatever the file
says: ``Rebuild`` does what they do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from manyhats.engine.text.tokenizer_files import MODEL_CONFIG_FILE, TOKENIZER_CONFIG_FILE, TokenizerFiles

_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
_LLAMA = "LlamaTokenizer"
_AS_IT_IS = frozenset(
    {
        "",
        "BloomTokenizer",
        "PreTrainedTokenizer",
        "PythonBackend",
        "TokenizersBackend",
    }
)
_CLASS_OF_MODEL: Mapping[str, str | None] = {
    "": None,
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "granite": "TokenizersBackend",
    "llama": None,
    "mistral": "TokenizersBackend",
    "mixtral": "TokenizersBackend",
    "olmo2": "TokenizersBackend",
    "phi3": "TokenizersBackend",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "smollm3": None,
}
"""``model_type`` → the class that transformers has for it; None if it has none."""
_MODELS_THAT_NAME_A_WRONG_CLASS = frozenset({"phi3", "qwen2"})
# The words of Qwen2's tokenizer: contractions, letters, single digits, other characters, white space.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rebuild:
    """A class that sets up its tokenizer itself.

    Attributes:
        defaults: role → token, if the files name none.
        set_up: ``tokenizer.json``, the config's fields and the unknown token → the tokenizer, without added tokens
            and post-processor.
        adds_named: whether special tokens that a role or list names end up special, whatever the files say.
    """

    defaults: Mapping[str, str | None]
    set_up: Callable[[Mapping[str, Any], Fields, str], Backend]
    adds_named: bool = False


def class_name(files: TokenizerFiles) -> str | None:
    """The class that ``AutoTokenizer`` chooses.

    Returns:
        one of ``REBUILDS``, "" for any that takes the file as it is, None if only transformers knows.

    Raises:
        ModelError: a class's or model's name is not a string.
    """
    declared = _text(files, TOKENIZER_CONFIG_FILE, files.config, "tokenizer_class")
    of_model = _text(files, MODEL_CONFIG_FILE, files.model_config, "tokenizer_class")
    model_type = _text(files, MODEL_CONFIG_FILE, files.model_config, "model_type") or ""
    if model_type not in _CLASS_OF_MODEL or "model_name" in files.model_config:
        return None
    name = declared or of_model
    registered = _CLASS_OF_MODEL[model_type]
    may_be_wrong = model_type in _MODELS_THAT_NAME_A_WRONG_CLASS
    if name is not None and "auto_map" not in files.config:
        if _without_fast(name) == _LLAMA and not may_be_wrong and b'"ByteLevel"' in files.tokenizer_json:
            return ""
        if registered is not None and registered != _without_fast(name):
            return _known("" if registered in _AS_IT_IS else registered if may_be_wrong else name)
    return _known(name or registered or "")


def _known(name: str) -> str | None:
    name = _without_fast(name)
    if name in _AS_IT_IS:
        return ""
    return name if name in REBUILDS else None


def _without_fast(name: str) -> str:
    return name.removesuffix("Fast")


def _text(files: TokenizerFiles, file: str, fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if not isinstance(value, str | None):
        raise files.error(file, f"{name} must be a string, not {value!r}")
    return value


def _vocabulary(tokenizer: Mapping[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a ``tokenizer.json``, as BPE takes them; other models have no merges."""
    model = tokenizer["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {token[0] if isinstance(token, list) else token: i for i, token in enumerate(vocabulary)}
    merges = [each.split(" ") if isinstance(each, str) else each for each in model.get("merges") or ()]
    return vocabulary, [(left, right) for left, right in merges]


def _llama(tokenizer: Mapping[str, Any], fields: Fields, unknown: str) -> Backend:
    vocabulary, merges = _vocabulary(tokenizer)
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True))
    adds_space = fields.get("add_prefix_space")
    adds_space = True if adds_space is None else bool(adds_space)
    scheme = "always" if fields.get("legacy") else "first"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        _MARK, prepend_scheme=scheme if adds_space else "never", split=False
    )
    parts: list[Any] = [decoders.Replace(_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if adds_space else parts)
    return backend


def _gemma(tokenizer: Mapping[str, Any], fields: Fields, unknown: str) -> Backend:
    vocabulary, merges = _vocabulary(tokenizer)
    backend = Backend(
        models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, unk_token=unknown, byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", _MARK)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def _byte_level_bpe(tokenizer: Mapping[str, Any]) -> Backend:
    vocabulary, merges = _vocabulary(tokenizer)
    backend = Backend(
        models.BPE(vocab=vocabulary, merges=merges, continuing_subword_prefix="", end_of_word_suffix="")
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _qwen2(tokenizer: Mapping[str, Any], fields: Fields, unknown: str) -> Backend:
    backend = _byte_level_bpe(tokenizer)
    backend.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(fields.get("add_prefix_space")), use_regex=False
    )
    words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    return backend


def _gpt2(tokenizer: Mapping[str, Any], fields: Fields, unknown: str) -> Backend:
    backend = _byte_level_bpe(tokenizer)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(fields.get("add_prefix_space")))
    return backend


_END = "<|endoftext|>"

REBUILDS: Mapping[str, Rebuild] = {
    _LLAMA: Rebuild({"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, _llama),
    "GemmaTokenizer": Rebuild(
        {
            "unk_token": "<unk>",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
        _gemma,
    ),
    "Qwen2Tokenizer": Rebuild(
        {"unk_token": _END, "bos_token": None, "eos_token": _END, "pad_token": _END}, _qwen2, adds_named=True
    ),
    "GPT2Tokenizer": Rebuild(
        {"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": None}, _gpt2
    ),
}
"""Class → what it sets up; those that the served families' checkpoints name."""
