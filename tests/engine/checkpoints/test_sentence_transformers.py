from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from manyhats.adapters.heads import Pooling
from manyhats.engine.checkpoints.sentence_transformers import SentenceSettings, read_sentence_settings
from manyhats.engine.errors import ModelError

MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling"},
    {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def write(directory: Path, modules: Any = MODULES, pooling: Any = None, settings: Any = None) -> Path:
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_cls_token": True} if pooling is None else pooling)
    )
    if settings is not None:
        (directory / "sentence_bert_config.json").write_text(json.dumps(settings))
    return directory


def test_plain_directory_says_nothing(tmp_path: Path) -> None:
    assert read_sentence_settings(tmp_path) == SentenceSettings()


@pytest.mark.parametrize(
    ("mode", "pooling"),
    [
        ("cls_token", Pooling.FIRST),
        ("mean_tokens", Pooling.MEAN),
        ("max_tokens", Pooling.MAX),
        ("lasttoken", Pooling.LAST),
    ],
)
def test_pooling_and_longest_text(mode: str, pooling: Pooling, tmp_path: Path) -> None:
    config = {"word_embedding_dimension": 64, "pooling_mode_cls_token": False, f"pooling_mode_{mode}": True}
    write(tmp_path, pooling=config, settings={"max_seq_length": 128})
    assert read_sentence_settings(tmp_path) == SentenceSettings(pooling, 128)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules": {}}, None),
        ({"modules": [{"path": ""}]}, r"modules\.json: is no list of modules"),
        ({"modules": "[1"}, r"modules\.json: is no list of modules"),
        (
            {"modules": [*MODULES, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]},
            r"modules\.json: Dense is not served; Transformer, Pooling, Normalize are",
        ),
        (
            {"pooling": {"pooling_mode_weightedmean_tokens": True}},
            r"1_Pooling/config\.json: pooling_mode_weightedmean_tokens is not served",
        ),
        (
            {"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}},
            r"pooling_mode_cls_token, pooling_mode_mean_tokens is not served",
        ),
        ({"pooling": []}, "not a JSON object"),
        ({"pooling": {"any": True}}, "no pooling is not served"),
        ({"settings": {"max_seq_length": 0}}, r"max_seq_length must be a whole number of at least 1, not 0"),
        ({"settings": {"max_seq_length": "long"}}, "max_seq_length must be a whole number"),
        ({"settings": {"max_seq_length": None}}, None),
        ({"settings": {"do_lower_case": True}}, "do_lower_case asks for texts in small letters"),
        ({"settings": {"do_lower_case": False}}, None),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    files: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    write(tmp_path, **files)
    if message is None:
        assert read_sentence_settings(tmp_path).max_length is None
        return
    with pytest.raises(ModelError, match=message):
        read_sentence_settings(tmp_path)
