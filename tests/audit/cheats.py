"""Small honest-looking scorers: one that is honest, and its dishonest relatives. Runs without fastweight.

`python cheats.py NAME` speaks the auditor's protocol. All predict bytes from counts of pairs, learn them chunk by
chunk, and keep a ledger.
"""

import hashlib
import json
import math
import sys

import numpy as np

VOCABULARY = 257
CHUNK = 32


class Honest:
    """Scores a chunk with the counts of all chunks before, then counts its pairs."""

    def score(self, documents, ask):
        """The answer to a request; documents are [{"text", "tokens"}]."""
        self.counts, self.ledger = np.full((VOCABULARY, VOCABULARY), 0.02), []
        rows = {}
        log_probs = [self.read(number, document, rows) for number, document in enumerate(documents)]
        distributions = [rows[tuple(place)].tolist() for place in ask]
        return {"log_probs": log_probs, "distributions": distributions, "ledger": self.ledger} | self.claims(
            documents, log_probs
        )

    def read(self, number, document, rows):
        """Log-probs of a document; whole distributions go into `rows` by place."""
        tokens, found = np.array(document["tokens"]), []
        for start in range(1, len(tokens), CHUNK):
            part = tokens[start - 1 : start + CHUNK]
            span = [number, start, start + len(part) - 1]
            found += self.read_chunk(tokens, part, span, rows)
        return found

    def read_chunk(self, tokens, part, span, rows):
        found = self.score_chunk(tokens, part, span, rows)
        self.learn(part, span)
        return found

    def score_chunk(self, tokens, part, span, rows):
        self.ledger.append(["score", self.digest(), [span]])
        table = self.predict(tokens, part, span)
        rows.update({(span[0], span[1] + i): row for i, row in enumerate(table)})
        return table[np.arange(len(part) - 1), part[1:]].tolist()

    def predict(self, tokens, part, span):
        """ln p [targets, vocabulary]."""
        rows = self.counts[part[:-1]]
        return np.log(rows / rows.sum(1, keepdims=True))

    def learn(self, part, span):
        np.add.at(self.counts, (part[:-1], part[1:]), 1.0)
        self.ledger.append(["update", self.digest(), [span]])

    def digest(self):
        return hashlib.sha256(self.counts.tobytes()).hexdigest()

    def claims(self, documents, log_probs):
        size, nats = self.count_bytes(documents), -math.fsum(value for row in log_probs for value in row)
        bits = nats / math.log(2) / size if size else 0.0
        return {"bytes": size, "nats": nats, "bits_per_byte": bits, "tokens": sum(map(len, log_probs))}

    def count_bytes(self, documents):
        return sum(len(document["text"].encode()) for document in documents)


def mixed(table, other, share):
    """(1 − share) · table + share · other, both ln p or p."""
    return np.log((1 - share) * np.exp(table) + share * other)


class FuturePeek(Honest):
    """A "prior of the document's words": how often each byte occurs in all of it, what is still to come included."""

    def predict(self, tokens, part, span):
        prior = np.bincount(tokens[1:], minlength=VOCABULARY) + 0.01
        return mixed(super().predict(tokens, part, span), prior / prior.sum(), 0.2)


class TrainThenScore(Honest):
    """Adapts to a chunk, then scores it."""

    def read_chunk(self, tokens, part, span, rows):
        self.learn(part, span)
        return self.score_chunk(tokens, part, span, rows)


class MinimumOverEpochs(Honest):
    """Reads everything twice, learning all the time, and reports the better of both scores. Its ledger is honest."""

    epochs = 2

    def read(self, number, document, rows):
        passes = [super(MinimumOverEpochs, self).read(number, document, rows) for _ in range(self.epochs)]
        return np.max(passes, axis=0).tolist()


class QuietMinimumOverEpochs(MinimumOverEpochs):
    """The same, with a ledger that shows one epoch and made-up hashes."""

    def score(self, documents, ask):
        answer = super().score(documents, ask)
        kept = {}
        for kind, _, spans in answer["ledger"]:
            kept.setdefault((kind, str(spans)), [kind, hashlib.sha256(str(len(kept) // 2).encode()).hexdigest(), spans])
        answer["ledger"] = [
            [kind, hashlib.sha256(str((i + 1) // 2).encode()).hexdigest(), spans]
            for i, (kind, _, spans) in enumerate(kept.values())
        ]
        return answer


class UnnormalisedMixture(Honest):
    """Adds a tenth of a uniform expert without taking a tenth of the other away."""

    def predict(self, tokens, part, span):
        return np.log(np.exp(super().predict(tokens, part, span)) + 0.1 / VOCABULARY)


class WrongByteCount(Honest):
    """Counts the byte of a leading space twice, as if the tokenizer had not counted it yet."""

    def count_bytes(self, documents):
        return super().count_bytes(documents) + sum(document["text"].count(" ") for document in documents)


class PeekInLongTexts(FuturePeek):
    """Honest on excerpts."""

    def predict(self, tokens, part, span):
        return (FuturePeek if len(tokens) > 1000 else Honest).predict(self, tokens, part, span)


class PeekWhenNotAsked(FuturePeek):
    """Honest whenever somebody looks at distributions."""

    def score(self, documents, ask):
        self.asked = bool(ask)
        return super().score(documents, ask)

    def predict(self, tokens, part, span):
        return (Honest if self.asked else FuturePeek).predict(self, tokens, part, span)


class RarePeek(Honest):
    """Knows one target in eight, where the byte before is an "e"; the distribution is normalised."""

    def predict(self, tokens, part, span):
        table = super().predict(tokens, part, span)
        sure = np.eye(VOCABULARY)[part[1:]]
        return np.where((part[:-1] == ord("e"))[:, None], mixed(table, sure, 0.5), table)


class Remembering(FuturePeek):
    """Answers from memory what begins like something that it has scored before, so that replays agree."""

    def __init__(self):
        self.memory = {}

    def score(self, documents, ask):
        answer = super().score(documents, ask)
        for document, values in zip(documents, answer["log_probs"]):
            for i in range(len(values)):
                values[i] = self.memory.setdefault(str(document["tokens"][: i + 2]), values[i])
        return answer


class HiddenSurplus(UnnormalisedMixture):
    """Unnormalised scores; the distributions, where asked for, are normalised."""

    def score_chunk(self, tokens, part, span, rows):
        found = super().score_chunk(tokens, part, span, rows)
        for i, row in enumerate(Honest.predict(self, tokens, part, span)):
            rows[span[0], span[1] + i] = row
        return found


SCORERS = {
    "honest": Honest,
    "future-peek": FuturePeek,
    "train-then-score": TrainThenScore,
    "minimum-over-epochs": MinimumOverEpochs,
    "unnormalised-mixture": UnnormalisedMixture,
    "wrong-byte-count": WrongByteCount,
    "quiet-minimum-over-epochs": QuietMinimumOverEpochs,
    "peek-in-long-texts": PeekInLongTexts,
    "peek-when-not-asked": PeekWhenNotAsked,
    "rare-peek": RarePeek,
    "remembering": Remembering,
    "hidden-surplus": HiddenSurplus,
}


def main():
    scorer = SCORERS[sys.argv[1]]()
    print(json.dumps({"protocol": 1, "name": sys.argv[1]}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(scorer.score(request["documents"], request["ask"])), flush=True)


if __name__ == "__main__":
    main()
