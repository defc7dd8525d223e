"""The command line: finds the command's file, runs it, and says in one line what a user did wrong."""

import importlib
import io
import os
import sys
import traceback

from fastweight import __version__
from fastweight.configs import near_names

# Each command is a file in fastweight/commands with `main(arguments)`; nothing heavy is imported before it is chosen.
COMMANDS = {
    "demo": ("demo", "train a small model here and see its memory work (minutes, CPU is enough)"),
    "convert-demo": ("convert_demo", "give SmolLM2-135M a memory here (a quarter of an hour, CPU is enough)"),
    "data": ("data", "prepare, verify and describe token stores"),
    "train": ("train", "train a model by a recipe, or continue a run"),
    "diloco": ("diloco", "train with workers that come and go and meet in a storage folder"),
    "simulate": ("simulate", "rehearse that on a simulated clock: loss against time for workers of unequal speed"),
    "chaos": ("chaos", "real worker processes here, killed, slowed and cut off while they train, with a report"),
    "eval": ("evaluate", "bits per byte and loss by position, with memory on, frozen and as sliding windows"),
    "audit": ("audit", "test a score by experiment (any scorer), write a certificate; verify one"),
    "generate": ("generate", "continue a text; keep what was read in a file and go on later"),
    "convert": ("conversion", "give a pretrained Llama, Qwen, Gemma … a memory, train it, compare it honestly"),
    "report": ("conversion", "print the report of a conversion"),
    "golf": ("golf", "contest runs: train on the clock, pack under a cap, score the file, account for every step"),
    "import": ("convert", "published checkpoint → model folder"),
    "export": ("convert", "model folder → published checkpoint"),
    "grow": ("grow", "make a model deeper without changing what it computes"),
    "presets": ("presets", "named model sizes with their parameter counts"),
    "doctor": ("doctor", "versions, devices, and which backend each op takes and why"),
}
INTERNAL_ERROR, USER_ERROR, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141


def usage() -> str:
    """The top-level help."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastweight COMMAND [OPTIONS]",
            "",
            "Language models whose memory is a small model that keeps learning while it reads.",
            "",
            "commands:",
            *lines,
            "",
            "options:",
            "  -h, --help     this text; `fastweight COMMAND --help` shows a command's options and examples",
            "  --version      print the version",
            "  --debug        anywhere: show the traceback of an error",
            "",
            "a first run:",
            "  fastweight data prepare --source python-stdlib --tokenizer bytes --out data/stdlib",
            "  fastweight train tiny-delta --data.store data/stdlib --out runs/first --steps 100",
            "  fastweight eval runs/first data/stdlib --max-tokens 20000",
            '  fastweight generate runs/first --prompt "def main(" --max-tokens 200',
            "",
            "Results go to stdout (the last line is JSON), progress to stderr. Exit codes: 0 done, 1 rejected",
            "by an audit, 2 wrong input, 130 interrupted, 143 stopped by SIGTERM (training can then be resumed).",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Run one command and leave with its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    try:
        code = run([argument for argument in arguments if argument != "--debug"])
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`| head`). Python would complain about it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = PIPE_CLOSED
    except Exception as error:
        code = explain(error, debug)
    sys.exit(code)


def explain(error: Exception, debug: bool) -> int:
    """Say on stderr what went wrong and return the exit code; a traceback only for `debug` and for mistakes of ours."""
    no_memory = _is_no_memory(error)
    user_error = no_memory or isinstance(error, (ValueError, OSError, ImportError))
    if debug or not user_error:
        traceback.print_exception(error)
    if not user_error:
        print("fastweight: this is a mistake in fastweight, not in what you asked for.", file=sys.stderr)
        return INTERNAL_ERROR
    print(f"fastweight: error: {_out_of_memory(error) if no_memory else error}", file=sys.stderr)
    return USER_ERROR


def _is_no_memory(error: Exception) -> bool:
    """Of Python or numpy, of torch on a GPU, or of torch on a CPU, which has no class of its own for it."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def _out_of_memory(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "") or "no more could be had"
    return (
        f"out of memory ({first.rstrip('.')}). Lower the batch size or the length of sequences (`fastweight COMMAND "
        "--help` names the options), take a smaller model, or end other programs."
    )


def run(arguments: list[str]) -> int:
    """Run the command that `arguments` name. Raises ValueError for an unknown one."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else USER_ERROR
    if arguments[0] in ("--version", "-V", "version"):
        print(__version__)
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}.{near_names(name, COMMANDS)} `fastweight --help` describes them.")
    module = importlib.import_module(f"fastweight.commands.{COMMANDS[name][0]}")
    return module.main(name, arguments[1:]) or 0
