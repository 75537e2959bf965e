"""What is asked of the grammar library, llguidance: constraints in its notation, within bounds.

It is imported only where a constraint is compiled: most servers never see one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from manyhats.engine.constraint import Constraint

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

Vocabulary = LLTokenizer
State = LLMatcher

_LIMITS = LLParserLimits(
    # Ordinary schemas use a quarter of this; hostile grammars get no further than 25 ms in one step.
    step_lexer_fuel=20_000,
    step_max_items=20_000,
    # Of all answers in one grammar together: they share its lexer.
    max_lexer_states=50_000,
    verbose_errors=False,
)
# They stand above what a schema says itself under "x-guidance".
_JSON_OPTIONS: JsonCompileOptions = {
    # A space, or a line break and its indentation. With no bound a model may print spaces for ever.
    "whitespace_pattern": r"(?: |\n[ \t]{0,32})",
    "whitespace_flexible": True,
    "item_separator": ",",
    "key_separator": ":",
    # What it cannot do exactly is refused.
    "lenient": False,
    "coerce_one_of": False,
}
# Sets of tokens that masks take whole where a lexeme allows all of them. Those of letters make masks of expressions as
# "[A-Za-z ,.]{400,600}" a hundred times cheaper; the library's own are for strings in JSON.
_SLICES = [
    *(f"{letters}{{1,{length}}}" for letters in ("[a-z ]", "[a-zA-Z ]") for length in (10, 30)),
    *LLTokenizer.general_slices(),
]
_MAX_MESSAGE_LENGTH = 500
_MAX_LINE_LENGTH = 160
# The grammar's lines around an error, and marks below them.
_QUOTED = re.compile(r" *\d+ \| | *\^+ *$")


class RefusedError(Exception):
    """The library refuses a grammar or a tokenizer; the message says why."""


def make_vocabulary(
    tokenizer: str, num_tokens: int, num_ids: int, eos_token_ids: Collection[int]
) -> Vocabulary:
    """The tokens that grammars choose from.

    Args:
        tokenizer: the content of ``tokenizer.json``.
        num_tokens: how many ids it has.
        num_ids: how many ids masks have, at least as many.
        eos_token_ids: the ids that end an answer, below ``num_ids``; without any, one more id stands for the end.

    Raises:
        RefusedError: the library cannot read this kind of tokenizer.
    """
    eos, num_ids = (sorted(eos_token_ids), num_ids) if eos_token_ids else ([num_ids], num_ids + 1)
    if eos[-1] >= num_tokens:
        tokenizer = _with_tokens(tokenizer, range(num_tokens, eos[-1] + 1))
    try:
        return LLTokenizer(tokenizer, n_vocab=num_ids, eos_token=eos, slices=_SLICES)
    except ValueError as error:
        raise RefusedError(f"this model's tokenizer cannot be constrained: {shortened(str(error))}") from None


def _with_tokens(tokenizer: str, token_ids: Sequence[int]) -> str:
    """A tokenizer that also has these ids, which follow on its own and stand for no text."""
    content = json.loads(tokenizer)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] += [
        {"id": each, "content": f"<[no text {each}]>", "special": True, **flags} for each in token_ids
    ]
    return json.dumps(content)


def notation(constraint: Constraint) -> str:
    """A constraint in the library's notation.

    Raises:
        RefusedError: the library cannot read it.
    """
    text = constraint.texts[0]
    match constraint.kind:
        case "json_schema":
            return _of_schema(text)
        case "regex":
            return LLMatcher.grammar_from_regex(text)
        case "grammar":
            return LLMatcher.grammar_from_lark(text)
        case "choice":
            return LLMatcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, constraint.texts))}")
        case "tools":
            grammars = [{"lark_grammar": text}]
            for index, schema in enumerate(constraint.schemas):
                (grammar,) = json.loads(_of_schema(schema))["grammars"]
                grammars.append({**grammar, "name": f"schema_{index}"})
            return json.dumps({"grammars": grammars})


def _of_schema(schema: str) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
    except ValueError as error:
        raise RefusedError(shortened(str(error))) from None


def compiled(vocabulary: Vocabulary, grammar: str) -> State:
    """The state before an answer's first token.

    Raises:
        RefusedError: the grammar has an error, needs what the library lacks, or is over a bound.
    """
    state = LLMatcher(vocabulary, grammar, log_level=0, limits=_LIMITS)
    if state.is_error():
        raise RefusedError(message_of(state))
    return state


def refusal_of(vocabulary: Vocabulary, constraint: Constraint, error: RefusedError) -> str:
    """Why a constraint was refused; of several schemas, the first that is refused by itself is named by its place."""
    if len(constraint.schemas) > 1:
        for index, schema in enumerate(constraint.schemas):
            try:
                compiled(vocabulary, _of_schema(schema))
            except RefusedError as own:
                return f"the parameters of function {index + 1} of {len(constraint.schemas)}: {own}"
    return str(error)


def message_of(state: State) -> str:
    """What went wrong with a state that is in error."""
    message = shortened(state.get_error().partition("<non-verbose/>")[0])
    return "no token of this model can come next" if message in ("", "NoExtensionBias") else message


def shortened(text: str) -> str:
    """A message of the library, of a length that callers can read: its lines may quote a whole grammar."""
    lines = (
        line if len(line) <= _MAX_LINE_LENGTH else f"{line[:40]}…{line[40 - _MAX_LINE_LENGTH :]}"
        for line in text.strip().splitlines()
        if not _QUOTED.match(line)
    )
    text = "\n".join(lines)
    return text if len(text) <= _MAX_MESSAGE_LENGTH else f"{text[:_MAX_MESSAGE_LENGTH]}…"
