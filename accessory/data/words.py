"""Tokenising with sentencepiece word by word, each word once.

A BPE model whose pieces never reach from one word over a space into the next gives a text the ids of its words, one after
the other: "▁on▁the▁mat" is "▁on", "▁the", "▁mat". Most words of a text were seen before, and to look one up costs a
fraction of merging its characters again. Used where whole corpora are tokenised; the ids are tokenizer.encode's own.

Test: pytest tests/unit/test_corpus.py
"""

import re

import numpy as np

from .. import sentencepiece_proto
from ..sentencepiece_proto import BPE, USER_DEFINED
from ..tokenizer import Tokenizer

LONGEST = 32  # characters of a word that is kept: longer ones hardly come twice (a sentence of Chinese)
MOST = 2**18  # words that are kept: some 40 MB
AFTER_WORD = re.compile("(?<=[^ ]) ")  # of several spaces the first divides, the others begin the next word
OVER_SPACE = re.compile("[^▁]▁")


class Words(dict):
    """word -> its ids, as the bytes of an array of `dtype`."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype):
        self.tokenizer, self.dtype = tokenizer, dtype
        self[""] = self.packed([tokenizer.model.piece_to_id("▁")])  # what a space at the end of a text leaves

    def __missing__(self, word: str) -> bytes:
        ids = self.packed(self.tokenizer.model.encode(word))
        if len(word) < LONGEST and len(self) < MOST:
            self[word] = ids
        return ids

    def packed(self, ids: list[int]) -> bytes:
        return np.array(ids, self.dtype).tobytes()

    def encode(self, text: str, first: bool = True) -> bytes:
        """The ids of `text`; not `first`: as it goes on after earlier text."""
        if not text:
            return b""
        if "▁" in text:  # one that was typed joins the spaces beside it
            return self.packed(self.tokenizer.encode(text) if first else self.tokenizer.encode_continuation(text))
        plain = "  " not in text and text[0] != " "
        words = text.split(" ") if plain else AFTER_WORD.split(text)
        if first:
            return b"".join(map(self.__getitem__, words))
        head = self.packed(self.tokenizer.encode_continuation(words[0]))
        return head + b"".join(map(self.__getitem__, words[1:]))


def open_words(tokenizer: Tokenizer, dtype: np.dtype) -> Words | None:
    """The words of a sentencepiece model; None where a text's ids are not those of its words one after the other."""
    if tokenizer.kind != "sentencepiece":
        return None
    model = sentencepiece_proto.read(tokenizer.raw)
    as_it_stands = model.add_space_prefix and model.escape_whitespaces and not model.whitespace_as_suffix
    as_it_stands = as_it_stands and not model.remove_extra_whitespaces and not model.charsmap
    apart = not any(OVER_SPACE.search(piece) for piece in model.pieces)
    read_first = (piece for piece, kind in zip(model.pieces, model.types) if kind == USER_DEFINED)
    apart = apart and not any("▁" in piece or " " in piece for piece in read_first) and "▁" in model.pieces
    return Words(tokenizer, dtype) if model.model_type == BPE and as_it_stands and apart else None
