"""Without what diffusers and transformers tell their own users: progress bars, hints, deprecations."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hides progress bars, log lines below an error, and developers' warnings of the libraries, inside the `with`
    block.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    bars = [library for library in libraries if library.is_progress_bar_enabled()]
    levels = [(library, library.get_verbosity()) for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        for library, level in levels:
            library.set_verbosity(level)
        for library in bars:
            library.enable_progress_bar()


@contextmanager
def heard(name: str) -> Iterator[list[str]]:
    """Gathers what the library of this name warns of, and does not show it, inside the `with` block."""
    messages: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger = logging.getLogger(name)
    before = logger.level, logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [Ear(logging.WARNING)], False
    logger.setLevel(logging.WARNING)
    try:
        yield messages
    finally:
        logger.handlers, logger.propagate = before[1], before[2]
        logger.setLevel(before[0])


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Hides all log lines below an error inside the `with` block.

    While it is imported, diffusers looks for other packages, and these tell of packages that could be there and of
    kernels on the Hub.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
