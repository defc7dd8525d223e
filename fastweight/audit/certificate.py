"""The certificate: canonical JSON, its SHA-256, and an Ed25519 signature (RFC 8032) where a key is given."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fastweight.configs import check_keys, require

FORMAT, VERSION = "fastweight-audit", 1
NEEDS = "Signatures need the package cryptography. Run pip install 'fastweight[golf]'."


class CertificateError(ValueError):
    """A certificate that is damaged, altered, or not signed by whom it should be."""


def canonical(body: dict[str, Any]) -> bytes:
    """The one spelling of a body: sorted keys, no spaces, ASCII, numbers as Python writes them."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def seal(body: dict[str, Any], key: Path | None = None) -> dict[str, Any]:
    """{"body", "sha256", "signature"}: signed with the Ed25519 private key in the PEM file `key`, else null."""
    data = canonical(body)
    digest = hashlib.sha256(data).hexdigest()
    return {"body": body, "sha256": digest, "signature": None if key is None else _sign(data, key)}


def check_key(path: Path) -> None:
    """Raises ValueError if `path` holds no private key to sign with; worth knowing before a long audit."""
    _load(path, private=True)


def _sign(data: bytes, path: Path) -> dict[str, str]:
    private = _load(path, private=True)
    public = private.public_key().public_bytes_raw().hex()
    return {"algorithm": "Ed25519", "public_key": public, "signature": private.sign(data).hex()}


def verify(certificate: Any, public_key: Path | None = None) -> dict[str, Any]:
    """The body, if the certificate is as it was written. Raises CertificateError.

    public_key: PEM file; the certificate must then be signed by it. Without one, a signature is still checked against
    the key that the certificate names, which anyone could have put there.
    """
    body, signature = _parts(certificate)
    data = canonical(body)
    digest = hashlib.sha256(data).hexdigest()
    if certificate["sha256"] != digest:
        raise CertificateError(
            f"the certificate was altered: its body's SHA-256 is {digest}, it says {certificate['sha256']}."
        )
    if signature is None:
        if public_key is not None:
            raise CertificateError("the certificate is not signed; ask for a signed one, or leave --public-key out.")
        return body
    expected = None if public_key is None else _load(public_key, private=False).public_bytes_raw().hex()
    if expected not in (None, signature["public_key"]):
        raise CertificateError(f"the certificate is signed by the key {signature['public_key']}, not by {expected}.")
    _check_signature(data, signature)
    return body


def _parts(certificate: Any) -> tuple[dict[str, Any], dict[str, str] | None]:
    try:
        require(isinstance(certificate, dict), "it is no JSON object.")
        check_keys("certificate", certificate, ("body", "sha256", "signature"), ("body", "sha256", "signature"))
        body, signature = certificate["body"], certificate["signature"]
        require(isinstance(body, dict) and body.get("format") == FORMAT, f"its format is not {FORMAT!r}.")
        require(
            body.get("version") == VERSION, f"its version is {body.get('version')!r}, this library reads {VERSION}."
        )
        if signature is not None:
            require(isinstance(signature, dict), "its signature is no object.")
            names = ("algorithm", "public_key", "signature")
            check_keys("signature", signature, names, names)
            require(all(isinstance(value, str) for value in signature.values()), "its signature holds no strings.")
            require(signature["algorithm"] == "Ed25519", f"its signature is {signature['algorithm']!r}, not Ed25519.")
    except ValueError as error:
        raise CertificateError(f"no certificate of fastweight audit: {error}") from error
    return body, signature


def _check_signature(data: bytes, signature: dict[str, str]) -> None:
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError as error:
        raise ImportError(NEEDS) from error
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature["public_key"]))
        key.verify(bytes.fromhex(signature["signature"]), data)
    except (InvalidSignature, ValueError) as error:
        raise CertificateError(f"the signature does not fit: {error or 'it was made for other bytes'}.") from error


def _load(path: Path, *, private: bool) -> Any:
    """An Ed25519 key from a PEM file."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise ImportError(NEEDS) from error
    what = "private" if private else "public"
    advice = f"{path}: an Ed25519 {what} key in PEM form without a password is needed"
    try:
        data = path.read_bytes()
        key = serialization.load_pem_private_key(data, None) if private else serialization.load_pem_public_key(data)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{advice} ({error}).") from error
    kind = ed25519.Ed25519PrivateKey if private else ed25519.Ed25519PublicKey
    require(isinstance(key, kind), f"{advice}, this is {type(key).__name__}.")
    return key
