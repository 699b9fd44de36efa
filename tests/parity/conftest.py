"""One thread here too: see `tests/model/conftest.py`."""

from tests.model.conftest import one_thread

__all__ = ["one_thread"]
