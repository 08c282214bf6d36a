"""Large-scale semi-supervised acoustic-model training: a teacher labels, a student learns."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - for checkouts, which no installer has looked at
    raise ImportError(
        f"teacherstudent needs Python 3.11 or newer, this is {sys.version_info[0]}.{sys.version_info[1]}: make a "
        "virtual environment with a newer one, for instance `python3.11 -m venv .venv`"
    )

__version__ = "0.1.0"
