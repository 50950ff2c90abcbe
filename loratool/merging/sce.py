"""sce: select the entries that vary, calculate weights from the updates, erase the minority's signs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loratool.core.method import Method, Update
from loratool.merging._dense import scaled, weighted_sum
from loratool.merging._options import check_share
from loratool.merging._signs import majority, sum_agreeing
from loratool.merging._sparsify import largest


def merge(updates: Sequence[Update], weights: Sequence[float], *, select_topk: float = 1.0) -> Tensor:
    """The mean of the weighted updates where signs agree, weighted by their mean squares, `(out, in)`.

    Below 1, `select_topk` keeps that share of those positions where the updates vary at all: the most varying ones.
    """
    check_share("select_topk", select_topk)
    tasks = [scaled(update.dense(), weight) for update, weight in zip(updates, weights, strict=True)]
    if select_topk < 1:
        selected = _most_varying(tasks, select_topk)
        tasks = [task.masked_fill_(~selected, 0) for task in tasks]
    squares = [float(torch.linalg.vector_norm(task, dtype=torch.float64)) ** 2 for task in tasks]
    total = sum(squares)
    if not total:
        return tasks[0].zero_()
    shares = [square / total for square in squares]
    return sum_agreeing(tasks, shares, majority(tasks, "total"), shares)


def _most_varying(tasks: Sequence[Tensor], share: float) -> Tensor:
    """Where the variance over the inputs is among the int(share * n) largest of its n values above zero, bool."""
    mean = weighted_sum(tasks, [1 / len(tasks)] * len(tasks))
    variance = torch.zeros_like(mean)
    for task in tasks:
        difference = task - mean
        variance.addcmul_(difference, difference)
    return largest(variance, int(int(torch.count_nonzero(variance)) * share))


METHOD = Method(
    id="sce",
    title="SCE",
    formula="sum_agreeing e_i w_i D_i / sum_agreeing e_i, e_i = mean square of the selected w_i D_i",
    source="Wan et al. 2024, arXiv:2408.07990; mergekit's sce",
    when="Adapters of different importance in different modules: the stronger update weighs more.",
    merge=merge,
)
