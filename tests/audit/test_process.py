"""A foreign scorer that misbehaves: a clear error, or a failed check, and nothing is left running."""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from audit.audit_cases import HERE, foreign, settings, text

from fastweight.audit import AdapterError, ProcessScorer, Request, TimeLimitError, audit, text_of_strings
from fastweight.audit.protocol import read_hello
from fastweight.data import ByteTokenizer

HELLO = 'import json, sys, time, os; print(json.dumps({"protocol": 1}), flush=True)\n'
ANSWER = """
for line in sys.stdin:
    request = json.loads(line)
    sizes = [len(document["tokens"]) - 1 for document in request["documents"]]
    rows = [[-5.549076084895] * 257 for _ in request["ask"]]
    answer = {"log_probs": [[-5.549076084895] * n for n in sizes], "distributions": rows}
"""
SEND = "\n    print(json.dumps(answer), flush=True)\n"


@pytest.fixture
def adapter(tmp_path):
    """The scorer of an adapter with this body."""

    def make(code):
        path = tmp_path / "adapter.py"
        path.write_text(code, encoding="utf-8")
        return ProcessScorer(f"{sys.executable} {path}")

    return make


@pytest.fixture(scope="module")
def small():
    return text((90, 0, 30))


def score_once(scorer, documents=None, ask=((0, 3),), seconds=20.0):
    documents = text((9, 4)).documents if documents is None else documents
    session = scorer.open(20.0)
    try:
        return session.score(Request(documents, ask), seconds)
    finally:
        session.close()


def test_golf_p1_p6_p7_the_example_of_the_documentation_passes_without_fastweight(small):
    path = HERE / "adapter_example.py"
    found = audit(ProcessScorer(f"{sys.executable} -I {path}"), small, settings(excerpts=1))
    assert found.failed == []
    assert found.body["not_testable"] == ["score before update", "size", "overlap"]


def test_the_example_of_the_documentation_is_the_file_and_has_about_twenty_lines():
    code = (HERE / "adapter_example.py").read_text(encoding="utf-8")
    page = (HERE.parent.parent / "docs" / "audit.md").read_text(encoding="utf-8")
    assert f"```py\n{code}```" in page
    assert len(code.strip().split("\n")) <= 25


MISTAKES = {
    "dies at once": ("import sys; sys.exit('no GPU here')", "no GPU here"),
    "speaks another protocol": ("print('{\"protocol\": 2}', flush=True)\ninput()", "protocol 2"),
    "prints rubbish first": ("print('loading ...', flush=True)\ninput()", "loading ..."),
    "prints no object": ("print('[1]', flush=True)\ninput()", "one JSON object per line"),
    "dies when asked": (HELLO + "input(); raise SystemExit('out of memory')", "out of memory"),
    "prints rubbish": (HELLO + "input(); print('step 1', flush=True); input()", "step 1"),
    "leaves a document out": (HELLO + ANSWER + '    answer["log_probs"].pop()' + SEND, "1 lists for 2 documents"),
    "leaves a target out": (
        HELLO + ANSWER + '    answer["log_probs"][0].pop()' + SEND,
        r"shape \[8\], \[9\] is needed",
    ),
    "scores NaN": (HELLO + ANSWER + '    answer["log_probs"][0][3] = float("nan")' + SEND, "position 4 is not finite"),
    "gives impossible targets": (HELLO + ANSWER + '    answer["log_probs"][0][3] = float("-inf")' + SEND, "not finite"),
    "leaves a distribution out": (
        HELLO + ANSWER + '    answer["distributions"] = []' + SEND,
        "distributions has shape",
    ),
    "has a small vocabulary": (
        HELLO + ANSWER + '    answer["distributions"] = [row[1:] for row in rows]' + SEND,
        "at least 257",
    ),
    "has a broken distribution": (
        HELLO + ANSWER + '    answer["distributions"] = [[float("nan")] * 257 for _ in rows]' + SEND,
        "distribution at doc",
    ),
    "gives text for numbers": (HELLO + ANSWER + '    answer["log_probs"][0][3] = "x"' + SEND, "numbers"),
    "gives ragged rows": (HELLO + ANSWER + '    answer["log_probs"][0][3] = [1]' + SEND, "inhomogeneous"),
    "invents a key": (HELLO + ANSWER + '    answer["logprobs"] = 1' + SEND, "Did you mean log_probs"),
    "keeps a broken ledger": (HELLO + ANSWER + '    answer["ledger"] = [["score"]]' + SEND, "no .kind, hash, spans."),
    "scores what is not there": (HELLO + ANSWER + '    answer["ledger"] = [["score", "h", [[0, 1, 99]]]]' + SEND, None),
    "reads files elsewhere": (
        HELLO + ANSWER + '    answer["log_probs"] = "../../x.npy"' + SEND,
        "no file in the request",
    ),
    "claims nonsense": (HELLO + ANSWER + '    answer["bytes"] = float("nan")' + SEND, "bytes is nan"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_scorer_that_misbehaves_is_named_with_what_it_did(adapter, name):
    code, words = MISTAKES[name]
    with pytest.raises(AdapterError, match=words):
        audit(adapter(code), text((9, 4)), settings(excerpts=1, positions=1))


def test_an_answer_that_nobody_asked_for_is_no_answer_to_the_next_request(adapter):
    session, request = adapter(HELLO + ANSWER + SEND + SEND).open(20.0), Request(text((9, 4)).documents)
    try:
        session.score(request, 20.0)
        time.sleep(0.5)
        with pytest.raises(AdapterError, match="before it was asked"):
            session.score(request, 20.0)
    finally:
        session.close()


def test_an_archive_of_arrays_is_no_array(adapter):
    code = ANSWER + '    import numpy; numpy.savez(request["folder"] + "/x.npz", [0.0])\n'
    with pytest.raises(AdapterError, match=r"'x\.npz' is no \.npy file of one array"):
        score_once(adapter(HELLO + code + '    answer["log_probs"] = "x.npz"' + SEND))


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0])
def test_a_training_time_that_no_limit_can_be_held_against_is_refused(seconds):
    with pytest.raises(AdapterError, match="train_seconds must be a time in seconds"):
        read_hello({"protocol": 1, "train_seconds": seconds})


def test_pickles_are_never_loaded(adapter):
    code = ANSWER + '    import pickle; open(request["folder"] + "/x.npy", "wb").write(pickle.dumps({}))\n'
    with pytest.raises(AdapterError, match=r"pickle|magic|file type"):
        score_once(adapter(HELLO + code + '    answer["log_probs"] = "x.npy"' + SEND))


def test_arrays_may_come_as_files(adapter):
    code = (
        'import json, sys; import numpy as np; print(json.dumps({"protocol": 1, "npy": True}), flush=True)\n'
        "for line in sys.stdin:\n"
        "    request = json.loads(line); tokens = np.load(request['tokens'])\n"
        "    targets = np.concatenate([part[1:] for part in np.split(tokens, np.cumsum(request['lengths'])[:-1])])\n"
        "    np.save(request['folder'] + '/a.npy', -targets.astype(np.float32))\n"
        "    np.save(request['folder'] + '/b.npy', np.full((len(request['ask']), 257), -1.0))\n"
        "    print(json.dumps({'log_probs': 'a.npy', 'distributions': 'b.npy'}), flush=True)\n"
    )
    documents = text((9, 4)).documents
    answer = score_once(adapter(code), documents)
    for values, document in zip(answer.log_probs, documents, strict=True):
        assert np.array_equal(values, -document.tokens[1:].astype(np.float64))
    assert answer.distributions.shape == (1, 257)


def test_the_protocol_carries_every_token_and_text(tmp_path, adapter):
    code = HELLO + ANSWER + f'    open({str(tmp_path / "seen")!r}, "w").write(line)' + SEND
    documents = text_of_strings(["Ünï\n\0 ", "数"], ByteTokenizer()).documents
    score_once(adapter(code), documents, ((1, 2),))
    seen = json.loads((tmp_path / "seen").read_text())
    assert [document["text"] for document in seen["documents"]] == ["Ünï\n\0 ", "数"]
    assert [document["tokens"] for document in seen["documents"]] == [d.tokens.tolist() for d in documents]
    assert seen["ask"] == [[1, 2]]


def test_golf_p14_a_scorer_that_hangs_is_stopped_and_fails_the_clock(adapter, small):
    found = audit(adapter(HELLO + "input(); time.sleep(60)"), small, settings(eval_seconds=0.5))
    assert found.failed == ["time"]
    assert "the limit is 0.5 s" in found["time"].summary
    assert found["causality"].verdict == "not testable"


def test_golf_p14_loading_has_a_limit_of_its_own(adapter, small):
    found = audit(adapter("import time; time.sleep(60)"), small, settings(load_seconds=0.5))
    assert found.failed == ["time"]
    assert "(loading)" in found["time"].summary


def test_golf_p14_the_clock_of_scoring_starts_after_loading(adapter, small):
    scorer = adapter("import time; time.sleep(0.6)\n" + HELLO + ANSWER + SEND)
    found = audit(scorer, small, settings(excerpts=1, positions=1, eval_seconds=0.5))
    assert found.failed == []
    assert found["time"].numbers["load_seconds"] > 0.6


def test_golf_p14_a_training_that_took_too_long_by_its_own_word_fails(adapter, small):
    scorer = adapter(HELLO.replace('"protocol": 1', '"protocol": 1, "train_seconds": 601') + ANSWER + SEND)
    assert audit(scorer, small, settings(excerpts=1, positions=1)).failed == ["time"]


def test_a_process_that_hangs_is_killed_with_its_children(adapter, tmp_path):
    child = "import time; time.sleep(60)"
    code = (
        "import subprocess; subprocess.Popen([sys.executable, '-c', "
        f"{child!r}]); open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); input(); time.sleep(60)"
    )
    start = time.monotonic()
    with pytest.raises(TimeLimitError):
        score_once(adapter(HELLO + code), seconds=1.0)
    group = int((tmp_path / "pid").read_text())
    while members(group) and time.monotonic() < start + 30:
        time.sleep(0.05)
    assert members(group) == []
    assert time.monotonic() < start + 30


def test_a_daemon_that_left_the_group_cannot_hold_the_auditor_up(adapter, tmp_path):
    child = "import time; time.sleep(40)"
    code = (
        f"import subprocess; child = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); input(); time.sleep(60)"
    )
    start = time.monotonic()
    with pytest.raises(TimeLimitError):
        score_once(adapter(HELLO + code), seconds=1.0)
    assert time.monotonic() < start + 30
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def members(group):
    """Processes of a process group that still run, by /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, number = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(number) == group and state != "Z":
            found.append(stat)
    return found


def test_every_part_of_an_audit_has_a_process_of_its_own(adapter, tmp_path, small):
    code = f'open({str(tmp_path / "log")!r}, "a").write(str(os.getpid()) + " ")\n' + ANSWER + SEND
    audit(adapter(HELLO + code), small, settings(excerpts=2, positions=2))
    pids = (tmp_path / "log").read_text().split()
    assert len(set(pids)) == len(pids) == 3


def test_the_seed_is_nowhere_in_the_environment_or_the_requests(adapter, tmp_path, small):
    code = f"    open({str(tmp_path / 'seen')!r}, 'a').write(line + str(dict(os.environ)) + str(sys.argv))"
    seed = 918273645546372819
    audit(adapter(HELLO + ANSWER + code + SEND), small, settings(seed=seed, excerpts=1, positions=2))
    assert str(seed) not in (tmp_path / "seen").read_text()


def test_a_command_that_does_not_exist_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="no program 'no-such-program' found"):
        ProcessScorer("no-such-program --x")


def test_the_temporary_folder_of_a_process_is_gone_afterwards(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    score_once(ProcessScorer(foreign("honest")))
    assert os.listdir(tmp_path) == []  # noqa: PTH208
