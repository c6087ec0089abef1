"""Signed bucket sums on the CPU (`edge_client.kernels.bucket_sums` is the definition), built as the numba kernel is.

A group of 128 weights has one Philox call for its signs and 128 neighbours of the sums for its buckets, so it is added
in one run through the first cache; only a group at the end of the sums goes round their end.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, call-overload, operator, attr-defined"
from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange, uint64
from torch import Tensor

from edge_client.kernels.bucket_sums import PART
from edge_client.kernels.numba_bits import widened
from edge_client.kernels.numba_cpu import _CHUNK, _GROUPS, _flip, _match_threads, _philox, _stored
from shared.directions import BUCKET_STREAM, SIGN_STREAM


@njit(nogil=True)
def _add_group(bits, buffer, signed, words, group, sums, window):
    """sums[(window + i) mod K] += 128 signed values. `signed` is `buffer` as float32."""
    _flip(buffer, bits, 0, words, group)
    first = uint64(min(128, sums.size - window))
    at = uint64(window)
    for i in range(first):
        sums[at + i] += signed[i]
    for i in range(first, uint64(128)):
        sums[i - first] += signed[i]


@njit(nogil=True)
def _add_segment(grads, place, start, stop, sums, shift, tensor, key, words, rotations):
    """Weights start..stop, at most `_CHUNK`, whose gradients begin at grads[place]."""
    values = np.empty(128, np.float32)
    buffer = np.empty(128, np.uint32)
    first, block = start >> 7, start >> shift
    groups = ((stop + 127) >> 7) - first
    _philox(first, groups, tensor, SIGN_STREAM, key, words)
    _philox(block, ((stop - 1) >> shift) - block + 1, tensor, BUCKET_STREAM, key, rotations)
    for group in range(groups):
        element = (first + group) << 7
        window = (rotations[0, (element >> shift) - block] + element) & ((1 << shift) - 1)
        lower, upper = max(start, element), min(stop, element + 128)
        if upper - lower < 128:
            values[:] = 0.0  # adding it changes nothing
        at, skip = uint64(place + lower - start), uint64(lower - element)
        for i in range(uint64(upper - lower)):
            values[skip + i] = widened(grads[at + i])
        _add_group(values.view(np.uint32), buffer, buffer.view(np.float32), words, group, sums, window)


@njit(nogil=True, cache=True, parallel=True)
def _parts(grads, starts, length, sums, shift, tensor, key, part_size):
    """sums (parts, K) = those of each part of the flat gradient."""
    for part in prange(sums.shape[0]):
        words = np.empty((4, _GROUPS), np.uint32)
        rotations = np.empty((4, _CHUNK // 256 + 2), np.uint32)
        place = part * part_size
        end = min(grads.size, place + part_size)
        while place < end:
            segment, offset = place // length, place % length
            count = min(_CHUNK, min(length - offset, end - place))
            start = starts[segment] + offset
            _add_segment(grads, place, start, start + count, sums[part], shift, tensor, key, words, rotations)
            place += count


def numba_sums(grads: Tensor, starts: Tensor, total: Tensor, *, tensor: int, pool_key: int) -> None:
    """See `edge_client.kernels.bucket_sums.BucketSums`; for the CPU's memory."""
    if not grads.numel():
        return
    _match_threads()
    sums = np.zeros((-(-grads.numel() // PART), len(total)), dtype=np.float32)
    shift = len(total).bit_length() - 1
    _parts(_stored(grads), starts.numpy(), grads.shape[1], sums, shift, tensor, np.uint64(pool_key), PART)
    for part in sums:
        total += torch.from_numpy(part)
