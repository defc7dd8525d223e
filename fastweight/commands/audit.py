"""fastweight audit, fastweight audit verify"""

import itertools
import json as json_module
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.markup import escape
from rich.table import Table

from fastweight.commands.base import MaybeInt, MaybePath, MaybeStr, emit, parse, progress_bar, say, show
from fastweight.commands.learning import Kind, LearnMode, make_learners
from fastweight.configs import require
from fastweight.files import write_text

REJECTED = 1
EXAMPLES = [
    "fastweight audit model.fwa data/stdlib --max-tokens 100000 --code train.py --json certificate.json",
    "fastweight audit runs/first data/stdlib --learn lora --learn-modes exact --excerpt-tokens 512",
    "fastweight audit runs/first data/stdlib --context windows --seq-len 1024 --stride 64 --train-store data/stdlib",
    'fastweight audit --adapter "python my_adapter.py" heldout.txt --tokenizer bytes --artifact model.bin --code src/',
    "fastweight audit model.fwa data/stdlib --key private.pem --json certificate.json --report audit.md",
    "fastweight audit verify certificate.json --public-key public.pem",
]
VERIFY_EXAMPLES = [
    "fastweight audit verify certificate.json",
    "fastweight audit verify certificate.json --public-key public.pem",
]
MaybeFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]


@dataclass(frozen=True, kw_only=True)
class AuditCommand:
    """Test by experiment that a score is what it says, and write a certificate.

    The scorer is a model of this library (a packed file, a model folder, the folder of a run), scored as `fastweight
    eval` does, or any program behind --adapter that speaks the protocol of docs/audit.md. Ten checks: causality,
    normalisation, score before update, each target once, bytes, bits per byte, determinism, time, size, overlap. What
    cannot be tested is said. The exit code is 0 if no check failed, 1 if one did, 2 if the audit could not be done.
    `fastweight audit verify CERTIFICATE` checks a certificate.
    """

    paths: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[MODEL] DATA")]]
    """MODEL (not with --adapter), and a token store or text: a file, folder, glob, as `data prepare --source` takes."""
    adapter: MaybeStr = None
    """Command of a foreign scorer, started without a shell."""
    context: Literal["document", "windows"] = "document"
    """How a model reads without a learner: each document from its start, or windows."""
    memory: Literal["on", "frozen"] = "on"
    """frozen: the model's own memory makes no inner updates."""
    learn: tuple[Kind, ...] = ()
    """Learner: sgd, lora or in-place; one at a time."""
    learn_modes: tuple[LearnMode, ...] = ("cached",)
    """Its mode: cached or exact."""
    learn_rates: tuple[float, ...] = ()
    """Its rate; by default its own."""
    learn_chunk: int = 0
    """Targets scored before each step; 0 is the learner's own number."""
    learn_epochs: int = 1
    """Passes of sgd over each chunk; more than one only in exact mode."""
    learn_rank: int = 0
    """Rank of lora; 0 is its own."""
    seq_len: int = 2048
    """Tokens read at a time, and tokens per window."""
    stride: int = 0
    """Targets scored per window after a document's first; 0 is half of --seq-len."""
    batch_size: int = 8
    """Sequences read side by side."""
    split: str = "heldout"
    """Split of a token store: heldout or train."""
    max_tokens: int = 0
    """Audit on at most this many tokens; 0 is no limit."""
    max_documents: int = 0
    """Audit on at most this many documents; 0 is no limit."""
    tokenizer: MaybeStr = None
    """bytes, sp:FILE or a folder; by default the one with the model. A token store brings its own."""
    text_field: str = "text"
    """Column or key that holds the text of jsonl and parquet data."""
    excerpts: int = 4
    """Pieces of the text that experiments run on."""
    excerpt_tokens: int = 512
    """Targets of each, at most; more than a chunk of the learner, or no update is seen in them."""
    positions: int = 8
    """Places per excerpt whose future is changed."""
    edges: tuple[int, ...] = ()
    """Lengths of chunks or windows, whose edges are tried; a ledger shows them by itself."""
    whole_again: int = 1
    """Times that the whole text is scored again, with other endings."""
    tolerance: float = 0.0
    """Largest difference in nats between runs that must be equal; 0 is bit-equal. Stands in the certificate."""
    claim: float = 1e-5
    """Largest difference between claimed and recomputed bits per byte."""
    eval_seconds: float = 600.0
    """Limit for scoring the text, from the end of loading on; the scorer is stopped there."""
    load_seconds: float = 600.0
    """Limit for loading."""
    train_limit: float = 600.0
    """Limit for training in seconds."""
    train_seconds: MaybeFloat = None
    """How long training took; by default what the run's folder says."""
    cap_bytes: int = 16_000_000
    """Limit for artifact and code together; 0 is none."""
    artifact: MaybePath = None
    """File or folder whose bytes count; by default MODEL."""
    code: tuple[Path, ...] = ()
    """Files and folders of code whose bytes count, too."""
    train_store: MaybePath = None
    """Token store that was trained on; its train split must not hold the audited text."""
    overlap_share: float = 0.05
    """Largest share of the text's bytes that it may hold."""
    seed: MaybeInt = None
    """Of everything that is drawn; without it one is drawn, which no scorer can know."""
    key: MaybePath = None
    """Ed25519 private key (PEM) that signs the certificate."""
    json: MaybePath = None
    """Write the certificate to this file."""
    report: MaybePath = None
    """Write a readable report (Markdown) to this file."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    backend: str = "auto"
    """Backend of every op that has one of this name: auto, triton, fla, flex, varlen, chunked or naive."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check that a certificate is as it was written, and who signed it. The exit code is 1 if it was altered."""

    certificate: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="CERTIFICATE")]]
    """File that `fastweight audit --json` wrote."""
    public_key: MaybePath = None
    """Ed25519 public key (PEM) that must have signed it."""


def main(name: str, arguments: list[str]) -> int:
    """Run `fastweight audit`."""
    if arguments[:1] == ["verify"]:
        return verify(f"{name} verify", arguments[1:])
    args = parse(AuditCommand, name, EXAMPLES, arguments)
    needed = 1 if args.adapter else 2
    require(
        len(args.paths) == needed,
        f"audit: {'DATA is' if args.adapter else 'MODEL and DATA are'} needed, got {len(args.paths)} paths.",
    )
    return _audit(args)


def _audit(args: AuditCommand) -> int:
    from fastweight.audit import ProcessScorer, audit, check_key, markdown, train_split

    if args.key is not None:
        check_key(args.key)
    subject = None if args.adapter else _open_model(args)
    scorer = ProcessScorer(args.adapter or "") if subject is None else subject.scorer
    text = _open_text(args, None if subject is None else subject.tokenizer)
    _say_what_runs(scorer, text)
    train = None if args.train_store is None else train_split(args.train_store)
    seconds = args.train_seconds if args.train_seconds is not None or subject is None else subject.train_seconds
    with progress_bar("auditing", "targets") as progress:
        found = audit(
            scorer, text, _settings(args), shipped=_shipped(args), train=train, train_seconds=seconds, progress=progress
        )
    certificate = found.certificate(args.key)
    _show(found)
    if args.report is not None:
        write_text(args.report, markdown(certificate))
        say(f"written: {args.report}")
    short = {name: found.body[name] for name in ("verdict", "failed", "not_testable", "bits_per_byte")}
    verdicts = {check.name: check.verdict for check in found.checks}
    emit(short | {"checks": verdicts, "sha256": certificate["sha256"]}, args.json, certificate)
    return 0 if found.passed else REJECTED


@dataclass(frozen=True)
class _Subject:
    """A model of this library that is audited."""

    scorer: Any
    tokenizer: Any
    train_seconds: float | None


def _open_model(args: AuditCommand) -> _Subject:
    """The model at the first path, and the learner of the options."""
    from fastweight.audit import ModelScorer, sha256_of
    from fastweight.commands.models import find_model

    learners = make_learners(args)
    require(len(learners) <= 1, f"audit: one learner, mode and rate at a time, got {', '.join(learners)}.")
    learner, mode = next(iter(learners.values())) if learners else (None, "cached")
    path = Path(args.paths[0])
    path = path if path.is_file() else find_model(path)
    load, tokenizer = _packed(args, path) if path.is_file() else _folder(args, path)
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    about = {"path": str(path), "files": {file.name: sha256_of(file) for file in files}}
    scorer = ModelScorer(
        load=load, tokenizer=tokenizer, learner=learner, mode=mode, context=args.context, memory=args.memory,
        seq_len=args.seq_len, stride=args.stride or None, batch_size=args.batch_size, about=about,
    )  # fmt: skip
    return _Subject(scorer, tokenizer, _train_seconds(Path(args.paths[0])))


def _packed(args: AuditCommand, path: Path) -> tuple[Any, Any]:
    """What loads a packed file anew, and the tokenizer named or inside."""
    from fastweight.artifact import unpack_tokenizer
    from fastweight.data import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else unpack_tokenizer(path)
    require(tokenizer is not None, f"audit: {path} holds no tokenizer; name one: --tokenizer bytes or FOLDER.")
    return partial(_load_packed, path, args.device, args.backend), tokenizer


def _load_packed(path: Path, device: str, backend: str) -> Any:
    from fastweight.artifact import unpack
    from fastweight.backends import describe_backends
    from fastweight.devices import pick_device

    model = unpack(path).to(pick_device(device)).set_backend(backend)
    describe_backends(model)  # a backend that cannot run is refused now
    return model.eval()


def _folder(args: AuditCommand, path: Path) -> tuple[Any, Any]:
    """What loads a model folder anew, and the tokenizer named or inside."""
    from fastweight.commands.models import find_tokenizer, open_model

    load = partial(open_model, path, args.device, args.backend)
    return load, find_tokenizer(path, args.tokenizer, load())


def _train_seconds(path: Path) -> float | None:
    """What a run's folder says of its training."""
    try:
        found = json_module.loads((path / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    seconds = found.get("seconds") if isinstance(found, dict) else None
    return float(seconds) if isinstance(seconds, (int, float)) else None


def _open_text(args: AuditCommand, tokenizer: Any) -> Any:
    """The audited text: a token store's split with its own tokenizer, or raw texts."""
    from fastweight.audit import text_of_split, text_of_strings
    from fastweight.data import Store, load_tokenizer, open_source
    from fastweight.data.store import MANIFEST, PROGRESS

    data, tokens, documents = args.paths[-1], args.max_tokens or None, args.max_documents or None
    if any((Path(data) / file).is_file() for file in (MANIFEST, PROGRESS)):
        split = Store.open(data).split(args.split)
        fits = tokenizer is None or tokenizer.hash == split.tokenizer.hash
        require(fits, f"audit: the store {data} was made with another tokenizer than the model's; prepare it again.")
        return text_of_split(split, tokens, documents)
    if tokenizer is None:
        require(args.tokenizer is not None, "audit: an adapter needs --tokenizer (bytes, sp:FILE or a folder).")
        tokenizer = load_tokenizer(str(args.tokenizer))
    source = open_source(data, args.text_field)
    texts = (text for file in source.files() for text in source.documents(file))
    return text_of_strings(itertools.islice(texts, documents), tokenizer, tokens)


def _settings(args: AuditCommand) -> Any:
    from fastweight.audit import AuditSettings

    names = (
        "excerpts", "excerpt_tokens", "positions", "edges", "whole_again", "tolerance", "claim", "load_seconds",
        "eval_seconds", "cap_bytes", "overlap_share",
    )  # fmt: skip
    values: dict[str, Any] = {name: getattr(args, name) for name in names}
    values["train_seconds"] = args.train_limit
    if args.seed is not None:
        values["seed"] = args.seed
    return AuditSettings(**values)


def _shipped(args: AuditCommand) -> Any:
    from fastweight.audit import Shipped
    from fastweight.commands.models import find_model

    artifact = args.artifact
    if artifact is None and not args.adapter:
        path = Path(args.paths[0])
        artifact = path if path.is_file() else find_model(path)
    return Shipped(artifact, args.code)


def _say_what_runs(scorer: Any, text: Any) -> None:
    about, counts = scorer.describe(), text.describe()
    say(f"scorer    {about.get('command') or about.get('path')}")
    if "settings" in about:
        say(f"settings  {', '.join(f'{name} {value}' for name, value in about['settings'].items())}")
    numbers = f"{counts['documents']:,} documents, {counts['targets']:,} targets, {counts['bytes']:,} bytes"
    say(f"text      {numbers}, tokenizer {counts['tokenizer']['name']}")


def _show(found: Any) -> None:
    table = Table("check", "verdict", "found", title=f"audit: {found.body['verdict']}", title_justify="left")
    colours = {"passed": "green", "failed": "bold red", "not testable": "yellow"}
    for check in found.checks:
        table.add_row(check.name, f"[{colours[check.verdict]}]{check.verdict}[/]", escape(check.summary))
    show(table)


def verify(name: str, arguments: list[str]) -> int:
    """Run `fastweight audit verify`."""
    args = parse(Verify, name, VERIFY_EXAMPLES, arguments)
    from fastweight.audit import CertificateError
    from fastweight.audit import verify as check

    try:
        found = json_module.loads(args.certificate.read_text(encoding="utf-8"))
        body = check(found, args.public_key)
    except (CertificateError, UnicodeDecodeError, json_module.JSONDecodeError) as error:
        say(f"{args.certificate}: {error}")
        emit({"certificate": str(args.certificate), "valid": False, "error": str(error)})
        return REJECTED
    signature = found["signature"]
    signed = None if signature is None else signature["public_key"]
    say(
        f"{args.certificate}: as it was written, on {body['made']}",
        "signed    no" if signed is None else f"signed    by {signed}{'' if args.public_key else ', whoever that is'}",
        f"verdict   {body['verdict']}, {body['bits_per_byte']} bits per byte",
    )
    about = {"certificate": str(args.certificate), "valid": True, "signed_by": signed, "verdict": body["verdict"]}
    emit(about | {"bits_per_byte": body["bits_per_byte"], "sha256": found["sha256"]})
    return 0
