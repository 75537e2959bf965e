"""What bitsandbytes makes of 4-bit weights, by its code for all processors.

On processors with AVX-512 it has kernels of its own: that which dequantizes takes another block's scale where blocks
span rows or do not fill the last one (0.50.2), and that which multiplies rounds to bfloat16.
"""

from __future__ import annotations

import copy
from typing import Any

from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn


def dequantized(packed: Tensor, state: Any) -> Tensor:
    """The weights, of the dtype that the state names."""
    flat = copy.copy(state)
    flat.shape = (state.shape.numel(), 1)  # rows of odd length are left to the code for all processors
    return dequantize_4bit(packed, flat).view(state.shape)


def with_dense_linears(model: nn.Module) -> nn.Module:
    """The model with a dense linear in place of each quantized one."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            dense = nn.Linear(module.in_features, module.out_features, bias=False)
            dense.weight = nn.Parameter(dequantized(module.weight.data, module.weight.quant_state))
            dense.bias = module.bias
            model.set_submodule(name, dense)
    return model
