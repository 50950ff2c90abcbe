"""Pool: independent jobs, one thread each, every thread with a BLAS of its own.

Small matrices gain nothing from several threads inside one product, but everything from several products at once; and
a job whose sums are added up by one thread gives the same bits on any number of cores.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

Job = TypeVar("Job")
Result = TypeVar("Result")

Tick = Callable[[int, int], None]
"""Called with (done, total) after every job."""


def each(
    work: Callable[[Job], Result], jobs: Sequence[Job], tick: Tick | None = None, workers: int | None = None
) -> list[Result]:
    """`work` of every job, in the jobs' order. The first error stops what has not begun and is raised.

    In `workers` threads: as many as `threads` says, if None. Jobs begin in order.
    """
    results: list[Result] = []
    with _one_thread_each():
        for result in _run(work, jobs, workers or threads()):
            results.append(result)
            if tick is not None:
                tick(len(results), len(jobs))
    return results


def threads() -> int:
    """How many threads may compute: torch's own number where it is in use, OMP_NUM_THREADS, or the CPUs we may use."""
    if "torch" in sys.modules:
        return int(sys.modules["torch"].get_num_threads())
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """numpy's BLAS has one thread in every job; torch's is told so in the threads themselves."""
    with _blas().limit(limits=1, user_api="blas"):
        yield


@cache
def _blas() -> ThreadpoolController:
    """What sets the number of BLAS threads. Finding the libraries takes a while: once is enough, numpy stays."""
    import numpy  # noqa: F401  # so that its BLAS is there to be found
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def _run(work: Callable[[Job], Result], jobs: Sequence[Job], count: int) -> Iterator[Result]:
    if count == 1:
        yield from map(work, jobs)
        return
    futures: list[Future[Result]] = []
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch is not None else 0
    pool = ThreadPoolExecutor(min(count, len(jobs)) or 1, "loratool", initializer=alone)
    try:
        futures = [pool.submit(work, job) for job in jobs]
        for future in futures:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        if torch is not None:
            torch.set_num_threads(before)


def alone() -> None:
    """In a thread of a pool: one thread for torch's products."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
