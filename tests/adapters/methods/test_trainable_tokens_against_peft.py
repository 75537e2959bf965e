"""Trainable tokens by themselves, against PEFT itself in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import TrainableTokensConfig
from safetensors.torch import load_file

from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterUnsupportedError,
    BaseMismatchError,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.method import Candidate
from manyhats.adapters.methods.trainable_tokens import TrainableTokensMethod
from manyhats.adapters.primitives import EmbeddingRows, HeadRows
from support.factories.adapters import make_base, write_adapter
from support.oracles.peft import check_against_peft, make_peft, read, read_lowered, save_peft, tiny_model

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

BASE = make_base()
IDS = [42, 3, 9]
ROWS = "base_model.model.model.embed_tokens.trainable_tokens_delta"
HEAD_ROWS = "base_model.model.lm_head.trainable_tokens_delta"
COPY = "base_model.model.model.embed_tokens.base_layer.weight"


def make(model: Any, directory: Path, **config: Any) -> Path:
    peft = make_peft(model, TrainableTokensConfig(task_type="CAUSAL_LM", **{"token_indices": IDS} | config))
    return save_peft(peft, directory)


def write(directory: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    fields = {
        "peft_type": "TRAINABLE_TOKENS",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "test/tiny",
        "target_modules": "model.embed_tokens",
        "token_indices": IDS,
    }
    return write_adapter(
        directory, fields | config, {ROWS: torch.ones(3, 32)} if tensors is None else tensors
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3_text", "granite"])
@pytest.mark.parametrize("tie", [False, True])
def test_rows_of_the_embedding_equal_peft_s(family: str, tie: bool, tmp_path: Path) -> None:
    model = tiny_model(family, tie=tie)
    lowered = check_against_peft(model, make(model, tmp_path))
    assert [type(delta) for delta in lowered.deltas] == [EmbeddingRows, HeadRows][: 1 + tie]


@pytest.mark.parametrize(
    ("targets", "tie", "kinds"),
    [
        (["embed_tokens"], False, [EmbeddingRows]),
        (["lm_head"], False, [HeadRows]),
        (["lm_head"], True, [HeadRows]),
        (["embed_tokens", "lm_head"], False, [EmbeddingRows, HeadRows]),
        (r".*embed_tokens", True, [EmbeddingRows, HeadRows]),
    ],
)
def test_targets_decide_which_rows_are_replaced(
    targets: Any, tie: bool, kinds: list[type], tmp_path: Path
) -> None:
    model = tiny_model(tie=tie)
    lowered = check_against_peft(model, make(model, tmp_path, target_modules=targets))
    assert [type(delta) for delta in lowered.deltas] == kinds


def test_embeddings_saved_alongside_are_the_base_s(tmp_path: Path) -> None:
    """What PEFT saves with ``save_embedding_layers``."""
    model = tiny_model()
    config = TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=IDS)
    save_peft(make_peft(model, config), tmp_path, save_embedding_layers=True)
    assert COPY in load_file(tmp_path / "adapter_model.safetensors")
    check_against_peft(model, tmp_path)


def test_without_targets_the_embedding_is_meant(tmp_path: Path) -> None:
    assert len(read_lowered(write(tmp_path, target_modules=None), replace(BASE, is_tied=False)).deltas) == 1
    write(tmp_path / "head", {HEAD_ROWS: torch.ones(3, 32)}, target_modules=None)
    with pytest.raises(AdapterInvalidError, match="leaves out"):
        read(tmp_path / "head", BASE)


@pytest.mark.parametrize(
    ("config", "error", "subject"),
    [
        ({"token_indices": [65, 1, 2]}, AdapterInvalidError, ROWS),
        ({"token_indices": [10**6, 1, 2]}, AdapterInvalidError, "token_indices"),
        ({"token_indices": [-1, 1, 2]}, AdapterInvalidError, "token_indices"),
        ({"token_indices": [1, 1, 2]}, AdapterInvalidError, "token_indices"),
        ({"token_indices": [True, 2, 3]}, AdapterInvalidError, "token_indices"),
        ({"token_indices": []}, AdapterInvalidError, "token_indices"),
        ({"token_indices": None}, AdapterInvalidError, "token_indices"),
        ({"token_indices": {"embed_tokens": IDS}}, AdapterInvalidError, "token_indices"),
        ({"token_indices": [1, 2]}, AdapterInvalidError, ROWS),
        ({"target_modules": ["lm_head"]}, AdapterInvalidError, ROWS),
        ({"modules_to_save": ["lm_head"]}, AdapterUnsupportedError, "modules_to_save"),
        ({"trainable_token_indices": IDS}, AdapterUnsupportedError, "trainable_token_indices"),
        ({"something_new": 1}, AdapterUnsupportedError, "something_new"),
    ],
)
def test_configs_that_cannot_be_served_are_refused(
    config: dict[str, Any], error: type[AdapterError], subject: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        read(write(tmp_path, **config), BASE)
    assert caught.value.subject == subject


@pytest.mark.parametrize(
    ("tensors", "subject"),
    [
        ({ROWS: torch.ones(3, 31)}, ROWS),
        ({ROWS: torch.ones(2, 32)}, ROWS),
        ({ROWS: torch.ones(3)}, ROWS),
        ({ROWS: torch.full((3, 32), torch.nan)}, ROWS),
        ({HEAD_ROWS: torch.ones(3, 32)}, HEAD_ROWS),
        ({COPY: torch.ones(64, 32)}, "token_indices"),
        ({ROWS: torch.ones(3, 32), COPY: torch.ones(66, 31)}, COPY),
        ({ROWS: torch.ones(3, 32), COPY: torch.ones(42, 32)}, ROWS),
        ({ROWS: torch.ones(3, 32), COPY: torch.ones(66)}, COPY),
        ({ROWS: torch.ones(3, 32), "x": torch.ones(1)}, "x"),
        (
            {ROWS: torch.ones(3, 32), "base_model.model.model.embed_tokens.weight": torch.ones(64, 32)},
            ROWS,
        ),
        (
            {"base_model.model.model.norm.trainable_tokens_delta": torch.ones(3, 32)},
            "base_model.model.model.norm.trainable_tokens_delta",
        ),
        (
            {
                ROWS: torch.ones(3, 32),
                "base_model.model.embed_tokens.trainable_tokens_delta": torch.ones(3, 32),
            },
            ROWS,
        ),
    ],
)
def test_spoilt_tensors_are_refused(tensors: dict[str, torch.Tensor], subject: str, tmp_path: Path) -> None:
    with pytest.raises((AdapterInvalidError, AdapterUnsupportedError)) as caught:
        read_lowered(write(tmp_path, tensors), BASE)
    assert caught.value.subject == subject


def test_rows_of_one_weight_that_differ_are_refused(tmp_path: Path) -> None:
    base = replace(BASE, is_tied=True)
    write(tmp_path, {ROWS: torch.ones(3, 32), HEAD_ROWS: torch.ones(3, 32)})
    assert len(read_lowered(tmp_path, base).deltas) == 2
    write(tmp_path, {ROWS: torch.ones(3, 32), HEAD_ROWS: torch.zeros(3, 32)})
    with pytest.raises(AdapterInvalidError, match="is tied") as caught:
        read_lowered(tmp_path, base)
    assert caught.value.subject == HEAD_ROWS


def test_a_copy_that_is_not_the_base_s_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tie=True)
    from support.oracles.primitives import describe_model

    write(tmp_path, {ROWS: torch.ones(3, 32), COPY: model.lm_head.weight.detach() + 1})
    with pytest.raises(BaseMismatchError) as caught:
        read_lowered(tmp_path, describe_model(model))
    assert caught.value.subject == COPY


def test_rows_of_a_head_with_a_bias_are_refused(tmp_path: Path) -> None:
    """PEFT computes such a head without its bias, for every token."""
    write(tmp_path, {HEAD_ROWS: torch.ones(3, 32)}, target_modules=["lm_head"])
    with pytest.raises(AdapterUnsupportedError, match="has a bias") as caught:
        read(tmp_path, replace(BASE, has_head_bias=True))
    assert caught.value.subject == HEAD_ROWS


_NAMES = st.sampled_from([ROWS, HEAD_ROWS, COPY, "x.trainable_tokens_delta", "x"])


@given(
    st.dictionaries(
        st.sampled_from(["token_indices", "target_modules", "init_weights"]),
        st.none()
        | st.booleans()
        | st.integers(-2, 70)
        | st.lists(st.integers(-1, 70), max_size=3)
        | st.text(),
    ),
    st.dictionaries(_NAMES, st.lists(st.integers(0, 64), max_size=3).map(tuple), max_size=3),
    st.booleans(),
)
def test_arbitrary_files_raise_nothing_but_adapter_errors(
    config: dict[str, Any], shapes: dict[str, tuple[int, ...]], is_tied: bool
) -> None:
    candidate = Candidate(config, shapes, "test/tiny")
    try:
        TrainableTokensMethod().check(candidate, replace(BASE, is_tied=is_tied), AdapterLimits())
    except AdapterError:
        return
    assert shapes.keys() <= {ROWS, HEAD_ROWS, COPY}
