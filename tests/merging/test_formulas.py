"""Every method equals its formula, written out here a second time: per entry, in float64, with loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from loratool.core.registry import methods
from loratool.merging import _noise, _sparsify
from tests.contracts import PairUpdate, merged, random_updates

METHODS = methods()
Matrix = np.ndarray[Any, np.dtype[np.float64]]
SHAPE = (7, 6)
WEIGHTS = [(1.0, 1.0, 1.0), (0.5, 1.5, 0.25), (1.0, -0.5, 0.75), (0.0, 1.0, 2.0)]
each_weights = pytest.mark.parametrize("weights", WEIGHTS, ids=str)
each_sign = pytest.mark.parametrize("sign", ["total", "frequency"])


@pytest.fixture
def updates() -> list[PairUpdate]:
    return random_updates((2, 3, 1), SHAPE, seed=3)


def matrices(updates: Sequence[PairUpdate]) -> list[Matrix]:
    return [update.dense().numpy().copy() for update in updates]


def assert_is(found: torch.Tensor, expected: Matrix) -> None:
    torch.testing.assert_close(found, torch.from_numpy(np.asarray(expected)), rtol=1e-9, atol=1e-11)


# -- sparsifiers ----------------------------------------------------------------------------------------------------


def top(values: Matrix, density: float) -> Matrix:
    kept = sorted(range(values.size), key=lambda at: -abs(values.flat[at]))[: int(density * values.size)]
    found = np.zeros_like(values)
    for at in kept:
        found.flat[at] = values.flat[at]
    return found


def middle(values: Matrix, density: float, gamma: float) -> Matrix:
    """mergekit's indices into the ascending order."""
    rising = sorted(range(values.size), key=lambda at: abs(values.flat[at]))
    n_top = int(gamma * values.size)
    n_bottom = values.size - int(density * values.size) - n_top
    if n_bottom < 0:
        n_top, n_bottom = n_top + n_bottom, 0
    found = np.zeros_like(values)
    for at in rising[n_bottom : values.size - n_top]:
        found.flat[at] = values.flat[at]
    return found


def noise_of(update: PairUpdate, seed: int) -> Matrix:
    return _noise.uniform(update, seed, torch.device("cpu")).double().numpy()


def dare(update: PairUpdate, density: float, seed: int) -> Matrix:
    values, noise = matrices([update])[0], noise_of(update, seed)
    return np.where(noise < density, values / density, 0)


def della(update: PairUpdate, density: float, epsilon: float, seed: int) -> Matrix:
    values, noise = matrices([update])[0], noise_of(update, seed)
    found = np.zeros_like(values)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            rank = sum(abs(other) < abs(value) for other in row)  # 0 for the smallest
            chance = density - epsilon + 2 * epsilon * rank / (len(row) - 1)
            found[i, j] = value / chance if noise[i, j] < chance else 0
    return found


# -- sign election --------------------------------------------------------------------------------------------------


def elected(column: Sequence[float], sign: str) -> float:
    votes = sum(column) if sign == "total" else sum(np.sign(column))
    return 1.0 if votes >= 0 else -1.0


def entrywise(inputs: Sequence[Matrix], rule: Callable[[list[float]], float]) -> Matrix:
    found = np.zeros_like(inputs[0])
    for at in np.ndindex(*found.shape):
        found[at] = rule([values[at] for values in inputs])
    return found


def peft_ties(inputs: Sequence[Matrix], weights: Sequence[float], sign: str) -> Matrix:
    def rule(column: list[float]) -> float:
        side = elected(column, sign)
        kept = [w * x for w, x in zip(weights, column) if np.sign(x) == side]
        return sum(kept) / max(1, len(kept))

    return entrywise(inputs, rule)


def mergekit_ties(inputs: Sequence[Matrix], weights: Sequence[float], sign: str, normalize: bool) -> Matrix:
    def rule(column: list[float]) -> float:
        weighted = [w * x for w, x in zip(weights, column)]
        side = elected(weighted, sign)
        total = sum(x for x in weighted if np.sign(x) == side)
        divisor = sum(w for w, x in zip(weights, weighted) if np.sign(x) == side) or 1.0
        return total / divisor if normalize else total

    return entrywise(inputs, rule)


def ties(inputs: Sequence[Matrix], weights: Sequence[float], sign: str, normalize: bool) -> Matrix:
    return mergekit_ties(inputs, weights, sign, True) if normalize else peft_ties(inputs, weights, sign)


def weighted_sum(inputs: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    return np.sum([w * x for w, x in zip(weights, inputs)], axis=0)


each_normalize = pytest.mark.parametrize("normalize", [False, True])


@each_weights
@each_sign
@each_normalize
@pytest.mark.parametrize("density", [0.3, 0.75, 1.0])
def test_ties(updates: Any, weights: Any, sign: str, normalize: bool, density: float) -> None:
    found = merged(METHODS["ties"], updates, weights, density=density, sign=sign, normalize=normalize)
    trimmed = [top(values, density) for values in matrices(updates)]
    assert_is(found, ties(trimmed, weights, sign, normalize))
    twice = merged(
        METHODS["ties"], updates, weights, density=density, sign=sign, normalize=normalize, **{"lambda": 2.5}
    )
    assert_is(twice, 2.5 * found.numpy())


@each_weights
@each_sign
@each_normalize
def test_dare(updates: Any, weights: Any, sign: str, normalize: bool) -> None:
    thinned = [dare(update, 0.6, 11) for update in updates]
    found = merged(METHODS["dare_linear"], updates, weights, density=0.6, seed=11, **{"lambda": 0.5})
    assert_is(found, 0.5 * weighted_sum(thinned, weights))
    found = merged(METHODS["dare_ties"], updates, weights, density=0.6, seed=11, sign=sign, normalize=normalize)
    assert_is(found, ties(thinned, weights, sign, normalize))


@each_weights
@each_sign
@each_normalize
def test_della(updates: Any, weights: Any, sign: str, normalize: bool) -> None:
    thinned = [della(update, 0.6, 0.2, 11) for update in updates]
    options = {"density": 0.6, "epsilon": 0.2, "seed": 11, "lambda": 0.5}
    assert_is(merged(METHODS["della_linear"], updates, weights, **options), 0.5 * weighted_sum(thinned, weights))
    found = merged(METHODS["della"], updates, weights, sign=sign, normalize=normalize, **options)
    assert_is(found, 0.5 * mergekit_ties(thinned, weights, sign, normalize))


def test_della_ranks_in_blocks(updates: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = merged(METHODS["della_linear"], updates, WEIGHTS[0], density=0.5)
    monkeypatch.setattr(_sparsify, "_BLOCK", 13)
    assert torch.equal(merged(METHODS["della_linear"], updates, WEIGHTS[0], density=0.5), whole)


def test_della_without_epsilon_is_dare(updates: Any) -> None:
    found = merged(METHODS["della_linear"], updates, WEIGHTS[1], density=0.5, epsilon=0.0)
    assert_is(found, merged(METHODS["dare_linear"], updates, WEIGHTS[1], density=0.5).numpy())


def test_della_of_one_column() -> None:
    narrow = random_updates((1,), (50, 1))
    found = merged(METHODS["della_linear"], narrow, [1.0], density=0.5, epsilon=0.3)
    assert_is(found, dare(narrow[0], 0.5, 0))


@each_weights
@each_sign
@each_normalize
@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.9, 0.3), (0.5, 0.0), (1.0, 0.2), (0.2, 0.5)])
def test_breadcrumbs(updates: Any, weights: Any, sign: str, normalize: bool, density: float, gamma: float) -> None:
    kept = [middle(values, density, gamma) for values in matrices(updates)]
    options = {"density": density, "gamma": gamma, "lambda": 0.5}
    assert_is(merged(METHODS["breadcrumbs"], updates, weights, **options), 0.5 * weighted_sum(kept, weights))
    found = merged(METHODS["breadcrumbs_ties"], updates, weights, sign=sign, normalize=normalize, **options)
    assert_is(found, 0.5 * mergekit_ties(kept, weights, sign, normalize))


@each_weights
def test_magnitude_prune(updates: Any, weights: Any) -> None:
    expected = weighted_sum([top(values, 0.4) for values in matrices(updates)], weights)
    assert_is(merged(METHODS["magnitude_prune"], updates, weights, density=0.4), expected)


def test_the_largest_of_equals_come_first() -> None:
    size = torch.tensor([[1.0, 2.0, 1.0], [1.0, 0.0, 3.0]])
    assert _sparsify.largest(size, 3).tolist() == [[True, True, False], [False, False, True]]
    assert _sparsify.largest(size, 0).sum() == 0
    assert _sparsify.largest(size, 6).all()
    assert _sparsify.largest(torch.tensor([0.0, 2.0, 0.0]), 2).tolist() == [False, True, False]
    assert _sparsify.largest(torch.zeros(0), 0).numel() == 0


# -- sums of factors ------------------------------------------------------------------------------------------------


@each_weights
def test_concat(updates: Any, weights: Any) -> None:
    assert_is(merged(METHODS["concat"], updates, weights), weighted_sum(matrices(updates), weights))
    left, right = METHODS["concat"].apply(updates, weights, {})
    assert left.shape[1] == right.shape[0] == sum(r for r, w in zip((2, 3, 1), weights) if w)


@each_weights
def test_linear(weights: Any) -> None:
    updates = random_updates((2, 2, 2), SHAPE)
    left = sum(math.sqrt(abs(w)) * u.left.numpy() for u, w in zip(updates, weights))
    right = sum(np.sign(w) * math.sqrt(abs(w)) * u.right.numpy() for u, w in zip(updates, weights))
    assert_is(merged(METHODS["linear"], updates, weights), left @ right)


# -- on the sphere --------------------------------------------------------------------------------------------------


def arc(first: Matrix, second: Matrix, t: float) -> Matrix:
    cosine = (first * second).sum() / (np.linalg.norm(first) * np.linalg.norm(second))
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0), (1.0, -0.7)])
def test_slerp(updates: Any, weights: Any, t: float) -> None:
    first, second = (w * values for w, values in zip(weights, matrices(updates)))
    assert_is(merged(METHODS["slerp"], updates[:2], weights, t=t), arc(first, second, t))


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, -3.0])
def test_slerp_of_parallel_updates_is_a_straight_line(updates: Any, factor: float) -> None:
    one = updates[0]
    other = PairUpdate(1, one.name, one.left * factor, one.right)
    assert_is(merged(METHODS["slerp"], [one, other], (1, 1), t=0.25), (0.75 + 0.25 * factor) * one.dense().numpy())
    found = merged(METHODS["nuslerp"], [one, other], (3, 1))
    assert_is(found, (0.75 + 0.25 * factor) * one.dense().numpy())


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0), (1.0, -0.4), (1.0, -1.0)])
def test_nuslerp(updates: Any, weights: Any) -> None:
    first, second = matrices(updates[:2])
    t = weights[1] / sum(weights) if sum(weights) else 0.5
    two = updates[:2]
    assert_is(merged(METHODS["nuslerp"], two, weights), arc(first, second, t))
    rows = np.array([arc(a, b, t) for a, b in zip(first, second)])
    assert_is(merged(METHODS["nuslerp"], two, weights, flatten=False), rows)
    columns = np.array([arc(a, b, t) for a, b in zip(first.T, second.T)]).T
    assert_is(merged(METHODS["nuslerp"], two, weights, flatten=False, row_wise=True), columns)
    assert_is(merged(METHODS["nuslerp"], two, weights, row_wise=True), arc(first, second, t))


def test_slerp_beside_zero_is_a_right_angle(updates: Any) -> None:
    """What mergekit gives: a vector without direction stands square on every other."""
    one, zero = updates[0], random_updates((0,), SHAPE)[0]
    assert_is(merged(METHODS["slerp"], [one, zero], (1, 1)), math.sqrt(0.5) * one.dense().numpy())


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 1.5, 0.25), (1.0, -0.5, 0.75)])
def test_karcher(updates: Any, weights: Any) -> None:
    """At the mean, the weighted pulls along the arcs cancel; its length is the mean of the norms."""
    found = merged(METHODS["karcher"], updates, weights, max_iter=200, tol=1e-12).numpy()
    shares = [abs(w) / sum(map(abs, weights)) for w in weights]
    inputs = [math.copysign(1, w) * values for w, values in zip(weights, matrices(updates))]
    assert np.linalg.norm(found) == pytest.approx(sum(s * np.linalg.norm(d) for s, d in zip(shares, inputs)))
    mean = found / np.linalg.norm(found)
    pull = np.zeros_like(mean)
    for share, direction in zip(shares, inputs):
        unit = direction / np.linalg.norm(direction)
        cosine = (unit * mean).sum()
        pull += share * math.acos(cosine) / math.sin(math.acos(cosine)) * (unit - cosine * mean)
    assert np.linalg.norm(pull) < 1e-9


def test_karcher_of_two_is_slerp_with_the_mean_norm(updates: Any) -> None:
    first, second = matrices(updates[:2])
    direction = arc(first / np.linalg.norm(first), second / np.linalg.norm(second), 0.25)
    size = 0.75 * np.linalg.norm(first) + 0.25 * np.linalg.norm(second)
    assert_is(merged(METHODS["karcher"], updates[:2], (3, 1), max_iter=100, tol=1e-13), size * direction)


def test_karcher_of_opposite_updates_is_the_mean(updates: Any) -> None:
    one = updates[0]
    other = PairUpdate(1, one.name, one.left * -3, one.right)
    assert_is(merged(METHODS["karcher"], [one, other], (1, 1)), -one.dense().numpy())


# -- others ---------------------------------------------------------------------------------------------------------


@each_weights
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["large", "as small as in a LoRA"])
def test_sce(updates: Any, weights: Any, share: float, scale: float) -> None:
    updates = [PairUpdate(u.index, u.name, u.left * scale, u.right) for u in updates]
    tasks = [w * values for w, values in zip(weights, matrices(updates))]
    variance = entrywise(tasks, lambda column: float(np.var(column)))
    kept = sorted(range(variance.size), key=lambda at: -variance.flat[at])[: int(share * np.count_nonzero(variance))]
    for task in tasks:
        for at in set(range(task.size)) - set(kept):
            task.flat[at] = 0
    squares = [float((task**2).mean()) for task in tasks]
    importance = [square / sum(squares) for square in squares]

    def rule(column: list[float]) -> float:
        side = elected(column, "total")
        agreeing = [(e, x) for e, x in zip(importance, column) if np.sign(x) == side]
        return sum(e * x for e, x in agreeing) / (sum(e for e, _ in agreeing) or 1.0)

    found = merged(METHODS["sce"], updates, weights, select_topk=share)
    assert_is(found / scale, entrywise(tasks, rule) / scale)


@pytest.mark.parametrize("t", [1e-4, 0.5, 1e3])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -2.0)])
def test_nearswap(updates: Any, weights: Any, t: float) -> None:
    def rule(column: list[float]) -> float:
        first, second = column
        share = min(1.0, t / max(abs(first - second), 1e-6))
        return share * second + (1 - share) * first

    tasks = [w * values for w, values in zip(weights, matrices(updates))]
    assert_is(merged(METHODS["nearswap"], updates[:2], weights, t=t), entrywise(tasks, rule))


@each_weights
@each_sign
@each_normalize
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_knots(updates: Any, weights: Any, sign: str, normalize: bool, density: float) -> None:
    """The dense SVD of the updates side by side."""
    inputs = matrices(updates)
    u, s, vt = np.linalg.svd(np.hstack(inputs), full_matrices=False)
    kept = s > 1e-9
    signs = np.sign(u[np.abs(u).argmax(axis=0), np.arange(len(s))])  # drawn elections depend on them
    u, vt = u * signs, vt * signs[:, None]
    parts = [top(part, density) for part in np.split(s[kept, None] * vt[kept], len(inputs), axis=1)]
    found = METHODS["knots"].apply(updates, weights, {"density": density, "sign": sign, "normalize": normalize})
    assert found[0].shape == (SHAPE[0], kept.sum())
    assert_is(found[0] @ found[1], u[:, kept] @ ties(parts, weights, sign, normalize))


def test_knots_keeps_a_small_rank() -> None:
    updates = random_updates((2, 3, 0), (40, 30))
    left, right = METHODS["knots"].apply(updates, (1, 1, 1), {})
    assert (left.shape, right.shape) == ((40, 5), (5, 30))
    # One basis of orthogonal columns of equal length, as large as the coordinates beside it.
    length = (left.T @ left).diagonal().mean()
    torch.testing.assert_close(left.T @ left, torch.eye(5, dtype=left.dtype) * length)
    torch.testing.assert_close(length.sqrt(), right.norm())
    same = [updates[0], PairUpdate(1, "x", updates[0].left * 2, updates[0].right)]
    assert METHODS["knots"].apply(same, (1, 1), {})[0].shape == (40, 2)
