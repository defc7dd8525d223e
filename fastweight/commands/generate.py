"""fastweight generate"""

import io
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from fastweight.commands.base import MaybeInt, MaybePath, MaybeStr, emit, parse, progress_bar, say
from fastweight.configs import require

INTERRUPTED = 130

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
    prompt: MaybeStr = None
    """Text to continue."""
    prompt_file: MaybePath = None
    """File with the text to continue (UTF-8)."""
    max_tokens: int = 256
    """How many tokens to generate; 0 only reads the prompt."""
    temperature: float = 1.0
    """Divides the logits before drawing; 0 always takes the most probable token."""
    top_k: int = 0
    """Draw among this many most probable tokens; 0 is all."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probabilities reach this sum."""
    seed: MaybeInt = None
    """Makes the text repeatable; a new one is drawn and shown if none is given."""
    state_in: MaybePath = None
    """Go on from this state file."""
    state_out: MaybePath = None
    """Write the state to this file at the end."""
    tokenizer: MaybeStr = None
    """bytes or a folder; by default the tokenizer inside the model folder."""
    format: Literal["text", "json"] = "text"
    """What stdout gets: the text as it is made, or one line of JSON with the text and its figures at the end."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    backend: str = "auto"
    """Backend of every op that has one of this name: auto, triton, fla, flex, varlen, chunked or naive."""


def main(name: str, arguments: list[str]) -> int:
    """Run `fastweight generate`; 130 if Ctrl-C ended the text."""
    args = parse(Generate, name, EXAMPLES, arguments)
    text = read_prompt(args)
    from fastweight.commands.models import describe_model, find_model, find_tokenizer, open_model
    from fastweight.generate import weights_hash

    folder = find_model(args.model)
    model = open_model(folder, args.device, args.backend)
    tokenizer = find_tokenizer(folder, args.tokenizer, model)
    say(*describe_model(folder, model))
    weights = weights_hash(folder) if args.state_in or args.state_out else ""
    start = time.perf_counter()
    generation, prompt_tokens = _read(args, model, tokenizer, text, weights)
    middle = time.perf_counter()
    made, count, interrupted = _stream(generation, tokenizer, args.format == "text")
    seconds = time.perf_counter() - middle
    _finish(args, model, generation, weights)
    state = generation.state
    say(
        f"{count:,} tokens in {seconds:.1f} s ({count / max(seconds, 1e-9):.1f}/s) · seed {generation.seed} · "
        f"state {state.num_bytes:,} bytes after {int(state.position[0]):,} tokens"
    )
    if args.format == "json":
        figures = {"read_seconds": middle - start, "generate_seconds": seconds, "state_bytes": state.num_bytes}
        counts = {"prompt_tokens": prompt_tokens, "generated_tokens": count, "position": int(state.position[0])}
        emit({"text": made, "seed": generation.seed, **counts, **figures})
    return INTERRUPTED if interrupted else 0


def _read(args: Generate, model: Any, tokenizer: Any, text: str, weights: str) -> tuple[Any, int]:
    """Read the prompt, after the state if one was given: (generation, tokens of the prompt)."""
    from fastweight.generate import generate, load_reading

    state, last_token = (None, None) if args.state_in is None else load_reading(args.state_in, weights)
    ids = [*([tokenizer.bos_id] if state is None else []), *tokenizer.encode(text).ids.tolist()]
    before = "" if state is None else f" after {int(state.position[0]) + 1:,} tokens read before ({args.state_in})"
    say(f"prompt    {len(ids):,} tokens{before}, tokenizer {tokenizer.name}")
    with progress_bar("reading", "tokens") if len(ids) > 1 else nullcontext() as progress:
        generation = generate(
            model, ids, state=None if state is None else state.to(model.device), last_token=last_token,
            max_tokens=args.max_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
            seed=args.seed, stop=(tokenizer.bos_id,), vocab_size=tokenizer.vocab_size, progress=progress,
        )  # fmt: skip
    return generation, len(ids)


def read_prompt(args: Generate) -> str:
    """The text of --prompt, --prompt-file or stdin; at most one of the options may be given."""
    require(args.prompt is None or args.prompt_file is None, "--prompt and --prompt-file are both given; give one.")
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file is not None:
        try:
            return args.prompt_file.read_bytes().decode("utf-8")  # read_text would turn \r\n into \n
        except UnicodeDecodeError as error:
            raise ValueError(f"{args.prompt_file} is not UTF-8 text ({error}). Convert it first.") from error
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict", newline="")  # the bytes as they come, \r\n too
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin is not UTF-8 text ({error}). Convert it first.") from error


def _stream(generation: Any, tokenizer: Any, visible: bool) -> tuple[str, int, bool]:
    """Write the text as it comes: (text, tokens, whether Ctrl-C ended it). What was made until then is kept."""
    from fastweight.data.streaming import StreamDecoder

    decoder, parts, count, interrupted = StreamDecoder(tokenizer), [], 0, False

    def put(text: str) -> None:
        parts.append(text)
        if visible:
            sys.stdout.write(text)
            sys.stdout.flush()

    try:
        for token in generation:
            count += 1
            put(decoder.push([token]))
    except KeyboardInterrupt:
        interrupted = True
    put(decoder.finish())
    if visible and count:
        sys.stdout.write("\n")
        sys.stdout.flush()
    return "".join(parts), count, interrupted


def _finish(args: Generate, model: Any, generation: Any, weights: str) -> None:
    """Save the state if asked, and name its faults."""
    from fastweight.generate import save_reading

    say(*(f"warning: {fault}" for fault in model.describe_faults(generation.state)))
    if args.state_out is not None:
        save_reading(args.state_out, generation, weights)
        say(f"written: {args.state_out}")
