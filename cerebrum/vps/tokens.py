"""Sequences of tokens, without a model. Pure."""

from __future__ import annotations

from collections.abc import Sequence

BLOCK = 64  # tokens that are compared at once, which is faster than one by one


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix of `a` and `b`, two sequences of one type."""
    limit = min(len(a), len(b))
    length = 0
    while length < limit and a[length : length + BLOCK] == b[length : length + BLOCK]:
        length += BLOCK
    while length < limit and a[length] == b[length]:
        length += 1
    return min(length, limit)
