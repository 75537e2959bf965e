import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from manyhats.engine.output import FinishReason
from manyhats.engine.request import StoppingParams
from manyhats.engine.text.stopping import StopChecker

EOS, STOP, WORD = 0, 7, 5


def run(
    params: StoppingParams, tokens: list[tuple[int, str]], eos: frozenset[int] = frozenset({EOS})
) -> tuple[list[str], FinishReason | None]:
    """The text let out after each token, and why it ended."""
    checker = StopChecker(params, eos)
    emitted: list[str] = []
    for count, (token_id, text) in enumerate(tokens, start=1):
        out, reason = checker.push(token_id, text, count)
        emitted.append(out)
        if reason is not None:
            assert checker.flush() == ""
            return emitted, reason
    return [*emitted, checker.flush()], None


def words(*texts: str) -> list[tuple[int, str]]:
    return [(WORD, text) for text in texts]


def test_without_stops_text_passes_at_once() -> None:
    assert run(StoppingParams(), words("a", "", "bc")) == (["a", "", "bc", ""], None)


def test_a_stop_sequence_across_tokens_is_held_back_and_left_out() -> None:
    params = StoppingParams(stop_sequences=("END",))
    assert run(params, words("go E", "N", "D more")) == (["go ", "", ""], FinishReason.STOP_SEQUENCE)


def test_what_turns_out_not_to_be_a_stop_is_let_out() -> None:
    params = StoppingParams(stop_sequences=("END",))
    assert run(params, words("E", "NE", "X")) == (["", "EN", "EX", ""], None)


def test_held_text_is_let_out_when_something_else_ends_it() -> None:
    params = StoppingParams(stop_sequences=("END",))
    assert run(params, words("a EN")) == (["a ", "EN"], None)
    assert run(params, [*words("a EN"), (EOS, "")]) == (["a ", "EN"], FinishReason.EOS)


def test_text_after_a_stop_within_one_token_is_dropped() -> None:
    params = StoppingParams(stop_sequences=("\n",))
    assert run(params, words("one\ntwo\n")) == (["one"], FinishReason.STOP_SEQUENCE)


def test_the_stop_is_kept_where_asked_for() -> None:
    params = StoppingParams(stop_sequences=("END",), include_stop_sequence=True)
    assert run(params, words("go E", "ND more")) == (["go ", "END"], FinishReason.STOP_SEQUENCE)


@pytest.mark.parametrize("stops", [("abcd", "bc"), ("bc", "abcd")])
def test_the_sequence_that_is_complete_first_wins(stops: tuple[str, ...]) -> None:
    for texts in (["xabcd"], ["xab", "cd"], ["x", "a", "b", "c", "d"]):
        emitted, reason = run(StoppingParams(stop_sequences=stops), words(*texts))
        assert ("".join(emitted), reason) == ("xa", FinishReason.STOP_SEQUENCE)


def test_of_sequences_complete_together_the_longest_wins() -> None:
    emitted, _ = run(StoppingParams(stop_sequences=("c", "abc", "bc")), words("xab", "c"))
    assert "".join(emitted) == "x"


def test_a_sequence_complete_before_min_new_tokens_is_text() -> None:
    params = StoppingParams(stop_sequences=("aa",), min_new_tokens=3)
    assert run(params, words("a", "a", "b", "aa")) == (["", "a", "ab", ""], FinishReason.STOP_SEQUENCE)


def test_a_sequence_begun_before_min_new_tokens_and_complete_after_stops() -> None:
    params = StoppingParams(stop_sequences=("aa",), min_new_tokens=3)
    assert run(params, words("a", "a", "a")) == (["", "a", ""], FinishReason.STOP_SEQUENCE)


def test_eos_ends_it_without_its_text() -> None:
    assert run(StoppingParams(), [(WORD, "a"), (EOS, "</s>")]) == (["a", ""], FinishReason.EOS)


def test_ignored_eos_is_an_ordinary_token() -> None:
    params = StoppingParams(ignore_eos=True)
    assert run(params, [(EOS, "</s>"), (WORD, "a")]) == (["</s>", "a", ""], None)


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "a.")])
def test_a_stop_token_ends_it_as_a_stop_sequence_does(include: bool, text: str) -> None:
    params = StoppingParams(stop_token_ids=(STOP,), include_stop_sequence=include)
    emitted, reason = run(params, [(WORD, "a"), (STOP, ".")])
    assert ("".join(emitted), reason) == (text, FinishReason.STOP_SEQUENCE)


def test_an_eos_that_is_also_a_stop_token_is_eos() -> None:
    assert run(StoppingParams(stop_token_ids=(EOS,)), [(EOS, "")])[1] is FinishReason.EOS


def test_length_ends_it_with_all_its_text() -> None:
    params = StoppingParams(max_new_tokens=2, stop_sequences=("END",))
    assert run(params, words("a", " EN", "D")) == (["a", " EN"], FinishReason.LENGTH)


def test_a_stop_in_the_last_token_is_a_stop() -> None:
    params = StoppingParams(max_new_tokens=2, stop_sequences=("END",))
    assert run(params, words("EN", "D")) == (["", ""], FinishReason.STOP_SEQUENCE)
    assert run(params, [(WORD, "a"), (EOS, "")]) == (["a", ""], FinishReason.EOS)


def test_what_ends_it_is_forbidden_until_min_new_tokens() -> None:
    params = StoppingParams(min_new_tokens=2, stop_token_ids=(STOP, 3))
    checker = StopChecker(params, frozenset({EOS}))
    assert [checker.forbidden_ids(n) for n in (0, 1, 2)] == [(EOS, 3, STOP), (EOS, 3, STOP), ()]
    ignoring = StoppingParams(min_new_tokens=2, ignore_eos=True)
    assert StopChecker(ignoring, frozenset({EOS})).forbidden_ids(0) == ()


def reference(
    deltas: list[str], stops: list[str], min_new: int, include: bool
) -> tuple[str, FinishReason | None]:
    """Character by character over the whole text."""
    text = ""
    for count, delta in enumerate(deltas, start=1):
        for character in delta:
            text += character
            ended = [stop for stop in stops if text.endswith(stop)]
            if ended and count >= min_new:
                kept = text if include else text[: -max(map(len, ended))]
                return kept, FinishReason.STOP_SEQUENCE
    return text, None


TEXTS = st.text(alphabet="ab\n", max_size=6)


@given(
    deltas=st.lists(TEXTS, min_size=1, max_size=12),
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4),
    min_new=st.integers(0, 6),
    include=st.booleans(),
)
@example(deltas=["a", "a", "a"], stops=["aa"], min_new=3, include=False)
def test_any_text_in_any_pieces_gives_what_the_reference_gives(
    deltas: list[str], stops: list[str], min_new: int, include: bool
) -> None:
    params = StoppingParams(
        stop_sequences=tuple(stops), min_new_tokens=min_new, include_stop_sequence=include
    )
    emitted, reason = run(params, words(*deltas))
    assert ("".join(emitted), reason) == reference(deltas, stops, min_new, include)


@given(
    text=st.text(alphabet="ab\n", max_size=20), stops=st.lists(TEXTS.filter(bool), max_size=4), data=st.data()
)
def test_how_the_text_is_split_makes_no_difference(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    params = StoppingParams(stop_sequences=tuple(stops))
    whole, split = run(params, words(text)), run(params, words(*pieces))
    assert ("".join(whole[0]), whole[1]) == ("".join(split[0]), split[1])


@given(deltas=st.lists(TEXTS, max_size=12), stop=st.text(alphabet="ab\n", min_size=1, max_size=5))
def test_no_more_is_held_back_than_could_begin_a_stop(deltas: list[str], stop: str) -> None:
    checker = StopChecker(StoppingParams(stop_sequences=(stop,)), frozenset())
    text, emitted = "", ""
    for count, delta in enumerate(deltas, start=1):
        out, reason = checker.push(WORD, delta, count)
        if reason is not None:
            return
        text, emitted = text + delta, emitted + out
        held = text[len(emitted) :]
        assert len(held) < len(stop)
        assert stop.startswith(held)
