"""Threads that share work."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

__all__ = ["available_processors", "thread_pool"]


def available_processors() -> int:
    """Returns how many processors this process may run on, which may be fewer than there are."""
    return len(os.sched_getaffinity(0))


def thread_pool(num_threads: int | None = None) -> ThreadPoolExecutor:
    """Returns a pool of as many threads, or of one for each processor that there is to run on."""
    return ThreadPoolExecutor(num_threads or available_processors())
