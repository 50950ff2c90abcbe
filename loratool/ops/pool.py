"""Pool: independent jobs, one thread each, every thread with a BLAS of its own.

Small matrices gain nothing from several threads inside one product, but everything from several products at once; and
a job whose sums are added up by one thread gives the same bits on any number of cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")

Tick = Callable[[int, int], None]
"""Called with (done, total) after every job."""


def each(work: Callable[[Job], Result], jobs: Sequence[Job], tick: Tick | None = None) -> list[Result]:
    """`work` of every job, in the jobs' order. The first error stops what has not begun and is raised.

    As many threads as torch is allowed to use (OMP_NUM_THREADS). Jobs begin in order.
    """
    threads = torch.get_num_threads()
    results: list[Result] = []
    for result in _run(work, jobs, threads):
        results.append(result)
        if tick is not None:
            tick(len(results), len(jobs))
    return results


def _run(work: Callable[[Job], Result], jobs: Sequence[Job], threads: int) -> Iterator[Result]:
    if threads == 1:
        yield from map(work, jobs)
        return
    futures: list[Future[Result]] = []
    pool = ThreadPoolExecutor(
        min(threads, len(jobs)) or 1, "loratool", initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        futures = [pool.submit(work, job) for job in jobs]
        for future in futures:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
