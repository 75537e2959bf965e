"""P-tuning: embeddings of virtual tokens, made by an MLP in training; PEFT saves only its output.

Source: Liu et al. 2021 (arXiv:2103.10385), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Generator, Tensor
from torch.nn import functional

from manyhats.adapters.artifact import AdapterMethod
from manyhats.adapters.formats.peft.prompt_config import PROMPT_EMBEDDINGS
from manyhats.adapters.limits import AdapterLimits
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.trainer.methods.initialization import linear, normal
from manyhats.trainer.methods.parametrized import ParametrizedAdapter
from manyhats.trainer.methods.peft_config import peft_config
from manyhats.trainer.methods.virtual_tokens import check_num_virtual_tokens, prompt_fields
from manyhats.trainer.settings.methods import PTuningSettings


def make_p_tuning(
    settings: PTuningSettings, model: LoadedModel, generator: Generator, limits: AdapterLimits
) -> ParametrizedAdapter:
    """Fresh virtual tokens and their encoder, initialized at random as in PEFT.

    Raises:
        SettingError: too many virtual tokens.
    """
    check_num_virtual_tokens(settings.num_virtual_tokens, model, limits)
    size, inner = model.architecture.embedding.size, settings.encoder_size
    own = {
        **prompt_fields(settings.num_virtual_tokens, model),
        "encoder_dropout": 0.0,
        "encoder_hidden_size": inner,
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP",
    }
    return ParametrizedAdapter(
        method=AdapterMethod.P_TUNING,
        config=peft_config("P_TUNING", model, own),
        parameters={
            "embedding.weight": normal(settings.num_virtual_tokens, size, generator),
            **linear("mlp_head.0", size, inner, generator),
            **linear("mlp_head.2", inner, inner, generator),
            **linear("mlp_head.4", inner, size, generator),
        },
        base=model.description,
        reparametrize=encode_prompt,
    )


def encode_prompt(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``W₄ relu(W₂ relu(W₀ e + b₀) + b₂) + b₄`` for every virtual token's embedding e, [P, E].

    Source: PEFT 0.21, ``PromptEncoder`` with an MLP.
    """
    x = parameters["embedding.weight"]
    for index in (0, 2, 4):
        x = functional.relu(x) if index else x
        x = functional.linear(x, parameters[f"mlp_head.{index}.weight"], parameters[f"mlp_head.{index}.bias"])
    return {PROMPT_EMBEDDINGS: x}
