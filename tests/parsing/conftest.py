"""A small model of Stanza, for every test that parses."""

import pickle

import pytest
from filelock import FileLock

from apportion import Stanza
from small_stanza import write_stanza


@pytest.fixture(scope="session")
def stanza(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Stanza:
    """A tokeniser and a constituency parser, trained on three sentences in some ten seconds; once for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "stanza"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "parser").exists():
            (folder / "parser").write_bytes(pickle.dumps(write_stanza(folder)))
    return pickle.loads((folder / "parser").read_bytes())
