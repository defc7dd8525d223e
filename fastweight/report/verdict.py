"""What the figures say, in sentences: each claim with its numbers, and a plain no where the memory does not help."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastweight.report.statistics import Difference, paired_difference, sign_test

OUTCOMES = {1: "better", 0: "same", -1: "worse", None: "unknown"}
_HELP = {
    "better": "the memory helps",
    "same": "the memory does not help, the difference is within the noise",
    "worse": "the memory does not help, it hurts",
    "unknown": "one document cannot tell whether the memory helps",
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One sentence. topic: what it is about. against: the model compared with, "" for none.

    outcome: "better", "same" (within noise), "worse", "unknown" (too little to tell), or "" where none is meant.
    """

    topic: str
    against: str
    outcome: str
    text: str


def judge(models: dict[str, dict[str, Any]], backbone: str, converted: str) -> list[dict[str, Any]]:
    """The claims about `converted`, the conclusion first.

    models: the figures of each model, as `Measurer.measure` gives them. Losses are compared by paired differences over
    the documents with Student's t, recall by an exact sign test over the prompts; both at 95 %, without a correction
    for the number of comparisons. Help is judged at the greatest length, on the last tokens before it: there a longer
    memory can show.
    """
    others = [name for name in models if name != converted]
    losses = [_loss(models, converted, name, -1, "tail_") for name in others]
    if len(models[converted]["lengths"]) > 1:
        losses.append(_loss(models, converted, backbone, 0, ""))
    recalls = []
    for name in others:
        recalls += _recall(models, converted, name, "passkey", "exact", "number(s) hidden in {tokens:,} tokens")
        recalls += _recall(models, converted, name, "pairs", "picked", "question(s) about {size:,} pairs")
    claims = [_conclusion(losses[: len(others)], recalls, backbone), *losses]
    claims += [*_divergence(models[converted], backbone), *recalls]
    for name in others:
        claims += _bytes(models, converted, name) + _speed(models, converted, name)
    return [asdict(claim) for claim in [*claims, *_faults(models)]]


def _conclusion(losses: Sequence[Claim], recalls: Sequence[Claim], backbone: str) -> Claim:
    """Whether the memory helps against the controls; against the backbone alone where there is no control.

    The loss decides; what recall gains is said beside it.
    """
    rivals = [c for c in losses if c.against != backbone] or list(losses)
    won = [c.against for c in rivals if c.outcome == "better"]
    lost = [c.against for c in rivals if c.outcome != "better"]
    if any(c.outcome == "unknown" for c in rivals):
        outcome, text = "unknown", "One document is too few for a verdict."
    elif not lost:
        outcome, text = "better", f"The memory helps: its loss on long texts is lower than that of {_and(won)}."
    elif won:
        outcome = "same"
        text = (
            f"The memory helps in part: its loss on long texts is lower than that of {_and(won)}, not of {_and(lost)}."
        )
    else:
        outcome = "worse" if all(c.outcome == "worse" for c in rivals) else "same"
        text = f"The memory does not help: its loss on long texts is not lower than that of {_and(lost)}."
    found = [f"{c.topic} ({c.against})" for c in recalls if c.outcome == "better"]
    text += f" It recalls more: {_and(found)}." if found else ""
    return Claim(topic="conclusion", against="", outcome=outcome, text=text)


def _and(names: Sequence[str]) -> str:
    return " and ".join(", ".join(names).rsplit(", ", 1))


def _loss(models: dict[str, Any], converted: str, other: str, which: int, part: str) -> Claim:
    """The claim about the loss at one length; part "tail_": of its last tokens."""
    first, second = (models[name]["lengths"][which] for name in (converted, other))
    difference = loss_difference(first, second, part)
    outcome = OUTCOMES[None if difference.sign is None else -difference.sign]
    length, tail = first["length"], first["tail"]
    place = f"at {length:,} tokens" if not part or tail == length else f"in the last {tail:,} of {length:,} tokens"
    ratio = 100 * (first[f"{part}perplexity"] / second[f"{part}perplexity"] - 1)
    figures = f"perplexity {first[f'{part}perplexity']:.4g} against {second[f'{part}perplexity']:.4g} of {other}"
    text = f"{place} {figures} ({ratio:+.2f} %; {_in_nats(difference)})"
    if part:
        return Claim(topic="help", against=other, outcome=outcome, text=f"{_HELP[outcome]}: {text}")
    words = {
        "better": "short texts gain",
        "same": "the cost on short texts is within the noise",
        "worse": "short texts cost",
    }
    text = f"{words.get(outcome, 'short texts, one document')}: {text}"
    return Claim(topic="cost", against=other, outcome=outcome, text=text)


def loss_difference(first: dict[str, Any], second: dict[str, Any], part: str) -> Difference:
    """Nats per token of `first` − `second`, rows of one length, over their documents."""
    tokens = first["tail" if part else "length"]
    return paired_difference(*([x / tokens for x in row[f"{part}nats"]] for row in (first, second)))


def _in_nats(difference: Difference) -> str:
    if difference.half_width is None:
        return f"{difference.mean:+.4f} nats per token in one document"
    spread = f"± {difference.half_width:.4f} nats per token, 95 %, {difference.count} documents"
    return f"{difference.mean:+.4f} {spread}"


def _divergence(figures: dict[str, Any], backbone: str) -> list[Claim]:
    found = figures["divergence"]
    text = (
        f"its predictions are {found['mean']:.4g} nats per token (KL) from {backbone}, the first choice is the same at "
        f"{100 * found['mean_agreement']:.1f} % of the tokens"
    )
    return [Claim(topic="divergence", against=backbone, outcome="", text=text)]


def _recall(models: dict[str, Any], converted: str, other: str, task: str, figure: str, what: str) -> list[Claim]:
    """The claim about the hardest size of a recall task."""
    if not models[converted][task]:
        return []
    first, second = (models[name][task][-1] for name in (converted, other))
    outcome = OUTCOMES[sign_test(first[figure], second[figure])]
    words = {"better": "recalls more", "same": "recalls no more", "worse": "recalls less"}[outcome]
    total, right = len(first[figure]), sum(first[figure])
    chance = "" if figure == "exact" else f", {first['chance'] * total:.1f} by guessing"
    asked = what.format(**first)
    text = f"{words} than {other}: {right} of {total} {asked} against {sum(second[figure])}{chance}"
    return [Claim(topic=task, against=other, outcome=outcome, text=text)]


def _bytes(models: dict[str, Any], converted: str, other: str) -> list[Claim]:
    """The claim about memory per request."""
    sizes = [state_sizes(models[name]) for name in (converted, other)]
    mine, theirs = sizes[0][max(sizes[0])], sizes[1][max(sizes[1])]
    outcome = OUTCOMES[(theirs > mine) - (theirs < mine)]
    text = f"its memory {growth(sizes[0])}; {other}'s {growth(sizes[1])}"
    return [Claim(topic="bytes", against=other, outcome=outcome, text=text)]


def growth(sizes: dict[int, int]) -> str:
    """How the bytes of a request go with the length of its text."""
    low, high = min(sizes), max(sizes)
    if low == high:
        return f"takes {sizes[low]:,} bytes per request at {low:,} tokens"
    if sizes[low] == sizes[high]:
        return f"is constant, {sizes[low]:,} bytes per request at {low:,} and at {high:,} tokens"
    full = min(n for n in sizes if all(sizes[m] == sizes[high] for m in sizes if m >= n))
    if full < high:
        return f"is constant from {full:,} tokens on, {sizes[high]:,} bytes per request up to {high:,}"
    return f"grows, {sizes[low]:,} bytes per request at {low:,} tokens and {sizes[high]:,} at {high:,}"


def state_sizes(figures: dict[str, Any]) -> dict[int, int]:
    """Bytes of one request's state by the length of its text, wherever they were measured."""
    return {row["length"]: row["state_bytes"] for part in ("lengths", "speed") for row in figures[part]}


def _speed(models: dict[str, Any], converted: str, other: str) -> list[Claim]:
    """The claim about decoding at the greatest length; better only if the quartiles stand apart."""
    if not models[converted]["speed"]:
        return []
    first, second = (models[name]["speed"][-1] for name in (converted, other))
    mine, theirs = first["decode_tokens_per_second"], second["decode_tokens_per_second"]
    outcome = OUTCOMES[(mine[0] > theirs[2]) - (mine[2] < theirs[0])]
    words = {"better": "faster", "same": "not clearly faster or slower", "worse": "slower"}[outcome]
    rates = [f"{rate(middle)} tokens/s (quartiles {rate(low)} – {rate(high)})" for low, middle, high in (mine, theirs)]
    text = f"decoding at {first['length']:,} tokens is {words}: {rates[0]} against {rates[1]} of {other}"
    return [Claim(topic="speed", against=other, outcome=outcome, text=text)]


def rate(value: float) -> str:
    """Three digits at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _faults(models: dict[str, Any]) -> list[Claim]:
    """Inner updates that were skipped make every other figure doubtful, so they are told."""
    found = {name: figures["faults"] for name, figures in models.items() if figures["faults"]}
    texts = [f"{name}: {len(faults)} fault(s) of its memory, the first: {faults[0]}" for name, faults in found.items()]
    return [Claim(topic="faults", against="", outcome="worse", text=text) for text in texts]
