"""The suite's own arithmetic on one thread.

Its products are many and small: threads would only wait for one another, for a long time where
the machine is busy. A backend is called with the threads that the process has.

Source: ``torch.set_num_threads``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_thread"]


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread within, and on as many as before after.

    Example:
        >>> with one_thread():
        ...     torch.get_num_threads()
        1
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)  # a backend may have set it
    try:
        yield
    finally:
        torch.set_num_threads(threads)
