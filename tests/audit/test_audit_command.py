"""`fastweight audit` as a user meets it: exit codes, files, what stands where."""

import json
import subprocess
import sys

import pytest
from audit.audit_cases import foreign, looped_model, text
from audit.test_certificate import write_keys
from command_line import json_runner

from fastweight import cli
from fastweight.artifact import PackSpec, pack, write
from fastweight.data import ByteTokenizer

# Places are drawn anew each time; with two, both lay in the last chunk once in fifty runs, and nothing follows that.
QUICK = ("--excerpts", "1", "--positions", "6", "--excerpt-tokens", "60", "--seq-len", "24", "--batch-size", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """texts/, a store of them, a model folder, a packed file, keys."""
    folder = tmp_path_factory.mktemp("audit")
    (folder / "texts").mkdir()
    for i, document in enumerate(text((120, 50, 80, 61)).documents):
        (folder / "texts" / f"{i}.txt").write_text(document.text, encoding="utf-8")
    model = looped_model()
    model.save(folder / "model")
    ByteTokenizer().save(folder / "model" / "tokenizer")
    write(folder / "model.fwa", pack(model, PackSpec(method="nearest"), tokenizer=ByteTokenizer()))
    write_keys(folder, "key")
    prepare = ["data", "prepare", "--source", str(folder / "texts"), "--out", str(folder / "store")]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*prepare, "--heldout-fraction", "0.4"])
    return folder


@pytest.fixture
def fastweight(capsys, monkeypatch, folder):
    """Run the program in this process and `folder`: (exit code, the last line's JSON or None, stderr)."""
    monkeypatch.chdir(folder)

    return json_runner(capsys)


def test_golf_p1_p2_p9_a_packed_file_that_learns_passes_and_its_certificate_is_valid(fastweight, folder):
    learn = ("--learn", "in-place", "--learn-rates", "0.3", "--learn-chunk", "13")
    out = ("--json", "cert.json", "--report", "audit.md", "--key", "key.pem")
    code, result, _ = fastweight("audit", "model.fwa", "store", *learn, *QUICK, *out, "--code", "model/config.json")
    assert (code, result["verdict"], result["not_testable"]) == (0, "passed", ["overlap"])
    certificate = json.loads((folder / "cert.json").read_text())
    assert result["sha256"] == certificate["sha256"]
    assert certificate["body"]["scorer"]["settings"]["learner"] == "in-place"
    size = (folder / "model.fwa").stat().st_size + (folder / "model" / "config.json").stat().st_size
    check = next(c for c in certificate["body"]["checks"] if c["name"] == "size")
    assert check["numbers"]["total_bytes"] == size
    assert (folder / "audit.md").read_text(encoding="utf-8").startswith("# Audit: passed")
    code, result, _ = fastweight("audit", "verify", "cert.json", "--public-key", "key.pub")
    assert (code, result["valid"], result["verdict"]) == (0, True, "passed")


def test_the_audited_score_is_that_of_the_eval_command(fastweight):
    reading = ("--seq-len", "24", "--batch-size", "2")
    _, audited, _ = fastweight("audit", "model", "texts", *QUICK)
    _, scored, _ = fastweight("eval", "model", "texts", "--modes", "memory", *reading)
    assert audited["bits_per_byte"] == pytest.approx(scored["scores"]["memory"]["bits_per_byte"], abs=1e-12)


def test_golf_p2_a_cheat_behind_an_adapter_ends_with_exit_code_1(fastweight):
    code, result, _ = fastweight(
        "audit", "--adapter", foreign("train-then-score"), "texts", "--tokenizer", "bytes", *QUICK
    )
    assert (code, result["verdict"]) == (1, "rejected")
    assert "score before update" in result["failed"]


def test_an_adapter_that_dies_ends_with_exit_code_2_and_writes_nothing(fastweight, folder):
    command = f"{sys.executable} -c 'raise SystemExit(3)'"
    code, result, err = fastweight(
        "audit", "--adapter", command, "texts", "--tokenizer", "bytes", "--json", "none.json", "--report", "none.md"
    )
    assert (code, result) == (2, None)
    assert "Exit code 3" in err
    assert not list(folder.glob("*none*"))


def test_golf_p14_a_clock_that_runs_out_ends_with_exit_code_1(fastweight):
    code, result, _ = fastweight("audit", "model", "texts", *QUICK, "--eval-seconds", "0.000001")
    assert (code, result["failed"]) == (1, ["time"])


def test_a_model_that_trained_on_the_audited_text_fails(fastweight):
    code, result, _ = fastweight("audit", "model", "store", "--split", "train", *QUICK, "--train-store", "store")
    assert (code, result["failed"]) == (1, ["overlap"])
    # The texts are drawn from few words: blocks of 64 bytes differ, but nothing else does.
    code, result, _ = fastweight("audit", "model", "store", *QUICK, "--train-store", "store")
    assert result["checks"]["overlap"] == "passed"


def test_an_altered_certificate_ends_with_exit_code_1(fastweight, folder):
    fastweight("audit", "model", "texts", *QUICK, "--json", "other.json")
    changed = (folder / "other.json").read_text().replace('"verdict": "passed"', '"verdict": "failed"', 1)
    (folder / "other.json").write_text(changed)
    code, result, err = fastweight("audit", "verify", "other.json")
    assert (code, result["valid"]) == (1, False)
    assert "altered" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("model",), "MODEL and DATA are needed, got 1 paths"),
        (("--adapter", "true", "model", "texts"), "DATA is needed, got 2 paths"),
        (("--adapter", "true", "texts"), "an adapter needs --tokenizer"),
        (("--adapter", "no-such-program", "texts", "--tokenizer", "bytes"), "no program 'no-such-program'"),
        (("model", "texts", "--learn", "lora", "sgd"), "one learner, mode and rate at a time"),
        (("model", "texts", "--key", "key.pub", *QUICK), "an Ed25519 private key in PEM form"),
        (("model", "texts", "--excerpts", "0"), "excerpts must be at least 1"),
        (("model", "texts", "--eval-seconds", "inf"), "eval_seconds must be positive and finite, got inf"),
        (("model", "texts", "--code", "nowhere", *QUICK), "nowhere does not exist"),
        (("nowhere", "texts"), "nowhere does not exist"),
        (("verify", "nowhere.json"), "nowhere.json"),
    ],
)
def test_bad_input_ends_with_exit_code_2_and_says_what_to_do(fastweight, arguments, words):
    code, _, err = fastweight("audit", *arguments)
    assert code == 2
    assert words in err


def test_importing_the_auditor_needs_no_cryptography():
    code = "import sys; import fastweight.audit; print({'cryptography', 'tyro', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"
