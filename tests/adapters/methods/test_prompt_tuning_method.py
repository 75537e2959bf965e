"""What prompt tuning and P-tuning lower to, and what of them is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.disk.files import open_source
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsupportedError,
    BaseMismatchError,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.lowering import lower
from manyhats.adapters.lowering.reader import ReadAdapter, read_adapter
from manyhats.adapters.method import Candidate
from manyhats.adapters.methods.prompt_tuning import PromptTuningMethod
from manyhats.adapters.primitives import PromptEmbeddings
from support.factories.adapters import write_adapter
from support.factories.prefixes import (
    artifact_of,
    make_p_tuning,
    make_prompt,
    p_tuning_config,
    prompt_config,
    prompt_tensors,
    tiny_base,
)
from support.oracles.methods import prepend_prompt

BASE = tiny_base()
KINDS = pytest.mark.parametrize(
    ("make", "config_for", "method"),
    [
        (make_prompt, prompt_config, AdapterMethod.PROMPT_TUNING),
        (make_p_tuning, p_tuning_config, AdapterMethod.P_TUNING),
    ],
    ids=["prompt tuning", "P-tuning"],
)


def read_directory(directory: Path, limits: AdapterLimits | None = None) -> ReadAdapter:
    with open_source(str(directory), [directory]) as source:
        return read_adapter(source, BASE, limits or AdapterLimits())


def test_the_prompt_comes_before_the_tokens() -> None:
    prompt, embedded = torch.randn(2, 3), torch.randn(4, 3)
    whole = prepend_prompt(prompt, embedded)
    assert torch.equal(whole[:2], prompt)
    assert torch.equal(whole[2:], embedded)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_lowers_to_its_embeddings_as_stored(
    make: Callable[..., Path],
    config_for: Callable[..., Any],
    method: AdapterMethod,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    make(tmp_path, BASE, num_virtual_tokens=6, dtype=dtype)
    artifact = read_directory(tmp_path).artifact
    lowered = lower(artifact, BASE)
    assert artifact.method is method
    assert lowered.deltas == ()
    assert isinstance(lowered.prefix, PromptEmbeddings)
    stored = prompt_tensors(BASE, num_virtual_tokens=6, dtype=dtype)["prompt_embeddings"]
    assert torch.equal(lowered.prefix.embeddings, stored)
    assert lowered.prefix.embeddings.dtype is dtype


@KINDS
@pytest.mark.parametrize(
    ("fields", "error", "subject"),
    [
        ({"num_virtual_tokens": 3}, AdapterInvalidError, "prompt_embeddings"),
        ({"num_virtual_tokens": None}, AdapterInvalidError, "num_virtual_tokens"),
        ({"num_virtual_tokens": 4.0}, AdapterInvalidError, "num_virtual_tokens"),
        ({"token_dim": 16}, AdapterInvalidError, "token_dim"),
        ({"num_layers": 4}, AdapterInvalidError, "num_layers"),
        ({"num_transformer_submodules": 2}, AdapterUnsupportedError, "num_transformer_submodules"),
        ({"modules_to_save": ["embed_tokens"]}, AdapterUnsupportedError, "modules_to_save"),
        ({"prefix_projection": True}, AdapterUnsupportedError, "prefix_projection"),
    ],
)
def test_a_config_that_is_not_the_tensor_s_or_the_base_s_is_refused(
    make: Callable[..., Path],
    config_for: Callable[..., dict[str, Any]],
    method: AdapterMethod,
    fields: dict[str, Any],
    error: type[AdapterError],
    subject: str,
    tmp_path: Path,
) -> None:
    write_adapter(tmp_path, config_for(BASE) | fields, prompt_tensors(BASE))
    with pytest.raises(error) as caught:
        read_directory(tmp_path)
    assert caught.value.subject == subject


@pytest.mark.parametrize(
    ("base_model", "error"), [("test/tiny", AdapterInvalidError), ("", BaseMismatchError)]
)
def test_another_base_s_prompt_is_told_from_a_broken_one(base_model: str, error: type[AdapterError]) -> None:
    for config in (prompt_config(tiny_base(hidden_size=16)), {"num_virtual_tokens": 4}):
        candidate = Candidate(config, {"prompt_embeddings": (4, 16)}, base_model)
        with pytest.raises(error):
            PromptTuningMethod().check(candidate, BASE, AdapterLimits())


@KINDS
def test_the_number_of_virtual_tokens_has_a_limit(
    make: Callable[..., Path], config_for: Callable[..., Any], method: AdapterMethod, tmp_path: Path
) -> None:
    make(tmp_path, BASE, num_virtual_tokens=3)
    read_directory(tmp_path, AdapterLimits(max_virtual_tokens=3))
    with pytest.raises(AdapterTooLargeError, match="num_virtual_tokens: is 3; the limit is 2"):
        read_directory(tmp_path, AdapterLimits(max_virtual_tokens=2))


@KINDS
def test_values_that_are_not_finite_are_refused(
    make: Callable[..., Path], config_for: Callable[..., Any], method: AdapterMethod, tmp_path: Path
) -> None:
    make(tmp_path, BASE, scale=float("nan"))
    with pytest.raises(AdapterInvalidError, match="prompt_embeddings: has values that are not finite"):
        read_directory(tmp_path)


def test_tensors_are_all_there_and_all_used() -> None:
    config = prompt_config(BASE)
    with pytest.raises(AdapterInvalidError, match="prompt_embeddings: is missing"):
        lower(artifact_of(config, {}), BASE)
    extra = prompt_tensors(BASE) | {"prefix_task_cols": torch.ones(1, 4, 1)}
    with pytest.raises(AdapterInvalidError, match="prefix_task_cols"):
        lower(artifact_of(config, extra), BASE)


@pytest.mark.parametrize(("model_type", "factor"), [("gemma2", 1.0), ("gemma3_text", 1.0), ("granite", 12.0)])
def test_only_a_multiplier_behind_the_prompt_acts_on_it(model_type: str, factor: float) -> None:
    base = tiny_base(model_type, embedding_scale=12.0)
    lowered = lower(artifact_of(prompt_config(base), prompt_tensors(base)), base)
    assert isinstance(lowered.prefix, PromptEmbeddings)
    torch.testing.assert_close(lowered.prefix.embeddings, prompt_tensors(base)["prompt_embeddings"] * factor)


def test_an_architecture_that_multiplies_at_an_unknown_place_is_refused() -> None:
    base = tiny_base("minicpm", embedding_scale=12.0)
    shapes = {"prompt_embeddings": (4, 32)}
    with pytest.raises(AdapterUnsupportedError, match="minicpm, which multiplies embeddings"):
        PromptTuningMethod().check(Candidate(prompt_config(base), shapes, "test/tiny"), base, AdapterLimits())
