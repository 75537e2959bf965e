"""Activation functions by name, against transformers' own."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from manyhats.adapters.activations import ACTIVATIONS, ALIASES, activation_name
from manyhats.adapters.errors import AdapterInvalidError, AdapterUnsupportedError

X = torch.cat((torch.linspace(-12, 12, 481), torch.tensor([0.0, -1e-6, 1e-6])))


@pytest.mark.parametrize("name", sorted({*ACTIVATIONS, *ALIASES} - {"leakyrelu"}))
def test_functions_are_those_of_transformers(name: str) -> None:
    reference = import_module("transformers.activations").get_activation(name)
    function = ACTIVATIONS[activation_name("non_linearity", name)]
    torch.testing.assert_close(function(X), reference(X), atol=1e-6, rtol=1e-6)


def test_leakyrelu_is_adapterhubs_own_name() -> None:
    torch.testing.assert_close(ACTIVATIONS[ALIASES["leakyrelu"]](X), torch.where(X > 0, X, 0.01 * X))


def test_every_name_of_transformers_is_served_or_has_parameters() -> None:
    names = set(import_module("transformers.activations").ACT2FN)
    assert names - {*ACTIVATIONS, *ALIASES} == {"prelu", "xielu"}


def test_aliases_lead_to_functions_and_case_does_not_count() -> None:
    assert set(ALIASES.values()) <= set(ACTIVATIONS)
    assert activation_name("non_linearity", "SwiSH") == "silu"


@pytest.mark.parametrize("name", ["prelu", "xielu", "softmax", "", "__class__"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(AdapterUnsupportedError, match="non_linearity"):
        activation_name("non_linearity", name)


@pytest.mark.parametrize("value", [None, 3, ["relu"]])
def test_what_is_no_name_is_refused(value: object) -> None:
    with pytest.raises(AdapterInvalidError, match="non_linearity"):
        activation_name("non_linearity", value)
