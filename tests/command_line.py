"""The program run in this process, for tests of commands."""

import json

import pytest

from fastweight import cli


def runner(capsys):
    """run(*arguments) → (exit code, stdout, stderr)."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err

    return run


def json_runner(capsys):
    """run(*arguments) → (exit code, the last line of stdout as JSON or None, stderr)."""
    plain = runner(capsys)

    def run(*arguments):
        code, out, err = plain(*arguments)
        last = out.strip().split("\n")[-1]
        return code, json.loads(last) if last.startswith("{") else None, err

    return run
