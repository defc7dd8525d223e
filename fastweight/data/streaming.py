"""Token ids to text while they are being generated: no half characters, nothing taken back."""

import codecs

import numpy as np

from fastweight.data.case_ops import MarkReader
from fastweight.data.case_tokenizer import CaseTokenizer
from fastweight.data.tokenizer_base import Tokenizer, check_ids

_REPLACEMENT = "\ufffd"
# A character has at most 4 bytes, so at most 3 tokens wait for its end; tokens without any text may stand among them.
_MAX_UNFINISHED_TOKENS = 12


class StreamDecoder:
    """Decodes one sequence piece by piece; the pieces put together equal `tokenizer.decode` of all ids.

    A character whose bytes are spread over several tokens comes out with its last token. Bytes that can no longer
    become a character come out as U+FFFD. (For tokenizers whose tokens are not plain bytes the equality holds where
    the ids spell valid UTF-8.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._marks = MarkReader() if isinstance(tokenizer, CaseTokenizer) else None
        self._inner = StreamDecoder(tokenizer.inner) if isinstance(tokenizer, CaseTokenizer) else None
        self._table = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []
        self._shown = 0

    def push(self, ids: np.ndarray | list[int]) -> str:
        """Take the next ids and return the text that is complete now. Raises ValueError for ids out of range."""
        ids = check_ids(ids, self._tokenizer.vocab_size, self._tokenizer.name)
        if self._inner is not None and self._marks is not None:
            return self._marks.push(self._inner.push(ids))
        if self._table is not None:
            return self._utf8.decode(b"".join([self._table[i] for i in ids.tolist()]))
        return "".join([self._push_one(i) for i in ids.tolist()])

    def _push_one(self, token: int) -> str:
        self._ids.append(token)
        return self._show(final=False)

    def finish(self) -> str:
        """Return what is left; an unfinished character becomes U+FFFD. The decoder is then ready for a new sequence."""
        if self._inner is not None and self._marks is not None:
            rest, self._marks = self._marks.push(self._inner.finish()), MarkReader()
            return rest
        if self._table is not None:
            rest = self._utf8.decode(b"", final=True)
            self._utf8.reset()
            return rest
        rest = self._show(final=True)
        self._ids, self._shown = [], 0
        return rest

    def _show(self, *, final: bool) -> str:
        """What the ids after the shown ones add to the text.

        A decoder may treat the first token of what it gets differently (it drops a leading space), so the ids shown
        last are decoded again as context.
        """
        text = self._tokenizer.decode(self._ids)
        unfinished = len(self._ids) - self._shown <= _MAX_UNFINISHED_TOKENS and text.endswith(_REPLACEMENT)
        if unfinished and not final:
            return ""
        new = text[len(self._tokenizer.decode(self._ids[: self._shown])) :]
        if new:
            self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return new
