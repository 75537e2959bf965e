"""Prefix tuning: trained keys and values before the sequence in every layer, in PEFT's layout.

With a projection, an embedding of each virtual token and an MLP that makes its keys and values are trained; only the
keys and values are saved, as in PEFT.

Source: Li and Liang 2021 (arXiv:2101.00190), section 4.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.formats.peft.prompt_config import PROMPT_EMBEDDINGS
from manyhats.adapters.limits import AdapterLimits
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.trainer.errors import BaseError
from manyhats.trainer.methods.initialization import linear, normal
from manyhats.trainer.methods.parametrized import ParametrizedAdapter
from manyhats.trainer.methods.peft_config import peft_config
from manyhats.trainer.methods.virtual_tokens import check_num_virtual_tokens
from manyhats.trainer.settings.methods import PrefixSettings


def make_prefix(
    settings: PrefixSettings, model: LoadedModel, generator: Generator, limits: AdapterLimits
) -> ParametrizedAdapter:
    """A fresh prefix, initialized at random as in PEFT: it has an effect from the first step.

    Raises:
        SettingError: too many virtual tokens.
        BaseError: the base's key heads are unknown.
    """
    check_num_virtual_tokens(settings.num_virtual_tokens, model, limits)
    base = model.description
    if base.num_kv_heads < 1 or base.head_dim < 1:
        raise BaseError("the base's key heads are unknown, so it cannot have a prefix of keys and values")
    token_dim = base.num_kv_heads * base.head_dim
    width = 2 * base.num_layers * token_dim
    if settings.projection_size:
        parameters = {
            "embedding.weight": normal(settings.num_virtual_tokens, token_dim, generator),
            **linear("transform.0", token_dim, settings.projection_size, generator),
            **linear("transform.2", settings.projection_size, width, generator),
        }
    else:
        parameters = {PROMPT_EMBEDDINGS: normal(settings.num_virtual_tokens, width, generator)}
    return ParametrizedAdapter(
        method=AdapterMethod.PREFIX_TUNING,
        config=peft_config("PREFIX_TUNING", model, _fields(settings, model, token_dim)),
        parameters=parameters,
        base=base,
        reparametrize=project_prefix if settings.projection_size else None,
    )


def project_prefix(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys and values of every virtual token: ``W₂ tanh(W₀ e + b₀) + b₂``, [P, 2 · L · Hkv · K].

    Source: Li and Liang 2021 (arXiv:2101.00190), section 4.3; layout: PEFT 0.21, ``PrefixEncoder``.
    """
    hidden = functional.linear(
        parameters["embedding.weight"], parameters["transform.0.weight"], parameters["transform.0.bias"]
    )
    projected = functional.linear(
        torch.tanh(hidden), parameters["transform.2.weight"], parameters["transform.2.bias"]
    )
    return {PROMPT_EMBEDDINGS: projected}


def _fields(settings: PrefixSettings, model: LoadedModel, token_dim: int) -> dict[str, Any]:
    """PEFT counts key heads, and a virtual token's features in one layer's keys."""
    return {
        "encoder_hidden_size": settings.projection_size or token_dim,
        "init_weights": None,
        "num_attention_heads": model.description.num_kv_heads,
        "num_layers": model.description.num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": settings.num_virtual_tokens,
        "prefix_projection": settings.projection_size > 0,
        "token_dim": token_dim,
    }
