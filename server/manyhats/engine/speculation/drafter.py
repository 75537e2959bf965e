"""One sequence's drafts: what it proposes, and how much."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from manyhats.engine.speculation.pace import Pace
from manyhats.engine.speculation.propose import PromptLookup


class Drafter:
    """Drafts a sequence's next tokens from its prompt and output.

    Args:
        prompt_token_ids: without virtual tokens.
        likeness: see ``PromptLookup``.
        ends: tokens that end the answer, which are no use as drafts: nothing is computed after them.
        max_tokens: of one step.
    """

    def __init__(
        self,
        prompt_token_ids: Sequence[int],
        likeness: Callable[[int], int],
        ends: Collection[int],
        max_tokens: int,
    ) -> None:
        self._lookup = PromptLookup(prompt_token_ids, likeness)
        self._pace = Pace(max_tokens)
        self._ends = frozenset(ends)

    def draft(self, room: int) -> list[int]:
        """At most ``room`` tokens that may come next; a single one, where there is room for more, is not worth it."""
        num_tokens = min(room, self._pace.next()) if room > 0 else 0
        drafts = self._lookup.propose(num_tokens, self._ends) if num_tokens else []
        return drafts if len(drafts) >= min(2, num_tokens) else []

    def take(self, token_ids: Sequence[int], drafts: Sequence[int]) -> int:
        """Add a step's tokens; returns how many of its drafts were right."""
        for token_id in token_ids:
            self._lookup.append(token_id)
        num_right = sum(token_id == draft for token_id, draft in zip(token_ids, drafts, strict=False))
        if drafts:
            self._pace.note(len(drafts), num_right)
        return num_right
