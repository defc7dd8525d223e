"""Capital letters written as marks before small ones, so that a tokenizer needs no pieces of its own for them.

CAP makes the next letter a capital, UPPER all letters up to the next character that is none (or up to END); QUOTE
says that the next character is meant as it is, should a text hold one of these marks. The marks are control characters
of one byte, which texts hardly hold. Only letters whose capital and small form each have one character and lead back
to one another are rewritten, so every text comes back as it was.
"""

import functools

CAP, UPPER, END, QUOTE = "\x0e", "\x0f", "\x10", "\x11"
MARKS = frozenset((CAP, UPPER, END, QUOTE))


@functools.cache
def _small(character: str) -> str:
    """The small form of a capital that can be rewritten, else ""."""
    small = character.lower()
    return small if len(small) == 1 and small != character and small.upper() == character else ""


@functools.cache
def _capital(character: str) -> str:
    """The capital of a small letter that a mark may stand before, else ""."""
    capital = character.upper()
    return capital if len(capital) == 1 and _small(capital) == character else ""


def write_marks(text: str) -> str:
    """The text in small letters with marks; `read_marks` undoes it for every text."""
    written, i = [], 0
    while i < len(text):
        character = text[i]
        if character in MARKS:
            written.append(QUOTE + character)
            i += 1
            continue
        stop = i
        while stop < len(text) and _small(text[stop]):
            stop += 1
        if stop == i:
            written.append(character)
            i += 1
            continue
        follows = stop < len(text) and bool(_capital(text[stop]))
        small = "".join(map(_small, text[i:stop]))
        written.append(CAP + small if stop - i == 1 else UPPER + small + (END if follows else ""))
        i = stop
    return "".join(written)


class MarkReader:
    """Reads marked text piece by piece: what `push` returns, put together, is the text."""

    def __init__(self) -> None:
        self._mode = ""

    def push(self, written: str) -> str:
        """The text of the next piece; a mark at its end waits for what comes."""
        return "".join(map(self._read, written))

    def _read(self, character: str) -> str:
        mode = self._mode
        if mode == QUOTE:
            self._mode = ""
            return character
        if character in MARKS:
            self._mode = "" if character == END else character
            return ""
        capital = _capital(character) if mode else ""
        self._mode = UPPER if mode == UPPER and capital else ""
        return capital or character


def read_marks(written: str) -> str:
    """The text that was written with marks; marks that stand before nothing they can change say nothing."""
    return MarkReader().push(written)


def bytes_of_marked(written: str) -> list[int]:
    """UTF-8 bytes of the text, one count per UTF-8 byte of `written`; marks stand for none.

    A character's bytes count one each from its first on; where its capital has more, the last one has the rest.
    """
    reader, counts = MarkReader(), []
    for character in written:
        size, own = len(reader.push(character).encode()), len(character.encode())
        shares = [1 if place < size else 0 for place in range(own)]
        shares[-1] += max(size - own, 0)
        counts += shares
    return counts
