"""Prompts of the recall tasks: a pass key in a long text, and pairs of random words. Their lengths are in tokens."""

import random
from collections.abc import Collection, Sequence

import numpy as np

from fastweight.configs import require
from fastweight.data.tokenizers import Tokenizer
from fastweight.evaluate.recall import Prompt

KEY_DIGITS = 5
INTRODUCTION = "One number is hidden in the text below. Keep it in mind.\n"
BEFORE_KEY, AFTER_KEY = " The secret number is", ". Keep it in mind."
QUESTION = "\nWhat is the secret number? The secret number is"
# Words of the neutral filler; none of them has to do with numbers.
_NOUNS = ("river", "garden", "window", "letter", "hill", "teacher", "boat", "village", "table", "song", "road", "lamp")
_ADJECTIVES = ("quiet", "green", "old", "narrow", "warm", "distant", "simple", "pale", "gentle", "wide")
_VERBS = ("rests beside", "looks towards", "belongs to", "waits for", "leads past", "reminds us of")


def passkey_prompts(
    tokenizer: Tokenizer, length: int, *, depths: Sequence[float] = (0.1, 0.5, 0.9), trials: int = 2, choices: int = 8,
    seed: int = 0, filler: Sequence[str] | None = None,
) -> list[Prompt]:  # fmt: skip
    """`trials` prompts per depth, each of exactly `length` tokens: filler with a number in it, then a question.

    depths: where the number stands, 0 the start of the filler and 1 its end. choices: the number and others of as many
    tokens. filler: texts to fill up with, from a random one on; None writes neutral sentences. The same arguments give
    the same prompts. Raises ValueError if `length` has no room for question and number.
    Source: Mohtashami and Jaggi 2023, arXiv:2305.16300, section 4.2.
    """
    require(choices >= 2, f"passkey: choices must be at least 2, got {choices}.")
    outside = [depth for depth in depths if not 0 <= depth <= 1]
    require(not outside and len(depths) > 0, f"passkey: depths must lie in [0, 1], got {list(depths)}.")
    prompts = []
    for depth in depths:
        for trial in range(trials):
            rng = random.Random(f"passkey {seed} {length} {depth} {trial}")
            prompts.append(_passkey(tokenizer, length, depth, choices, filler, rng))
    return prompts


def _passkey(
    tokenizer: Tokenizer, length: int, depth: float, choices: int, filler: Sequence[str] | None, rng: random.Random
) -> Prompt:
    keys = _keys(tokenizer, choices, rng)
    start, before, after, question = (
        tokenizer.encode(text).ids for text in (INTRODUCTION, BEFORE_KEY, AFTER_KEY, QUESTION)
    )
    start, needle = np.append(tokenizer.bos_id, start), np.concatenate((before, keys[0], after))
    room = length - len(start) - len(needle) - len(question)
    require(room >= 0, f"passkey: a prompt needs at least {length - room} tokens with {tokenizer.name}, got {length}.")
    fill = _filler(tokenizer, room, filler, rng)
    place = round(depth * room)
    ids = np.concatenate((start, fill[:place], needle, fill[place:], question))
    return Prompt(ids.astype(np.int64), keys, f"depth {depth:g}")


def _keys(tokenizer: Tokenizer, count: int, rng: random.Random) -> np.ndarray:
    """Different random numbers as ids [count, n], all of the length that most numbers have."""
    reference = len(tokenizer.encode(f" {10**KEY_DIGITS // 8}").ids)
    found: dict[str, np.ndarray] = {}
    for _ in range(100 * count):
        text = f" {rng.randrange(10 ** (KEY_DIGITS - 1), 10**KEY_DIGITS)}"
        ids = tokenizer.encode(text).ids
        if len(ids) == reference:
            found[text] = ids
        if len(found) == count:
            return np.stack(list(found.values()))
    raise ValueError(f"passkey: {tokenizer.name} has too few numbers of {KEY_DIGITS} digits with {reference} tokens.")


def _filler(tokenizer: Tokenizer, count: int, texts: Sequence[str] | None, rng: random.Random) -> np.ndarray:
    """`count` tokens of text."""
    parts, have, at = [np.zeros(0, np.int64)], 0, rng.randrange(len(texts)) if texts else 0
    empty = 0
    while have < count:
        text = _sentences(rng) if texts is None else texts[at % len(texts)]
        ids = tokenizer.encode(text).ids
        empty = 0 if len(ids) else empty + 1
        require(texts is None or empty < len(texts), "passkey: the filler texts are all empty; give texts, or None.")
        parts.append(ids)
        have, at = have + len(ids), at + 1
    return np.concatenate(parts)[:count]


def _sentences(rng: random.Random) -> str:
    """Twenty sentences about nothing."""
    made = (
        f" The {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)} {rng.choice(_VERBS)} the {rng.choice(_NOUNS)}."
        for _ in range(20)
    )
    return "".join(made)


def pair_prompts(tokenizer: Tokenizer, pairs: int, *, trials: int = 32, seed: int = 0) -> list[Prompt]:
    """[document start], then lines "key: value", then one of the keys and its colon: which value belongs to it?

    Keys and values are different single tokens, drawn anew for each prompt; the choices are all values of the prompt,
    the right one first, so that a guess among them is right once in `pairs`.
    Raises ValueError if the tokenizer has too few tokens. Source: Arora et al. 2023, arXiv:2312.04927, section 3, here
    with signs between the words, which pretrained models know from lists.
    """
    require(pairs >= 2, f"pairs: needs at least 2 pairs to tell apart, got {pairs}.")
    colon, line_end = (tokenizer.encode(text).ids for text in (":", "\n"))
    words, prompts = words_of(tokenizer, 2 * pairs, without={*colon.tolist(), *line_end.tolist()}), []
    for trial in range(trials):
        rng = random.Random(f"pairs {seed} {pairs} {trial}")
        drawn = np.array(rng.sample(words, 2 * pairs), dtype=np.int64).reshape(pairs, 2)
        asked = rng.randrange(pairs)
        lines = [part for key, value in drawn for part in ([key], colon, [value], line_end)]
        ids = np.concatenate(([tokenizer.bos_id], *lines, drawn[asked, :1], colon))
        order = np.append(asked, np.delete(np.arange(pairs), asked))
        prompts.append(Prompt(ids.astype(np.int64), drawn[order, 1:], f"pair {asked + 1} of {pairs}"))
    return prompts


def words_of(tokenizer: Tokenizer, count: int, without: Collection[int] = ()) -> list[int]:
    """Ids of tokens that are a space and a plain word; all tokens but the document start, where there are too few.

    without: ids that are not taken. Raises ValueError if even all tokens are fewer than `count`.
    """
    everything = [i for i in range(tokenizer.vocab_size) if i != tokenizer.bos_id and i not in without]
    require(
        len(everything) >= count,
        f"pairs: {count // 2} pairs need {count} different tokens, {tokenizer.name} has {len(everything)}. "
        "Ask for fewer pairs.",
    )
    words = [i for i in everything if _is_word(tokenizer, i)]
    return words if len(words) >= count else everything


def _is_word(tokenizer: Tokenizer, token: int) -> bool:
    """Two copies tell the space: some decoders drop the one at the start of a text."""
    first, _, second = tokenizer.decode([token, token]).strip(" ").partition(" ")
    return first == second and len(first) >= 3 and first.isascii() and first.isalpha() and first.islower()
