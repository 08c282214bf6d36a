"""Optional wheels, imported where they are used, with an error that says how to install them."""

import importlib
from types import ModuleType


def load(name: str, extra: str) -> ModuleType:
    """The module `name`, which `pip install 'teacherstudent[extra]'` brings. Raises ValueError without it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{name} cannot be imported ({error}): it is needed here. Run pip install 'teacherstudent[{extra}]'"
        ) from error
