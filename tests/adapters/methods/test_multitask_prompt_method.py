"""What multitask prompt tuning lowers to, and what of it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.adapters.disk.files import open_source
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsupportedError,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.lowering import lower
from manyhats.adapters.lowering.reader import ReadAdapter, read_adapter
from manyhats.adapters.methods.multitask_prompt_tuning import multitask_prompt
from manyhats.adapters.primitives import PromptEmbeddings
from support.factories.adapters import write_adapter
from support.factories.prefixes import (
    artifact_of,
    make_multitask_prompt,
    multitask_config,
    multitask_tensors,
    tiny_base,
)

BASE = tiny_base()


def read_directory(directory: Path, limits: AdapterLimits | None = None) -> ReadAdapter:
    with open_source(str(directory), [directory]) as source:
        return read_adapter(source, BASE, limits or AdapterLimits())


@settings(deadline=None)
@given(
    num_virtual=st.integers(1, 6),
    num_tasks=st.integers(1, 4),
    num_ranks=st.integers(1, 3),
    data=st.data(),
)
def test_it_lowers_to_its_task_s_prompt(
    num_virtual: int, num_tasks: int, num_ranks: int, data: st.DataObject
) -> None:
    task = data.draw(st.integers(0, num_tasks - 1))
    sizes: dict[str, Any] = {
        "num_virtual_tokens": num_virtual,
        "num_tasks": num_tasks,
        "num_ranks": num_ranks,
    }
    tensors = multitask_tensors(BASE, **sizes)
    config = multitask_config(BASE, **sizes, prompt_task_id=task)
    lowered = lower(artifact_of(config, tensors), BASE)
    assert isinstance(lowered.prefix, PromptEmbeddings)
    columns, rows = tensors["prefix_task_cols"][task], tensors["prefix_task_rows"][task]
    expected = tensors["prompt_embeddings"] * torch.einsum("pr,rd->pd", columns, rows)
    torch.testing.assert_close(lowered.prefix.embeddings, expected)
    exact = multitask_prompt(tensors["prompt_embeddings"].double(), columns.double(), rows.double())
    assert torch.equal(lowered.prefix.embeddings, exact.float())


def test_it_is_multiplied_out_to_float32(tmp_path: Path) -> None:
    make_multitask_prompt(tmp_path, BASE, num_ranks=2, dtype=torch.bfloat16)
    lowered = lower(read_directory(tmp_path).artifact, BASE)
    assert isinstance(lowered.prefix, PromptEmbeddings)
    assert lowered.prefix.embeddings.dtype is torch.float32


def test_several_tasks_without_a_choice_are_refused(tmp_path: Path) -> None:
    make_multitask_prompt(tmp_path, BASE, num_tasks=3)
    with pytest.raises(AdapterUnsupportedError, match=r"holds 3 tasks.*prompt_task_id") as caught:
        read_directory(tmp_path)
    assert caught.value.subject == "num_tasks"


@pytest.mark.parametrize(
    ("fields", "error", "subject"),
    [
        ({"prompt_task_id": 3}, AdapterInvalidError, "prompt_task_id"),
        ({"prompt_task_id": -1}, AdapterInvalidError, "prompt_task_id"),
        ({"prompt_task_id": True}, AdapterInvalidError, "prompt_task_id"),
        ({"prompt_task_id": "1"}, AdapterInvalidError, "prompt_task_id"),
        ({"num_tasks": 2}, AdapterInvalidError, "prefix_task_cols"),
        ({"num_tasks": 0}, AdapterInvalidError, "num_tasks"),
        ({"num_ranks": 3}, AdapterInvalidError, "prefix_task_cols"),
        ({"num_ranks": 300}, AdapterTooLargeError, "num_ranks"),
        ({"num_virtual_tokens": 2}, AdapterInvalidError, "prompt_embeddings"),
        ({"token_dim": 64}, AdapterInvalidError, "token_dim"),
        ({"encoder_hidden_size": 8}, AdapterUnsupportedError, "encoder_hidden_size"),
    ],
)
def test_a_config_that_is_not_the_tensors_or_the_base_s_is_refused(
    fields: dict[str, Any], error: type[AdapterError], subject: str, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"num_tasks": 3, "num_ranks": 2}
    config = multitask_config(BASE, **sizes, prompt_task_id=1) | fields
    write_adapter(tmp_path, config, multitask_tensors(BASE, **sizes))
    with pytest.raises(error) as caught:
        read_directory(tmp_path)
    assert caught.value.subject == subject


def test_every_tensor_must_be_there() -> None:
    for name in multitask_tensors(BASE):
        tensors = {key: tensor for key, tensor in multitask_tensors(BASE).items() if key != name}
        with pytest.raises(AdapterInvalidError, match=f"{name}: is missing"):
            lower(artifact_of(multitask_config(BASE), tensors), BASE)


def test_a_product_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    tensors = {name: torch.full_like(t, 1e20) for name, t in multitask_tensors(BASE).items()}
    write_adapter(tmp_path, multitask_config(BASE), tensors)
    with pytest.raises(AdapterInvalidError, match="is not finite once multiplied"):
        read_directory(tmp_path)
