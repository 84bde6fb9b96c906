"""Progress bars of the libraries below, which are for terminals."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Show the progress bars of `datasets` and `transformers` in a terminal only; leave the settings as they were."""
    of_datasets, of_transformers = not are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        disable_progress_bars()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if of_datasets:
            enable_progress_bars()
        if of_transformers:
            logging.enable_progress_bar()
