"""Multitask prompt tuning: one shared prompt, and a low-rank factor of it for each of several tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.errors import (
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsupportedError,
    shown,
)
from manyhats.adapters.formats.peft.prompt_config import (
    PROMPT_EMBEDDINGS,
    PromptConfig,
    check_num_virtual_tokens,
    check_shape,
    check_tensor_names,
    parse_count,
    parse_prompt_config,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.method import Candidate
from manyhats.adapters.methods.prompt_tuning import (
    INITIALISATION_FIELDS,
    Prompts,
    as_first_layer_reads,
    check_prompt,
)
from manyhats.adapters.primitives import LoweredAdapter, PromptEmbeddings
from manyhats.adapters.sites import BaseDescription

_COLUMNS = "prefix_task_cols"
_ROWS = "prefix_task_rows"
_TASK_FIELD = "prompt_task_id"

# PEFT's defaults, for configs that leave the field out.
_DEFAULT_NUM_TASKS = 1
_DEFAULT_NUM_RANKS = 1

_OWN_FIELDS = INITIALISATION_FIELDS | {
    "num_ranks",
    "num_tasks",
    "prompt_tuning_init_state_dict_path",
    "prompt_tuning_init_task",
    _TASK_FIELD,
}


def multitask_prompt(shared: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """One task's prompt: ``shared ⊙ (columns · rows)``, element by element.

    Args:
        shared: [P, D].
        columns: [P, R]; the task's.
        rows: [R, D]; the task's.

    Returns:
        [P, D].

    Source: Wang et al. 2023 (arXiv:2303.02861), section 3.
    """
    return shared * (columns @ rows)


@dataclass(frozen=True, slots=True)
class _Config:
    """The shared fields, and T, R and the task that is served."""

    prompt: PromptConfig
    num_tasks: int
    num_ranks: int
    task: int


@dataclass(frozen=True, slots=True)
class MultitaskPromptTuningMethod(Prompts):
    """Multitask prompt tuning from a PEFT directory.

    PEFT is told at each call which of its T tasks to run; here an artifact is one task. With T = 1 there is no
    choice. With more, the config's ``prompt_task_id`` says which one (0 to T − 1; PEFT ignores the field), and an
    artifact without it is refused.
    """

    @property
    def method(self) -> AdapterMethod:
        """MULTITASK_PROMPT_TUNING."""
        return AdapterMethod.MULTITASK_PROMPT_TUNING

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse another base's prompt, and one that does not say which task to serve."""
        config = _parse(candidate.config)
        check_num_virtual_tokens(config.prompt, limits)
        if config.num_ranks > limits.max_rank:
            raise AdapterTooLargeError("num_ranks", f"is {config.num_ranks}; the limit is {limits.max_rank}")
        _check(config, candidate.shapes, base, candidate.base_model)

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """The task's prompt, multiplied out; float32.

        Raises:
            AdapterInvalidError: the product is not finite; besides what ``check`` raises.
        """
        config = _parse(artifact.config)
        shapes = {name: tuple(tensor.shape) for name, tensor in artifact.tensors.items()}
        _check(config, shapes, base, artifact.base_model)
        tensors = artifact.tensors
        # In float64, as the order of float32 sums may differ between loads, by alignment and threads.
        prompt = multitask_prompt(
            tensors[PROMPT_EMBEDDINGS].double(),
            tensors[_COLUMNS][config.task].double(),
            tensors[_ROWS][config.task].double(),
        ).float()
        if not bool(torch.isfinite(prompt).all()):
            raise AdapterInvalidError(PROMPT_EMBEDDINGS, f"is not finite once multiplied by {_COLUMNS}")
        embeddings = as_first_layer_reads(prompt, base)
        return LoweredAdapter(digest=artifact.digest, deltas=(), prefix=PromptEmbeddings(embeddings))


def _parse(config: Mapping[str, Any]) -> _Config:
    prompt = parse_prompt_config(config, _OWN_FIELDS)
    num_tasks = _count_or(config, "num_tasks", _DEFAULT_NUM_TASKS)
    num_ranks = _count_or(config, "num_ranks", _DEFAULT_NUM_RANKS)
    return _Config(prompt, num_tasks, num_ranks, _parse_task(config.get(_TASK_FIELD), num_tasks))


def _count_or(config: Mapping[str, Any], field: str, default: int) -> int:
    value = config.get(field)
    return default if value is None else parse_count(field, value)


def _parse_task(value: Any, num_tasks: int) -> int:
    if value is None and num_tasks == 1:
        return 0
    if value is None:
        raise AdapterUnsupportedError(
            "num_tasks",
            f"holds {num_tasks} tasks, and PEFT is told at each call which one to use; write which one this is into "
            f"the config as {_TASK_FIELD} (0 to {num_tasks - 1}), and register each task separately",
        )
    if type(value) is not int or not 0 <= value < num_tasks:
        raise AdapterInvalidError(
            _TASK_FIELD, f"must be a whole number from 0 to {num_tasks - 1}, not {shown(str(value))}"
        )
    return value


def _check(
    config: _Config, shapes: Mapping[str, tuple[int, ...]], base: BaseDescription, base_model: str
) -> None:
    check_tensor_names(shapes, (PROMPT_EMBEDDINGS, _COLUMNS, _ROWS))
    check_prompt(config.prompt, shapes[PROMPT_EMBEDDINGS], base, base_model)
    tasks, ranks = config.num_tasks, config.num_ranks
    check_shape(_COLUMNS, shapes[_COLUMNS], (tasks, config.prompt.num_virtual_tokens, ranks))
    check_shape(_ROWS, shapes[_ROWS], (tasks, ranks, base.embedding_size))
