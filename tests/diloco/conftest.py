import pytest
from training_cases import make_store

from fastweight.data import Store
from fastweight.diloco.simulate import memory_folder


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return Store.open(make_store(tmp_path_factory.mktemp("corpus")))


@pytest.fixture
def folder():
    """The address of an empty folder in memory."""
    with memory_folder() as url:
        yield url
