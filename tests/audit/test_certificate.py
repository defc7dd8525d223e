"""A certificate is what was written and signed, or it is refused."""

import copy
import hashlib
import json

import pytest
from audit.audit_cases import in_process, settings, text
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fastweight.audit import CertificateError, Shipped, audit, markdown, verify
from fastweight.audit.check import Check


def write_keys(folder, name, key=None):
    """A private and a public key as PEM files."""
    key = key or ed25519.Ed25519PrivateKey.generate()
    pem, no = serialization.Encoding.PEM, serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, no))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def found():
    return audit(in_process("honest"), text((90, 30)), settings(excerpts=1, positions=2))


@pytest.fixture
def keys(tmp_path):
    return write_keys(tmp_path, "own")


def through_a_file(certificate):
    return json.loads(json.dumps(certificate, indent=2))


def test_a_signed_certificate_is_valid_after_its_way_through_a_file(found, keys):
    assert verify(through_a_file(found.certificate(keys[0])), keys[1])["verdict"] == "passed"


def test_the_signature_is_ed25519_over_the_bodys_canonical_json(found, keys):
    certificate = through_a_file(found.certificate(keys[0]))
    # An oracle of its own: RFC 8032 by the library, over bytes that are spelled out here.
    data = json.dumps(certificate["body"], sort_keys=True, separators=(",", ":")).encode()
    public = serialization.load_pem_public_key(keys[1].read_bytes())
    public.verify(bytes.fromhex(certificate["signature"]["signature"]), data)
    assert certificate["sha256"] == hashlib.sha256(data).hexdigest()


def test_an_altered_body_is_refused(found, keys):
    certificate = through_a_file(found.certificate(keys[0]))
    certificate["body"]["bits_per_byte"] -= 0.01
    with pytest.raises(CertificateError, match="altered"):
        verify(certificate)


def test_an_altered_body_with_its_own_sum_is_refused_by_the_signature(found, keys):
    certificate = through_a_file(found.certificate(keys[0]))
    certificate["body"]["verdict"] = "rejected"
    data = json.dumps(certificate["body"], sort_keys=True, separators=(",", ":")).encode()
    certificate["sha256"] = hashlib.sha256(data).hexdigest()
    with pytest.raises(CertificateError, match="signature does not fit"):
        verify(certificate)


def test_another_key_than_the_expected_one_is_refused(found, keys, tmp_path):
    other, _ = write_keys(tmp_path, "other")
    with pytest.raises(CertificateError, match="signed by the key"):
        verify(found.certificate(other), keys[1])


def test_an_unsigned_certificate_is_valid_only_if_no_key_is_asked_for(found, keys):
    assert verify(through_a_file(found.certificate()))["verdict"] == "passed"
    with pytest.raises(CertificateError, match="not signed"):
        verify(found.certificate(), keys[1])


BROKEN = {
    "no object": lambda c: [c],
    "no body": lambda c: {"sha256": c["sha256"], "signature": None},
    "another format": lambda c: c | {"body": {"format": "x"}},
    "another version": lambda c: c | {"body": c["body"] | {"version": 2}},
    "a signature without a key": lambda c: c | {"signature": {"algorithm": "Ed25519"}},
    "another algorithm": lambda c: c | {"signature": dict.fromkeys(("algorithm", "public_key", "signature"), "RSA")},
    "a key that is no hex": lambda c: (
        c | {"signature": {"algorithm": "Ed25519", "public_key": "zz", "signature": "00"}}
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_certificate_is_refused(found, name):
    with pytest.raises(CertificateError):
        verify(BROKEN[name](copy.deepcopy(found.certificate())))


def test_keys_of_another_kind_are_refused_with_what_is_needed(found, tmp_path):
    private, _ = write_keys(tmp_path, "ec", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(ValueError, match="an Ed25519 private key in PEM form"):
        found.certificate(private)
    (tmp_path / "text").write_text("no key")
    with pytest.raises(ValueError, match="an Ed25519 private key in PEM form"):
        found.certificate(tmp_path / "text")


def test_the_body_names_what_was_audited_by_its_sums(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"weights")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_bytes(b"code")
    audited = text((90, 30))
    shipped = Shipped(tmp_path / "model.bin", (tmp_path / "src",))
    body = audit(in_process("honest"), audited, settings(excerpts=1, positions=1), shipped=shipped).body
    sums = {path: entry["sha256"] for path, entry in body["shipped"].items()}
    assert sums == {
        str(tmp_path / "model.bin"): hashlib.sha256(b"weights").hexdigest(),
        str(tmp_path / "src" / "a.py"): hashlib.sha256(b"code").hexdigest(),
    }
    raw = b"".join(len(t).to_bytes(8, "little") + t for t in (d.text.encode() for d in audited.documents))
    assert body["text"]["sha256"] == hashlib.sha256(raw).hexdigest()
    assert (body["settings"]["seed"], body["text"]["tokenizer"]["sha256"]) == (7, audited.tokenizer.hash)


@pytest.mark.parametrize(("cap", "verdict", "words"), [(11, "passed", "0 below"), (10, "failed", ": 1 too many")])
def test_golf_p9_artifact_and_code_must_fit_the_cap_together(tmp_path, cap, verdict, words):
    (tmp_path / "model.bin").write_bytes(b"weights")
    (tmp_path / "a.py").write_bytes(b"code")
    shipped = Shipped(tmp_path / "model.bin", (tmp_path / "a.py",))
    chosen = settings(excerpts=1, positions=1, cap_bytes=cap)
    check = audit(in_process("honest"), text((90, 30)), chosen, shipped=shipped)["size"]
    assert check.verdict == verdict
    assert words in check.summary


def test_the_report_says_every_check_with_its_verdict(found):
    page = markdown(found.certificate())
    for check in found.checks:
        assert f"| {check.name} | {check.verdict} |" in page
    assert "Not testable: size, overlap." in page


def test_a_tolerance_is_stated_in_the_certificate_and_the_report():
    loose = audit(in_process("honest"), text((90, 30)), settings(excerpts=1, positions=1, tolerance=1e-3))
    assert loose.body["settings"]["tolerance"] == 1e-3
    assert "within 0.001 nats (stated by the user)" in loose["causality"].summary
    assert "| tolerance | 0.001 nats |" in markdown(loose.certificate())


def test_checks_hold_json_values_only(found):
    for check in found.checks:
        assert isinstance(check, Check)
        json.dumps(check.to_dict(), allow_nan=False)
