"""A small model of Stanza, for every test that parses."""

import pytest

from apportion import Stanza
from parsers import write_stanza


@pytest.fixture(scope="session")
def stanza(tmp_path_factory: pytest.TempPathFactory) -> Stanza:
    """A tokeniser and a constituency parser, trained on three sentences in some ten seconds."""
    return write_stanza(tmp_path_factory.mktemp("stanza"))
