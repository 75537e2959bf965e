"""Adapters that PEFT makes, runs on batches of rows end to end, and saves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.settings import (
    AdaLoraSettings,
    MultitaskSettings,
    PeftSettings,
    PromptOverSettings,
    VeraSettings,
)
from manyhats.engine.checkpoints.fetch import locate_model
from manyhats.engine.home import default_home
from manyhats.trainer.data.batch import TrainingBatch

BASE_ALIAS = "smollm2-135m-instruct"
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_TASK = "CAUSAL_LM"


def attach(model: Any, settings: PeftSettings, *, num_steps: int, over: Path | None) -> PeftAdapter:
    """Put an untrained adapter on a model, which it freezes.

    Args:
        model: the base, as transformers' causal language model.
        settings: which adapter.
        num_steps: that it will be trained for.
        over: a trained LoRA that acts on everything the adapter sees.
    """
    if over is not None:
        # Merged it computes the same in float32; the artifact stays a part of its own.
        model = PeftModel.from_pretrained(model, str(over)).merge_and_unload()
    model.requires_grad_(False)
    match settings:
        case AdaLoraSettings():
            return PrunedDeltas(model, _adalora_config(settings, num_steps))
        case VeraSettings():
            return Deltas(model, _vera_config(settings))
        case PromptOverSettings():
            return Prompt(model, PromptTuningConfig(**_begun_as(settings.num_virtual_tokens, settings.text)))
        case MultitaskSettings():
            return MultitaskPrompt(model, _multitask_config(settings))


def _adalora_config(settings: AdaLoraSettings, num_steps: int) -> AdaLoraConfig:
    return AdaLoraConfig(
        init_r=settings.initial_rank,
        target_r=settings.target_rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.target_modules),
        tinit=num_steps // 5,
        tfinal=num_steps // 3,
        total_step=num_steps,
        task_type=_TASK,
    )


def _vera_config(settings: VeraSettings) -> VeraConfig:
    return VeraConfig(
        r=settings.rank,
        target_modules=list(settings.target_modules),
        save_projection=True,
        task_type=_TASK,
    )


def _multitask_config(settings: MultitaskSettings) -> MultitaskPromptTuningConfig:
    return MultitaskPromptTuningConfig(
        num_tasks=1, num_ranks=settings.rank, **_begun_as(settings.num_virtual_tokens, settings.text)
    )


def _begun_as(num_virtual_tokens: int, text: str) -> dict[str, Any]:
    """PEFT keeps where the tokenizer lies; when the adapter is saved, the base's name is written instead."""
    directory = locate_model(BASE_ALIAS, default_home()).directory
    return {
        "num_virtual_tokens": num_virtual_tokens,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": text,
        "tokenizer_name_or_path": str(directory),
        "task_type": _TASK,
    }


class PeftAdapter(ABC):
    """A PEFT model around a frozen base, and the artifact it saves."""

    def __init__(self, model: Any, config: PeftConfig) -> None:
        self._model: Any = get_peft_model(model, config)
        self._model.train()
        self._causal_lm: Any = self._model.get_base_model()

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """What is trained."""
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def loss(self, batch: TrainingBatch) -> Tensor:
        """The mean cross-entropy of a batch's targets; the output head runs on their rows only."""
        logits = self._causal_lm.lm_head(self.hidden(batch)[batch.predictors])
        return nn.functional.cross_entropy(logits, batch.targets)

    @abstractmethod
    def hidden(self, batch: TrainingBatch) -> Tensor:
        """The last hidden states of a batch's tokens, [N, D]."""

    def penalty(self) -> Tensor:
        """What the method adds to the loss; a scalar."""
        return torch.zeros(())

    def after_step(self, step: int) -> None:
        """What the method does after an optimizer step, while the gradients are there; ``step`` counts from 1."""
        return

    def save(self, directory: Path) -> None:
        """Write the artifact as PEFT does: matrices in bfloat16, vectors in float32."""
        config: Any = self._model.peft_config["default"]
        config.base_model_name_or_path = BASE_NAME
        if getattr(config, "target_modules", None) is not None:
            # PEFT keeps a set, whose order differs from run to run.
            config.target_modules = sorted(config.target_modules)
        if getattr(config, "tokenizer_name_or_path", None) is not None:
            config.tokenizer_name_or_path = BASE_NAME
        # Embeddings are not trained; asking PEFT to look whether they were would look for the base on the hub.
        self._model.save_pretrained(str(directory), save_embedding_layers=False)
        path = directory / "adapter_model.safetensors"
        save_file(
            {name: _halved(tensor) for name, tensor in load_file(path).items()},
            path,
            metadata={"format": "pt"},
        )
        # The library that writes safetensors lets nobody else read them.
        for written in directory.iterdir():
            written.chmod(0o644)


class Deltas(PeftAdapter):
    """VeRA: the base's forward with other linears."""

    def hidden(self, batch: TrainingBatch) -> Tensor:
        states: Tensor = self._causal_lm.model(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            attention_mask=visible_tokens(batch)[None, None],
            use_cache=False,
        ).last_hidden_state[0]
        return states


class PrunedDeltas(Deltas):
    """AdaLoRA: singular values lose their place step by step; their matrices are kept near orthogonal."""

    def penalty(self) -> Tensor:
        """PEFT's term: the mean of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ over all linears, times its weight."""
        distances = []
        for name, parameter in self._model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                gram = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
                distances.append(torch.linalg.norm(gram - torch.eye(len(gram))))
        weight: float = self._model.peft_config["default"].orth_reg_weight
        return weight * torch.stack(distances).mean()

    def after_step(self, step: int) -> None:
        self._model.base_model.update_and_allocate(step)


class Prompt(PeftAdapter):
    """Prompt tuning: virtual tokens at positions 0 to P − 1, which every token sees."""

    def hidden(self, batch: TrainingBatch) -> Tensor:
        prompt = self._model.get_prompt(batch_size=1, task_ids=torch.zeros(1, dtype=torch.long))
        size = prompt.shape[1]
        embedded = self._causal_lm.model.embed_tokens(batch.token_ids[None])
        positions = torch.cat((torch.arange(size), batch.positions + size))
        states: Tensor = self._causal_lm.model(
            inputs_embeds=torch.cat((prompt, embedded), dim=1),
            position_ids=positions[None],
            attention_mask=behind_virtual_tokens(visible_tokens(batch), size)[None, None],
            use_cache=False,
        ).last_hidden_state[0]
        return states[size:]


class MultitaskPrompt(Prompt):
    """Multitask prompt tuning: the virtual tokens times a factor of low rank."""

    def __init__(self, model: Any, config: PeftConfig) -> None:
        super().__init__(model, config)
        # PEFT's factors begin with a product near 0, from which a short training does not get away: begin near 1.
        encoder = self._model.prompt_encoder["default"]
        encoder.prefix_task_cols.data[:, :, 0] = 1
        encoder.prefix_task_rows.data[:, 0] = 1


def visible_tokens(batch: TrainingBatch) -> Tensor:
    """[N, N] bool: entry (q, k) says whether token q attends to token k.

    A token sees its own row up to itself, and the shared beginning.
    """
    owners = torch.repeat_interleave(torch.arange(len(batch.segments)), torch.tensor(batch.segments))
    is_own = owners[:, None] == owners[None, :]
    is_shared = torch.arange(len(owners)) < batch.num_shared
    return (is_own | is_shared[None, :]).tril()


def behind_virtual_tokens(mask: Tensor, size: int) -> Tensor:
    """A mask [N, N] with ``size`` virtual tokens ahead, which all tokens see: [P + N, P + N]."""
    whole = torch.ones(size + len(mask), size + len(mask), dtype=torch.bool).tril()
    whole[size:, size:] = mask
    return whole


def _halved(tensor: Tensor) -> Tensor:
    """Matrices in bfloat16, vectors (of factors around 1, which it would round too coarsely) in float32."""
    is_matrix = sum(size > 1 for size in tensor.shape) > 1
    return tensor.to(torch.bfloat16 if is_matrix else torch.float32).contiguous()
