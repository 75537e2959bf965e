"""Prompt tuning: trained embeddings of virtual tokens before the sequence, in PEFT's layout.

Source: Lester et al. 2021 (arXiv:2104.08691).
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.errors import AdapterError
from manyhats.adapters.formats.peft.prompt_config import PROMPT_EMBEDDINGS
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.methods.prompt_tuning import as_first_layer_reads
from manyhats.adapters.sites import BaseDescription
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.trainer.errors import BaseError, SettingError
from manyhats.trainer.methods.initialization import normal
from manyhats.trainer.methods.parametrized import ParametrizedAdapter
from manyhats.trainer.methods.peft_config import peft_config
from manyhats.trainer.methods.virtual_tokens import check_num_virtual_tokens, prompt_fields
from manyhats.trainer.settings.methods import PromptSettings

_PEFT_NAMES = {"text": "TEXT", "vocabulary": "SAMPLE_VOCAB", "random": "RANDOM"}


def make_prompt(
    settings: PromptSettings, model: LoadedModel, generator: Generator, limits: AdapterLimits
) -> ParametrizedAdapter:
    """A fresh prompt: embeddings of a text's tokens or of random tokens, or standard normal values.

    Raises:
        SettingError: too many virtual tokens, an unknown ``init``, or a text without tokens.
        BaseError: virtual tokens are not served on the base's architecture.
    """
    check_num_virtual_tokens(settings.num_virtual_tokens, model, limits)
    has_text = settings.init == "text"
    own = {
        **prompt_fields(settings.num_virtual_tokens, model),
        "prompt_tuning_init": _PEFT_NAMES.get(settings.init),
        "prompt_tuning_init_text": settings.init_text if has_text else None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": model.reference if has_text else None,
    }
    return ParametrizedAdapter(
        method=AdapterMethod.PROMPT_TUNING,
        config=peft_config("PROMPT_TUNING", model, own),
        parameters={PROMPT_EMBEDDINGS: _begin(settings, model, generator)},
        base=model.description,
    )


def _begin(settings: PromptSettings, model: LoadedModel, generator: Generator) -> nn.Parameter:
    """The initial values, [P, E]."""
    count = settings.num_virtual_tokens
    match settings.init:
        case "random":
            return normal(count, model.architecture.embedding.size, generator)
        case "vocabulary":
            ids = torch.randint(model.architecture.vocab_size, (count,), generator=generator)
        case "text":
            ids = torch.tensor(_text_ids(settings, model))
        case _:
            raise SettingError("init", f"must be one of {', '.join(_PEFT_NAMES)}, not {settings.init!r}")
    rows = model.weights.embedding.detach()[ids.to(model.weights.embedding.device)].float().cpu()
    return nn.Parameter(rows * _stored_factor(model.description))


def _text_ids(settings: PromptSettings, model: LoadedModel) -> list[int]:
    """P token ids: the text's, repeated if it is too short, cut if it is too long."""
    if not model.tokenizer.encode(settings.init_text, add_special_tokens=False):
        raise SettingError("init_text", "has no tokens")
    ids = model.tokenizer.encode(settings.init_text, add_special_tokens=True)
    num_embeddings = len(model.weights.embedding)
    if max(ids) >= num_embeddings:
        piece = model.tokenizer.piece(max(ids))
        raise SettingError(
            "init_text",
            f"has the token {max(ids)} ({piece!r}); the base's embedding has {num_embeddings} rows",
        )
    return [ids[index % len(ids)] for index in range(settings.num_virtual_tokens)]


def _stored_factor(base: BaseDescription) -> float:
    """The factor that turns an embedding into a stored prompt, which the server then reads as that embedding.

    Raises:
        BaseError: the server has no such factor for the architecture.
    """
    try:
        read: Tensor = as_first_layer_reads(torch.ones(1, 1), base)
    except AdapterError as error:
        raise BaseError(f"no prompt can be trained on this base: {error.description}") from error
    return base.embedding_scale / float(read)
