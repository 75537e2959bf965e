"""From a parsed ``config.json`` to the model that it describes, by its family's function."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from manyhats.engine.errors import ModelError
from manyhats.engine.model.families.bert import (
    albert,
    bert,
    camembert,
    distilbert,
    electra,
    roberta,
    xlm_roberta,
)
from manyhats.engine.model.families.cohere import cohere, cohere2
from manyhats.engine.model.families.fields import RawConfig, standard_names
from manyhats.engine.model.families.gemma import gemma, gemma2, gemma3_text
from manyhats.engine.model.families.gpt2 import gpt2, gptj, starcoder2
from manyhats.engine.model.families.granite import granite
from manyhats.engine.model.families.llama import llama, mistral
from manyhats.engine.model.families.mixtral import mixtral, qwen3_moe
from manyhats.engine.model.families.modernbert import modernbert
from manyhats.engine.model.families.neox import falcon, gpt_neox
from manyhats.engine.model.families.olmo import olmo2
from manyhats.engine.model.families.opt import opt
from manyhats.engine.model.families.phi import phi, phi3
from manyhats.engine.model.families.qwen import qwen2, qwen3
from manyhats.engine.model.families.smollm import smollm3
from manyhats.engine.model.layout import Family

FAMILIES: Mapping[str, Callable[[RawConfig, int | None], Family]] = {
    "albert": albert,
    "bert": bert,
    "camembert": camembert,
    "cohere": cohere,
    "cohere2": cohere2,
    "distilbert": distilbert,
    "electra": electra,
    "falcon": falcon,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "gptj": gptj,
    "granite": granite,
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "modernbert": modernbert,
    "olmo2": olmo2,
    "opt": opt,
    "phi": phi,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "roberta": roberta,
    "smollm3": smollm3,
    "starcoder2": starcoder2,
    "xlm-roberta": xlm_roberta,
}
"""``model_type`` → its function."""

_ENCODER_DECODER = "an encoder-decoder; models of one stack are served"
_STATES = "layers that keep a state instead of keys and values"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("bart", "mbart", "mt5", "t5", "umt5"), _ENCODER_DECODER),
    **dict.fromkeys(("deberta", "deberta-v2"), "attention by relative positions, which adapters change too"),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), "latent attention, whose keys and values are compressed"),
    "gemma3": "a model of images as well; its text model, gemma3_text, is served",
    **dict.fromkeys(
        ("gemma3n", "gemma4"), "embeddings for each layer, and keys and values shared among layers"
    ),
    **dict.fromkeys(("jamba", "mamba", "mamba2", "falcon_mamba", "granitemoehybrid"), _STATES),
    "lfm2": "convolutions in place of attention",
    "llama4": "attention in pieces of the text, and experts",
    "mpnet": "scores that depend on the tokens' distance",
    "qwen2_moe": "an expert that all tokens share; of Qwen's mixtures, qwen3_moe is served",
    **dict.fromkeys(("qwen3_5", "qwen3_next"), "gated delta nets, " + _STATES),
}
"""``model_type`` → why it is not served, of models that one might expect."""


def read_family(config: RawConfig, max_context_length: int | None = None) -> Family:
    """The model that a ``config.json`` describes.

    Args:
        config: the parsed file.
        max_context_length: prompt and output tokens together; None for the model's own maximum.

    Raises:
        ModelError: a model type, activation, kind of RoPE or context length that is not supported; the message lists
            what is.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        reason = f": {REFUSED[model_type]}" if model_type in REFUSED else ""
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(
            f"config.json: model_type {model_type!r} is not supported{reason}; these are: {known}"
        )
    try:
        return FAMILIES[model_type](standard_names(config), max_context_length)
    except (TypeError, ZeroDivisionError) as error:
        raise ModelError(f"config.json: a field has the wrong type or is 0: {error}") from error
