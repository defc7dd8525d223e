import shutil

import pytest
from golf.golf_cases import PACK, SCORING, calibrated_run
from training_cases import make_store

from fastweight.golf.folder import RunFolder
from fastweight.golf.run import finish


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, store):
    """(folder of a finished run, its ledger); not to be changed."""
    folder = calibrated_run(tmp_path_factory.mktemp("golf") / "run", store)
    return folder, finish(folder.path, PACK, SCORING, say=lambda line: None, quiet=True)


@pytest.fixture
def copied(finished, tmp_path):
    """A finished run that may be changed."""
    shutil.copytree(finished[0].path, tmp_path / "run")
    return RunFolder(tmp_path / "run")
