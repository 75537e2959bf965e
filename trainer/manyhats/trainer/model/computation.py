"""The device and dtype a base is computed on and in: ``auto`` resolved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from manyhats.trainer.errors import SettingError
from manyhats.trainer.settings.settings import ModelSettings

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Computation:
    """Where the decoder's products are computed, and in which dtype."""

    dtype: torch.dtype
    device: torch.device

    @property
    def dtype_name(self) -> Literal["bfloat16", "float32"]:
        """The dtype as settings name it."""
        return "bfloat16" if self.dtype == torch.bfloat16 else "float32"


def resolve_computation(settings: ModelSettings) -> Computation:
    """``auto`` is CUDA if present, and bfloat16 if the processor can multiply it.

    Raises:
        SettingError: ``device``: there is no CUDA device.
    """
    has_cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not has_cuda:
        raise SettingError("device", "there is no CUDA device; use cpu")
    is_cuda = has_cuda and settings.device != "cpu"
    device = torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")
    if settings.dtype != "auto":
        return Computation(_DTYPES[settings.dtype], device)
    return Computation(torch.bfloat16 if _multiplies_bfloat16(is_cuda) else torch.float32, device)


def _multiplies_bfloat16(is_cuda: bool) -> bool:
    if is_cuda:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Imported here: it takes seconds, and a named dtype does not depend on the processor.
    from manyhats.engine.model.nf4 import has_bf16_product

    return has_bf16_product()
