"""Threads that share work."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

__all__ = ["available_processors", "thread_pool"]


def available_processors() -> int:
    """Returns how many processors this process may run on, which may be fewer than there are."""
    return len(os.sched_getaffinity(0))


@contextmanager
def thread_pool(num_threads: int | None = None) -> Iterator[Executor]:
    """Runs as many threads, or one for each processor that there is to run on.

    What they have freed goes back to the system in the end: the allocator of each keeps it
    otherwise, a fifth of the memory that initial tables take.
    """
    with ThreadPoolExecutor(num_threads or available_processors()) as executor:
        yield executor
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc
        library.malloc_trim(0)
