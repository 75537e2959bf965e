"""Single trained rows of the embedding and of the head: PEFT's ``trainable_token_indices``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from manyhats.adapters.errors import AdapterError, AdapterInvalidError, AdapterUnsupportedError
from manyhats.adapters.formats.peft.saved_modules import find_saved_modules
from manyhats.adapters.primitives import EmbeddingRows, HeadRows
from support.factories.adapters import lora_config, lora_tensors, make_base, make_token_rows, write_adapter
from support.oracles.peft import check_against_peft, make_peft, read, read_lowered, save_peft, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")

BASE = make_base()
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD_ROWS = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"

# What the config says → tokens of the embedding, and of the head where the base is tied and where it is not.
INDICES: list[tuple[Any, list[int], list[int], list[int]]] = [
    ([42, 3, 9], [42, 3, 9], [42, 3, 9], []),
    ({"embed_tokens": [42, 3]}, [42, 3], [42, 3], []),
    ({"lm_head": [42, 3]}, [], [42, 3], [42, 3]),
    ({"embed_tokens": [42, 3], "lm_head": [42, 3]}, [42, 3], [42, 3], [42, 3]),
    ({"embed_tokens": [42, 3], "lm_head": [17]}, [42, 3], [17], [17]),
]


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(("indices", "embedded", "tied_head", "own_head"), INDICES)
def test_rows_equal_peft_s(
    indices: Any, embedded: list[int], tied_head: list[int], own_head: list[int], tie: bool, tmp_path: Path
) -> None:
    model = tiny_model(tie=tie)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["v_proj"], trainable_token_indices=indices
    )
    save_peft(make_peft(model, config), tmp_path)
    lowered = check_against_peft(model, tmp_path)
    rows = [delta.ids.tolist() for delta in lowered.deltas if isinstance(delta, EmbeddingRows)]
    head = [delta.ids.tolist() for delta in lowered.deltas if isinstance(delta, HeadRows)]
    assert rows == ([embedded] if embedded else [])
    wanted = tied_head if tie else own_head
    assert head == ([wanted] if wanted else [])


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "granite", "qwen2"])
def test_rows_are_multiplied_as_the_base_s_are(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, tie=True)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["v_proj"], trainable_token_indices=[42, 3]
    )
    save_peft(make_peft(model, config), tmp_path)
    check_against_peft(model, tmp_path)


def test_directories_of_the_factory_are_served(tmp_path: Path) -> None:
    make_token_rows(tmp_path, BASE, [5, 7])
    assert (
        sum(isinstance(delta, EmbeddingRows | HeadRows) for delta in read_lowered(tmp_path, BASE).deltas) == 2
    )


@pytest.mark.parametrize(
    ("indices", "error"),
    [
        ([64], AdapterInvalidError),
        ([-1], AdapterInvalidError),
        ([1, 1], AdapterInvalidError),
        ([True], AdapterInvalidError),
        (["a"], AdapterInvalidError),
        ([1, 2, 3], AdapterInvalidError),
        (7, AdapterInvalidError),
        ({"embed_tokens": []}, AdapterInvalidError),
        ({"embed_tokens": [1, 2], "model.embed_tokens": [1, 2]}, AdapterInvalidError),
        ({"embed_tokens": [1, 2], "lm_head": [3]}, AdapterInvalidError),
        ({"q_proj": [1, 2]}, AdapterUnsupportedError),
        (None, AdapterUnsupportedError),
    ],
)
def test_indices_that_cannot_be_are_refused(indices: Any, error: type[AdapterError], tmp_path: Path) -> None:
    make_token_rows(tmp_path, BASE, [1, 2], trainable_token_indices=indices)
    with pytest.raises(error) as caught:
        read(tmp_path, BASE)
    assert "trainable_token" in caught.value.subject


@pytest.mark.parametrize(
    ("rows", "subject"),
    [
        (torch.ones(2, 31), ROWS),
        (torch.ones(3, 32), ROWS),
        (torch.ones(2), ROWS),
        (torch.full((2, 32), torch.inf), ROWS),
        (None, "trainable_token_indices"),
    ],
)
def test_spoilt_rows_are_refused(rows: torch.Tensor | None, subject: str, tmp_path: Path) -> None:
    tensors = lora_tensors(BASE, rank=4, sites=["q_proj"])
    if rows is not None:
        tensors[ROWS] = rows
    config = lora_config(BASE, rank=4, sites=["q_proj"], trainable_token_indices=[1, 2])
    write_adapter(tmp_path, config, tensors)
    with pytest.raises(AdapterInvalidError) as caught:
        read(tmp_path, BASE)
    assert caught.value.subject == subject


def test_rows_of_a_tied_head_must_be_the_embedding_s(tmp_path: Path) -> None:
    """A tied base's head gets the embedding's rows; rows of its own for the same tokens can only be these."""
    tensors = lora_tensors(BASE, rank=4, sites=["q_proj"])
    tensors |= {ROWS: torch.ones(2, 32), HEAD_ROWS: torch.zeros(2, 32)}
    indices = {"embed_tokens": [1, 2], "lm_head": [1, 2]}
    config = lora_config(BASE, rank=4, sites=["q_proj"], trainable_token_indices=indices)
    write_adapter(tmp_path, config, tensors)
    with pytest.raises(AdapterInvalidError, match="is tied") as caught:
        read(tmp_path, BASE)
    assert caught.value.subject == HEAD_ROWS
    read(tmp_path, replace(BASE, is_tied=False))
    write_adapter(tmp_path, config, tensors | {HEAD_ROWS: torch.ones(2, 32)})
    read(tmp_path, BASE)


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_rows_of_a_module_that_is_replaced_or_adapted_are_refused(module: str, tmp_path: Path) -> None:
    tensors = {ROWS: torch.ones(2, 32), f"base_model.model.{module}.weight": torch.ones(64, 32)}
    write_adapter(tmp_path, lora_config(BASE, trainable_token_indices=[1, 2]), tensors)
    with pytest.raises(AdapterInvalidError, match="same rows"):
        read(tmp_path, BASE)
    a, b = (
        ("lora_A.weight", "lora_B.weight")
        if module == "lm_head"
        else ("lora_embedding_A", "lora_embedding_B")
    )
    shapes = ((4, 32), (64, 4)) if module == "lm_head" else ((4, 64), (32, 4))
    tensors = {
        ROWS: torch.ones(2, 32),
        f"base_model.model.{module}.{a}": torch.ones(shapes[0]),
        f"base_model.model.{module}.{b}": torch.ones(shapes[1]),
    }
    write_adapter(tmp_path, lora_config(BASE, rank=4, trainable_token_indices=[1, 2]), tensors)
    with pytest.raises(AdapterInvalidError, match="also replaced by trained rows or weights"):
        read(tmp_path, BASE)


_VALUES = st.none() | st.booleans() | st.integers(-2, 70) | st.text(max_size=3) | st.floats()
_LISTS = st.lists(_VALUES, max_size=3)


@given(
    st.dictionaries(
        st.sampled_from(["modules_to_save", "trainable_token_indices", "ensure_weight_tying"]),
        _VALUES
        | st.lists(st.sampled_from(["lm_head", "embed_tokens", "x"]) | _VALUES, max_size=3)
        | st.dictionaries(st.sampled_from(["lm_head", "embed_tokens", "x"]), _LISTS | _VALUES, max_size=2),
    ),
    st.booleans(),
)
def test_arbitrary_fields_raise_nothing_but_adapter_errors(fields: dict[str, Any], is_tied: bool) -> None:
    shapes = {ROWS: (1, 32), HEAD_ROWS: (1, 32), "base_model.model.lm_head.weight": (64, 32)}
    try:
        saved = find_saved_modules(fields, shapes, replace(BASE, is_tied=is_tied))
    except AdapterError:
        return
    assert saved.names <= shapes.keys()
