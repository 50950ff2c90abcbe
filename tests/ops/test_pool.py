"""pool: order, errors, and one thread for each job."""

from __future__ import annotations

import threading

import pytest
import torch

from loratool.ops.pool import each


@pytest.fixture(params=[1, 2, 4])
def threads(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_in_order_with_ticks(threads: int) -> None:
    ticks: list[tuple[int, int]] = []
    assert each(lambda n: n * n, range(20), lambda *step: ticks.append(step)) == [n * n for n in range(20)]
    assert ticks == [(n, 20) for n in range(1, 21)]
    assert each(lambda n: n, []) == [] and each(lambda n: n, [7]) == [7]


def test_every_job_has_one_thread_and_the_setting_returns(threads: int) -> None:
    assert set(each(lambda _: torch.get_num_threads(), range(8))) == {1}
    assert torch.get_num_threads() == threads


def test_the_first_error_is_raised_and_stops_the_rest(threads: int) -> None:
    begun: list[int] = []
    gate = threading.Event()

    def work(n: int) -> int:
        begun.append(n)
        if n == 0:
            raise ValueError("first")
        gate.wait(0.2)
        return n

    with pytest.raises(ValueError, match="first"):
        each(work, range(100))
    assert len(begun) < 20
    assert torch.get_num_threads() == threads


def test_the_same_bits_on_any_number_of_threads() -> None:
    matrices = [torch.randn(200, 64, generator=torch.Generator().manual_seed(n)) for n in range(6)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(each(lambda m: m.T @ m, matrices))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for run in found[1:] for one, other in zip(run, found[0], strict=True))
