"""The learners of `fastweight eval --learn`."""

from typing import Any, Literal

from fastweight.configs import require

Kind = Literal["sgd", "lora", "in-place"]
LearnMode = Literal["cached", "exact"]


def make_learners(args: Any) -> dict[str, tuple[Any, LearnMode]]:
    """By the name of its row: a learner, and the mode it runs in; every kind at every rate in every mode."""
    require(
        args.learn_epochs == 1 or ("sgd" in args.learn and "cached" not in args.learn_modes),
        f"--learn-epochs {args.learn_epochs} is for --learn sgd with --learn-modes exact alone: what is read once "
        "gives one step.",
    )
    found = {}
    for kind in dict.fromkeys(args.learn):
        for rate in dict.fromkeys(args.learn_rates) or [None]:
            learner = _make(kind, rate, args)
            for mode in dict.fromkeys(args.learn_modes):
                name = f"{kind} {mode}" if rate is None else f"{kind} {rate:g} {mode}"
                found[name] = (learner, mode)
    return found


def mode_differences(learners: dict[str, tuple[Any, LearnMode]], found: dict[str, Any]) -> dict[str, float]:
    """Bits per byte of exact minus cached, of every learner that ran in both modes."""
    runs = {(learner, mode): found[name].bits_per_byte for name, (learner, mode) in learners.items()}
    names = {learner: name.rpartition(" ")[0] for name, (learner, _) in learners.items()}
    both = [learner for learner in names if {(learner, "exact"), (learner, "cached")} <= set(runs)]
    return {names[learner]: runs[learner, "exact"] - runs[learner, "cached"] for learner in both}


def _make(kind: Kind, rate: float | None, args: Any) -> Any:
    from fastweight.learn import DocumentLora, GlobalSgd, InPlaceSgd

    settings: dict[str, Any] = {} if rate is None else {"lr": rate}
    settings |= {"chunk_size": args.learn_chunk} if args.learn_chunk else {}
    if kind == "lora":
        return DocumentLora(**settings, **({"rank": args.learn_rank} if args.learn_rank else {}))
    if kind == "in-place":
        return InPlaceSgd(**settings)
    reading = {"epochs": args.learn_epochs, "seq_len": args.seq_len, "batch_size": args.batch_size}
    return GlobalSgd(**settings, **reading)
