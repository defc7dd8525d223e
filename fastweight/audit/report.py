"""A certificate for people: Markdown."""

from typing import Any

MARKS = {"passed": "passed", "failed": "**failed**", "not testable": "not testable"}


def markdown(certificate: dict[str, Any]) -> str:
    """The readable form of a certificate."""
    body = certificate["body"]
    text, scorer = body["text"], body["scorer"]
    lines = [
        f"# Audit: {body['verdict']}",
        "",
        *(["Failed: " + ", ".join(body["failed"]) + ".", ""] if body["failed"] else []),
        *(["Not testable: " + ", ".join(body["not_testable"]) + ".", ""] if body["not_testable"] else []),
        "| | |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in _facts(certificate, text, scorer)),
        "",
        "| check | verdict | found |",
        "|---|---|---|",
        *(f"| {check['name']} | {MARKS[check['verdict']]} | {_cell(check['summary'])} |" for check in body["checks"]),
        "",
    ]
    return "\n".join(lines)


def _facts(certificate: dict[str, Any], text: dict[str, Any], scorer: dict[str, Any]) -> list[tuple[str, Any]]:
    body, signature = certificate["body"], certificate["signature"]
    value = body["bits_per_byte"]
    named = scorer.get("command") or scorer.get("path") or scorer["kind"]
    counts = f"{text['documents']:,} documents, {text['targets']:,} targets, {text['bytes']:,} bytes ({text['source']})"
    return [
        ("scorer", f"`{named}`"),
        ("text", f"{counts}, SHA-256 `{text['sha256']}`"),
        ("tokenizer", f"{text['tokenizer']['name']}, SHA-256 `{text['tokenizer']['sha256']}`"),
        ("bits per byte, recomputed", "–" if value is None else f"{value:.6f}"),
        ("seed", body["settings"]["seed"]),
        (
            "tolerance",
            f"{body['settings']['tolerance']:g} nats" if body["settings"]["tolerance"] else "none: bit-equal",
        ),
        ("made", f"{body['made']}, fastweight {body['software']['fastweight']}, torch {body['software']['torch']}"),
        ("body's SHA-256", f"`{certificate['sha256']}`"),
        ("signed", "no" if signature is None else f"Ed25519, key `{signature['public_key']}`"),
    ]


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
