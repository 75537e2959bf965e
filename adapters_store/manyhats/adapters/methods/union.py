"""Several methods that were trained together, as AdapterHub saves a union of configs: MAM and UniPELT, for example.

Source: He et al. 2022 (arXiv:2110.04366); Mao et al. 2022 (arXiv:2110.07577).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from manyhats.adapters.artifact import AdapterArtifact, AdapterMethod
from manyhats.adapters.errors import AdapterUnsupportedError
from manyhats.adapters.formats.adapterhub import format as adapterhub_format
from manyhats.adapters.formats.adapterhub.union import split
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.method import Candidate, Method, OnAnyBase
from manyhats.adapters.primitives import Delta, KVPrefix, LoweredAdapter, PromptEmbeddings
from manyhats.adapters.sites import BaseDescription


@dataclass(frozen=True, slots=True)
class UnionMethod(OnAnyBase):
    """All of its parts together, each as if it were alone: no two act at one place.

    Attributes:
        methods: of AdapterHub's directories.
    """

    methods: Mapping[AdapterMethod, Method]

    @property
    def method(self) -> AdapterMethod:
        """UNION."""
        return AdapterMethod.UNION

    def check(self, candidate: Candidate, base: BaseDescription, limits: AdapterLimits) -> None:
        """Refuse what a part would be refused for, and two parts with virtual tokens."""
        virtual = False
        for config, names in split(candidate.config, candidate.shapes):
            shapes = {name: candidate.shapes[name] for name in candidate.shapes if name in names}
            method = self.methods[adapterhub_format.recognise(config)]
            method.check(replace(candidate, config=config, shapes=shapes), base, limits)
            has_virtual = method.method in (AdapterMethod.PREFIX_TUNING, AdapterMethod.PROMPT_TUNING)
            if virtual and has_virtual:
                raise AdapterUnsupportedError(
                    "configs", "has both a prefix and a prompt; at most one part may have virtual tokens"
                )
            virtual |= has_virtual

    def lower(self, artifact: AdapterArtifact, base: BaseDescription) -> LoweredAdapter:
        """The deltas of all parts, and the virtual tokens of the one that has any."""
        deltas: list[Delta] = []
        prefix: KVPrefix | PromptEmbeddings | None = None
        for config, names in split(artifact.config, artifact.tensors):
            tensors = {name: artifact.tensors[name] for name in artifact.tensors if name in names}
            method = self.methods[adapterhub_format.recognise(config)]
            lowered = method.lower(replace(artifact, config=config, tensors=tensors), base)
            deltas += lowered.deltas
            prefix = prefix or lowered.prefix
        return LoweredAdapter(artifact.digest, tuple(deltas), prefix)
