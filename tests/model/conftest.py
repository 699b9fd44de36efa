"""One thread for the tests of this folder: their tensors are small, and cores are shared with other tests.

With two threads on two busy cores the same tests take ten times as long: each operation waits for both.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
