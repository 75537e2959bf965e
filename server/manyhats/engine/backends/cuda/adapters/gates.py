"""Launches what finds the gates of texts."""

from __future__ import annotations

from torch import Tensor

from manyhats.engine.backends.cuda.adapters.layout import PREFIX, GroupPlace
from manyhats.engine.backends.cuda.adapters.step import StepAdapters, Workspace
from manyhats.engine.backends.cuda.attention.attend import PrefixGates
from manyhats.engine.backends.cuda.record import LinearWord, PrefixWord
from manyhats.engine.backends.cuda.triton import gates

_INPUT_TILE = 512
_TEXT_TILE = 128


def find_gates(step: StepAdapters, place: GroupPlace, x: Tensor, work: Workspace) -> PrefixGates | None:
    """Find the gates of a group's linears and, if it is the attention's, of the layer's KV prefixes.

    Args:
        step: the step's adapters.
        place: the group.
        x: [N, K] bfloat16 or float32, contiguous: what its linears read, before any adapter rescales it.
        work: the workspace; it holds the gates until those of another place are found.

    Returns:
        What attention multiplies keys and values with; None if no adapter has such gates.
    """
    has_prefix = place.prefix is not None and PREFIX in step.acting.gates
    if place.name not in step.acting.gates and not has_prefix:
        return None
    members, word = len(place.sizes), place.members + LinearWord.GATE
    num_gates = members + len(PrefixWord) * has_prefix
    gates.open_gates[step.max_rows, num_gates](
        x, work.gates, *step.of_rows, step.records.stride(0), word, len(LinearWord), place.prefix or 0, place.d_in,
        MEMBERS=members, BLOCK=_INPUT_TILE, enable_fp_fusion=True,
    )  # fmt: skip
    close_gates(step, word, members, work, place.prefix if has_prefix else None)
    if not has_prefix:
        return None
    assert step.texts is not None
    return PrefixGates(work.prefix_gates, step.texts.starts)


def close_gates(
    step: StepAdapters, word: int, members: int, work: Workspace, prefix: int | None = None
) -> None:
    """From rows' sigmoids to the means of their texts, in place.

    Args:
        step: the step's adapters.
        word: of the first gate.
        members: how many there are, of linears side by side or of one bottleneck.
        work: the workspace.
        prefix: the word of the first gate of KV prefixes, of which there are two more; None for none.
    """
    texts = step.texts
    assert texts is not None, "gates are of an encoder's texts"
    assert len(work.prefix_gates) >= texts.max_texts
    gates.close_gates[texts.max_texts, members + len(PrefixWord) * (prefix is not None)](
        work.gates, work.prefix_gates, texts.items, texts.num_texts, step.records, step.records.stride(0),
        word, len(LinearWord), prefix or 0, MEMBERS=members, BLOCK=_TEXT_TILE, enable_fp_fusion=True,
    )  # fmt: skip
