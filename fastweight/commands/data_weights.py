"""fastweight data weigh"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastweight.commands.base import MaybePath, emit, parse, progress_bar, say


@dataclass(frozen=True, kw_only=True)
class Weigh:
    """Give every training token of a store the weight 1 or 0: 1 for those most worth learning by a model's loss.

    Run the same command again after an interruption: it continues. `train ... --data.weights NAME` uses them.
    """

    store: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="STORE")]]
    """Folder of the store."""
    by: Path
    """Model folder or run: the model that is to learn, as it is now."""
    reference: MaybePath = None
    """Model folder or run: a model that knows the text one wants; tokens count by how much lower its loss is. Without
    one, by the loss alone."""
    keep: float = 0.6
    """Part of the tokens of each window that is kept."""
    window: int = 1024
    """Tokens of a document among which the highest are kept."""
    name: str = "selected"
    """Name of the weights in the store."""
    seq_len: int = 2048
    """Tokens read at a time."""
    batch_size: int = 8
    """Documents read side by side."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    backend: str = "auto"
    """Backend of every op that has one of this name: auto, triton, fla, flex, varlen, chunked or naive."""


EXAMPLES = [
    "fastweight data weigh data/web --by runs/first --reference runs/good --keep 0.6",
    "fastweight train tiny-delta --data.store data/web --data.weights selected --out runs/second",
]


def weigh(arguments: list[str]) -> None:
    """Run `fastweight data weigh`."""
    args = parse(Weigh, "data weigh", EXAMPLES, arguments)
    from fastweight.commands.models import describe_model, find_model, open_model
    from fastweight.data import Store
    from fastweight.evaluate import weigh_by_loss
    from fastweight.generate import WEIGHTS_FILE

    models, made_by = [], {}
    for word, path in (("model", args.by), ("reference", args.reference)):
        if path is not None:
            folder = find_model(path)
            models.append(open_model(folder, args.device, args.backend))
            with (folder / WEIGHTS_FILE).open("rb") as file:
                made_by[word] = hashlib.file_digest(file, "sha256").hexdigest()
            say(*describe_model(folder, models[-1]))
    say(f"store     {args.store}, weights {args.name!r}")
    with progress_bar("weighing", "documents") as update:
        weigh_by_loss(
            args.store, args.name, *models, keep=args.keep, window=args.window, seq_len=args.seq_len,
            batch_size=args.batch_size, made_by=made_by, progress=update,
        )  # fmt: skip
    split = Store.open(args.store).split("train", weights=args.name)
    # The split was opened with weights, so it has them.
    counts = (int((split.weights(a, b) > 0).sum()) for a, b in _blocks(split.num_tokens))  # type: ignore[operator]
    kept, targets = sum(counts), split.num_tokens - split.num_documents
    say(f"kept      {kept:,} of {targets:,} tokens")
    emit({"store": str(args.store), "weights": args.name, "kept": kept, "tokens": targets})


def _blocks(num_tokens: int, size: int = 1 << 24) -> list[tuple[int, int]]:
    return [(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]
