"""Counting entries that updates pull in different directions."""

from __future__ import annotations

import torch

from loratool.ops.conflicts import sign_conflicts

A = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
B = torch.tensor([[1.0, -2.0, 3.0, 0.0]])
C = torch.tensor([[-1.0, 0.0, 0.0, -5.0]])


def test_counts() -> None:
    assert sign_conflicts([A, B], [1.0, 1.0]) == (1, 2)
    assert sign_conflicts([A, B, C], [1.0, 1.0, 1.0]) == (2, 3)
    assert sign_conflicts([A, A], [1.0, 2.0]) == (0, 3)


def test_weights_turn_signs_or_take_part_not_at_all() -> None:
    assert sign_conflicts([A, B], [1.0, -0.5]) == (1, 2)
    assert sign_conflicts([A, A], [1.0, -2.0]) == (3, 3)
    assert sign_conflicts([A, B], [1.0, 0.0]) == (0, 0)


def test_fewer_than_two() -> None:
    assert sign_conflicts([], []) == (0, 0)
    assert sign_conflicts([A], [1.0]) == (0, 0)
