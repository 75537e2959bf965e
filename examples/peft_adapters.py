"""Adapters that PEFT makes and saves, on batches of packed examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.packing import PackedBatch
from examples.settings import (
    AdaLoraSettings,
    Ia3Settings,
    LoraSettings,
    MultitaskSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
    VeraSettings,
)
from manyhats.engine.model.directories import default_home
from manyhats.engine.model.fetch import locate_model

BASE_ALIAS = "smollm2-135m-instruct"
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_TASK = "CAUSAL_LM"


def delta_config(
    settings: LoraSettings | AdaLoraSettings | VeraSettings | Ia3Settings, num_steps: int
) -> PeftConfig:
    """PEFT's config of an adapter that acts on linears."""
    match settings:
        case LoraSettings():
            return LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,
                target_modules=list(settings.target_modules),
                use_rslora=settings.use_rslora,
                use_dora=settings.use_dora,
                task_type=_TASK,
            )
        case AdaLoraSettings():
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
        case VeraSettings():
            return VeraConfig(
                r=settings.rank,
                target_modules=list(settings.target_modules),
                save_projection=True,
                task_type=_TASK,
            )
        case Ia3Settings():
            return IA3Config(
                target_modules=[*settings.outputs, *settings.inputs],
                feedforward_modules=list(settings.inputs),
                task_type=_TASK,
            )


def prompt_config(
    settings: PrefixSettings | PromptSettings | PTuningSettings | MultitaskSettings,
) -> PeftConfig:
    """PEFT's config of virtual tokens."""
    fields: dict[str, Any] = {"num_virtual_tokens": settings.num_virtual_tokens, "task_type": _TASK}
    match settings:
        case PrefixSettings():
            return PrefixTuningConfig(
                prefix_projection=True, encoder_hidden_size=settings.projection_size, **fields
            )
        case PTuningSettings():
            return PromptEncoderConfig(encoder_hidden_size=settings.encoder_size, **fields)
        case PromptSettings():
            return PromptTuningConfig(**_begun_as(settings.text), **fields)
        case MultitaskSettings():
            start = _begun_as(settings.text)
            return MultitaskPromptTuningConfig(num_tasks=1, num_ranks=settings.rank, **start, **fields)


def _begun_as(text: str) -> dict[str, Any]:
    """PEFT keeps where the tokenizer lies; when the adapter is saved, the base's name is written instead."""
    directory = locate_model(BASE_ALIAS, default_home()).directory
    return {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": text,
        "tokenizer_name_or_path": str(directory),
    }


class _Peft:
    """A PEFT model, and the artifact it saves."""

    def __init__(self, model: Any, config: PeftConfig) -> None:
        self._model: Any = get_peft_model(model, config)
        self._model.train()
        self._causal_lm: Any = self._model.get_base_model()

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def penalty(self) -> Tensor:
        return torch.zeros(())

    def after_step(self, step: int) -> None:
        pass

    def save(self, directory: Path) -> None:
        config: Any = self._model.peft_config["default"]
        config.base_model_name_or_path = BASE_NAME
        for field in ("target_modules", "feedforward_modules"):
            # PEFT keeps sets, whose order differs from run to run.
            if getattr(config, field, None) is not None:
                setattr(config, field, sorted(getattr(config, field)))
        if getattr(config, "tokenizer_name_or_path", None) is not None:
            config.tokenizer_name_or_path = BASE_NAME
        # Embeddings are not trained; asking PEFT to look whether they were would look for the base on the hub.
        self._model.save_pretrained(str(directory), save_embedding_layers=False)
        path = directory / "adapter_model.safetensors"
        save_file(
            {name: halved(tensor) for name, tensor in load_file(path).items()},
            path,
            metadata={"format": "pt"},
        )
        # The library that writes safetensors lets nobody else read them.
        for written in directory.iterdir():
            written.chmod(0o644)


class Deltas(_Peft):
    """LoRA, DoRA, VeRA, IA3: the base's forward with other linears."""

    def hidden(self, batch: PackedBatch) -> Tensor:
        states: Tensor = self._causal_lm.model(
            input_ids=batch.token_ids,
            position_ids=batch.positions,
            attention_mask=batch.mask,
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


class Prompt(_Peft):
    """Prompt tuning and its kin: virtual tokens at positions 0 to P − 1, which every token sees."""

    def __init__(self, model: Any, config: PeftConfig) -> None:
        super().__init__(model, config)
        if isinstance(config, MultitaskPromptTuningConfig):
            # PEFT's factors begin with a product near 0, from which a short training does not get away: begin near 1.
            encoder = self._model.prompt_encoder["default"]
            encoder.prefix_task_cols.data[:, :, 0] = 1
            encoder.prefix_task_rows.data[:, 0] = 1

    def hidden(self, batch: PackedBatch) -> Tensor:
        prompt = self._model.get_prompt(batch_size=1, task_ids=torch.zeros(1, dtype=torch.long))
        size = prompt.shape[1]
        embeddings = torch.cat((prompt, self._causal_lm.model.embed_tokens(batch.token_ids)), dim=1)
        states: Tensor = self._causal_lm.model(
            inputs_embeds=embeddings,
            position_ids=torch.cat((torch.arange(size)[None], batch.positions + size), dim=1),
            attention_mask=behind_virtual_tokens(batch.mask, size, are_rows=True),
            use_cache=False,
        ).last_hidden_state[0]
        return states[size:]


class Prefix(_Peft):
    """Prefix tuning: keys and values of P virtual tokens, which every token sees; the first has position P."""

    def hidden(self, batch: PackedBatch) -> Tensor:
        cache: Any = self._model.get_prompt(batch_size=1)
        size = cache.get_seq_length()
        states: Tensor = self._causal_lm.model(
            input_ids=batch.token_ids,
            position_ids=batch.positions + size,
            attention_mask=behind_virtual_tokens(batch.mask, size, are_rows=False),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[0]
        return states


def behind_virtual_tokens(mask: Tensor, size: int, *, are_rows: bool) -> Tensor:
    """A mask [1, 1, T, T] with ``size`` virtual tokens ahead: [1, 1, T, P + T], or [1, 1, P + T, P + T] with rows."""
    length = mask.shape[-1]
    seen = torch.cat((torch.ones(1, 1, length, size, dtype=torch.bool), mask), dim=-1)
    if not are_rows:
        return seen
    own = torch.ones(size, size, dtype=torch.bool).tril()
    rows = torch.cat((own, torch.zeros(size, length, dtype=torch.bool)), dim=-1)
    return torch.cat((rows[None, None], seen), dim=-2)


def halved(tensor: Tensor) -> Tensor:
    """Matrices in bfloat16, vectors (of factors around 1, which it would round too coarsely) in float32."""
    is_matrix = sum(size > 1 for size in tensor.shape) > 1
    return tensor.to(torch.bfloat16 if is_matrix else torch.float32).contiguous()
