"""fastweight generate"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastweight.commands.base import emit, parse, progress_bar, say
from fastweight.configs import require

EXAMPLES = [
    'fastweight generate runs/first --prompt "def main(" --max-tokens 200',
    "fastweight generate runs/first --prompt-file chapter1.txt --temperature 0.7 --top-p 0.95 --seed 1",
    "cat notes.txt | fastweight generate runs/first --max-tokens 0 --state-out notes.state",
    'fastweight generate runs/first --state-in notes.state --prompt "In short:"',
]


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a text. The text goes to stdout as it is made, everything else to stderr.

    The prompt is --prompt, --prompt-file, or what comes on stdin. --state-out keeps what was read (the prompt and what
    was generated) in a file of constant size; --state-in goes on from there with the same model, as if it had been
    one run.
    """

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """Model folder, or the folder of a training run."""
    prompt: str | None = None
    """Text to continue."""
    prompt_file: Path | None = None
    """File with the text to continue (UTF-8)."""
    max_tokens: int = 256
    """How many tokens to generate; 0 only reads the prompt."""
    temperature: float = 1.0
    """Divides the logits before drawing; 0 always takes the most probable token."""
    top_k: int = 0
    """Draw among this many most probable tokens; 0 is all."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probabilities reach this sum."""
    seed: int | None = None
    """Makes the text repeatable; a new one is drawn and shown if none is given."""
    state_in: Path | None = None
    """Go on from this state file."""
    state_out: Path | None = None
    """Write the state to this file at the end."""
    tokenizer: str | None = None
    """bytes or a folder; by default the tokenizer inside the model folder."""
    format: Literal["text", "json"] = "text"
    """What stdout gets: the text as it is made, or one line of JSON with the text and its figures at the end."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    backend: str = "auto"
    """Backend of every op: auto, triton, chunked or naive."""


def main(name: str, arguments: list[str]) -> None:
    """Run `fastweight generate`."""
    args = parse(Generate, name, EXAMPLES, arguments)
    text = read_prompt(args)
    from fastweight.commands.models import describe_model, find_model, find_tokenizer, open_model
    from fastweight.generate import generate, load_reading, weights_hash

    folder = find_model(args.model)
    model = open_model(folder, args.device, args.backend)
    tokenizer = find_tokenizer(folder, args.tokenizer, model)
    weights = weights_hash(folder) if args.state_in or args.state_out else ""
    state, last_token = (None, None) if args.state_in is None else load_reading(args.state_in, weights)
    ids = [*([tokenizer.bos_id] if state is None else []), *tokenizer.encode(text).ids.tolist()]
    say(
        *describe_model(folder, model),
        f"prompt    {len(ids):,} tokens{_after(args, state)}, tokenizer {tokenizer.name}",
    )
    start = time.perf_counter()
    with progress_bar("reading", "tokens") as progress:
        generation = generate(
            model, ids, state=None if state is None else state.to(model.device), last_token=last_token,
            max_tokens=args.max_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
            seed=args.seed, stop=(tokenizer.bos_id,), progress=progress,
        )  # fmt: skip
    read_seconds = time.perf_counter() - start
    made, count = _stream(generation, tokenizer, args.format == "text")
    _finish(args, model, generation, weights)
    seconds = time.perf_counter() - start - read_seconds
    result = {
        "text": made, "prompt_tokens": len(ids), "generated_tokens": count, "seed": generation.seed,
        "read_seconds": read_seconds, "generate_seconds": seconds, "state_bytes": generation.state.num_bytes,
    }  # fmt: skip
    say(
        f"{count:,} tokens in {seconds:.1f} s ({count / max(seconds, 1e-9):.1f}/s) · seed {generation.seed} · "
        f"state {generation.state.num_bytes:,} bytes after {int(generation.state.position[0]):,} tokens"
    )
    if args.format == "json":
        emit(result)


def read_prompt(args: Generate) -> str:
    """The text of --prompt, --prompt-file or stdin; at most one of the options may be given."""
    require(args.prompt is None or args.prompt_file is None, "--prompt and --prompt-file are both given; give one.")
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file is not None:
        try:
            return args.prompt_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{args.prompt_file} is not UTF-8 text ({error}). Convert it first.") from error
    return "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()


def _after(args: Generate, state: Any) -> str:
    return "" if state is None else f" after {int(state.position[0]):,} tokens read before ({args.state_in})"


def _stream(generation: Any, tokenizer: Any, visible: bool) -> tuple[str, int]:
    """Write the text as it comes; (text, number of tokens). Ctrl-C ends the text, not the program."""
    from fastweight.data.streaming import StreamDecoder

    decoder, parts, count = StreamDecoder(tokenizer), [], 0

    def put(text: str) -> None:
        parts.append(text)
        if visible:
            sys.stdout.write(text)
            sys.stdout.flush()

    try:
        for token in generation:
            put(decoder.push([token]))
            count += 1
    except KeyboardInterrupt:
        say("", "interrupted; the text ends here")
    put(decoder.finish())
    if visible and count:
        sys.stdout.write("\n")
    return "".join(parts), count


def _finish(args: Generate, model: Any, generation: Any, weights: str) -> None:
    """Save the state if asked, and name its faults."""
    from fastweight.generate import save_reading

    say(*(f"warning: {fault}" for fault in model.describe_faults(generation.state)))
    if args.state_out is not None:
        save_reading(args.state_out, generation, weights)
        say(f"written: {args.state_out}")
