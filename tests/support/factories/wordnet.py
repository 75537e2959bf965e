"""A made-up WordNet, so that tests need no package."""

from __future__ import annotations

from pathlib import Path

from examples.wordnet import CATEGORIES


def synset(number: int, gloss: str, file: int = 5) -> str:
    """A line of WordNet's data."""
    return f"{number:08} {file:02} n 01 some_word 0 000 | {gloss}  \n"


def write_wordnet(path: Path, per_category: int) -> Path:
    """A made-up WordNet, so that tests need no package; one definition comes in two categories."""
    lines = ["  1 A licence.  \n", synset(1, "what everything is", 3), synset(2, "the same in two", 4)]
    lines.append(synset(3, "the same in two", 5))
    for file, category in CATEGORIES.items():
        num = 4 if category == "motive" else per_category
        lines += [
            synset(100 * file + index, f'a made-up {category} of kind {index}; "it is said"', file)
            for index in range(num)
        ]
    path.write_text("".join(lines))
    return path
