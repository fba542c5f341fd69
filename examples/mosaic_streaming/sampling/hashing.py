"""Hashes of whole numbers, and permutations by them. With integers alone, they are the same on each machine."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

FEW = 16  # numbers that are permuted by their hashes alone
ROUNDS = 8  # of a Feistel network, an even number


def mix(*parts: Ints | Hashes | int) -> Hashes:
    """Hash whole numbers, elementwise, into uint64 [1 or as long as the arrays], by the finalizer of SplitMix64."""
    mixed: Any = np.zeros(1, np.uint64)  # an array, as numpy warns where a single number overflows
    for part in parts:
        mixed = (mixed ^ np.asarray(part).astype(np.uint64)) + 0x9E3779B97F4A7C15
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB
        mixed ^= mixed >> 31
    return mixed


def by_hash(hashes: Hashes) -> Ints:
    """Return the order of hashes, int64 of the same length; places take their last digits, so that none are equal."""
    places = np.arange(hashes.size).astype(np.uint64)
    digits = np.uint64(hashes.size.bit_length())
    return np.argsort(hashes >> digits << digits | places)  # whichever algorithm sorts, as nothing is equal


def permute(index: Ints, size: Ints, key: Hashes) -> Ints:
    """Permute each index among the `size` numbers from 0 on, as its key says; all have the same shape, 1D.

    Of a few numbers, the hashes are put in order. Of more, a Feistel network permutes the numbers below the next power
    of two, and results beyond `size` are permuted again.
    """
    result = np.empty_like(index)
    few = np.flatnonzero(size <= FEW)
    hashes = mix(key[few, None], np.arange(FEW))
    own = np.take_along_axis(hashes, index[few, None], 1)
    result[few] = ((hashes < own) & (np.arange(FEW) < size[few, None])).sum(1)
    at = np.flatnonzero(size > FEW)
    value, size, key = index[at].astype(np.uint64), size[at].astype(np.uint64), key[at]
    bits = np.frexp(size - np.uint64(1))[1].astype(np.uint64)
    while at.size:
        width = np.array([bits // 2, bits - bits // 2])
        left, right = value >> width[1], value & ~(~np.uint64(0) << width[1])
        for number in range(ROUNDS):
            noise = (right ^ key) * np.uint64(0xD6E8FEB86659FD93) + np.uint64(number) * key
            noise = (noise ^ noise >> np.uint64(32)) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ noise >> np.uint64(64) - width[number % 2]
        value = left << width[1] | right
        result[at] = value
        again = value >= size
        at, value, size, key, bits = (array[again] for array in (at, value, size, key, bits))
    return result
