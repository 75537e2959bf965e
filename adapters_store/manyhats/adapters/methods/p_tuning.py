"""P-tuning: virtual tokens that an encoder made; PEFT saves only the encoder's output."""

from __future__ import annotations

from dataclasses import dataclass

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.method import Candidate
from manyhats.adapters.methods.prompt_tuning import Prompts, check_plain_prompt, lower_plain_prompt
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.sites import BaseDescription

# The encoder's fields; the saved artifact does not have it.
_ENCODER_FIELDS = frozenset(
    ("encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type")
)


@dataclass(frozen=True, slots=True)
class PTuningMethod(Prompts):
    """P-tuning from a PEFT directory; served as prompt tuning is (see ``prompt_tuning``).

    Source: Liu et al. 2021 (arXiv:2103.10385), section 3.
    """

    @property
    def method(self) -> AdapterMethod:
        """P_TUNING."""
        return AdapterMethod.P_TUNING

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse embeddings whose size is not the base's."""
        check_plain_prompt(candidate, base, limits, _ENCODER_FIELDS)

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """The encoder's output."""
        return lower_plain_prompt(artifact, base, _ENCODER_FIELDS)
