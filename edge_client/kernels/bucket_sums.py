"""Signed bucket sums: a gradient over weights, seen from the K offsets of Hadamard directions.

With w = w0 + s * y[b] (`shared.directions`), dL/dy[j] = sum over the elements i with b[i] = j of s[i] * dL/dw[i], and
dL/da = H dL/dy. `reference` is the definition; numba gives its bits on any number of threads, because the work is cut
where the definition says; the torch kernel sums in float64 in an order of its own (on CUDA in no order), which differs
in the last bits. No peer repeats these sums, so that is allowed.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_client.kernels import Kernel
from edge_client.kernels.torch_any import _counters, _cut, _pieces, _signs, _words
from shared.directions import BUCKET_STREAM, SIGN_STREAM, buckets, signs

PART = 1 << 20  # elements summed in float32; parts are added in float64


class BucketSums(Protocol):
    """total (K,) += the signed bucket sums of a gradient.

    grads: bf16, fp16 or fp32 (S, L), contiguous, of the segments of tensor number `tensor` that begin at the flat
    indices starts, int64 (S,); all on one device. total: float64 (K,), on a device without float64 (MPS) float32.
    """

    def __call__(self, grads: Tensor, starts: Tensor, total: Tensor, *, tensor: int, pool_key: int) -> None:
        """See the class."""


def bucket_sums_for(kernel: Kernel) -> BucketSums:
    """The sums that go with the kernel that rebuilds the weights."""
    if kernel.name != "numba":
        return torch_sums
    from edge_client.kernels.bucket_sums_numba import numba_sums

    return numba_sums


def reference(
    grads: NDArray[np.float32], starts: NDArray[np.int64], seeds: int, *, tensor: int, pool_key: int
) -> NDArray[np.float64]:
    """The definition, slow. grads: float32 (S, L), starts: int64 (S,). Returns float64 (K,), K = `seeds`.

    The S * L products in order are cut into parts of `PART`; within one, each bucket's are added one after the other
    in float32; the parts' sums are added in order in float64.
    """
    length = grads.shape[1]
    flat = np.empty(grads.size, dtype=np.float32)
    at = np.empty(grads.size, dtype=np.int64)
    for row, start in enumerate(starts.tolist()):
        place = slice(row * length, (row + 1) * length)
        flat[place] = grads[row] * signs(pool_key, tensor, start, start + length)
        at[place] = buckets(pool_key, tensor, start, start + length, seeds)
    total = np.zeros(seeds, dtype=np.float64)
    for start in range(0, flat.size, PART):
        part = np.zeros(seeds, dtype=np.float32)
        np.add.at(part, at[start : start + PART], flat[start : start + PART])
        total += part
    return total


def torch_sums(grads: Tensor, starts: Tensor, total: Tensor, *, tensor: int, pool_key: int) -> None:
    """See BucketSums; on every device of torch."""
    seeds = len(total)
    for rows, columns, begins in _pieces(starts, grads.shape[1]):
        length = columns.stop - columns.start
        calls = _counters(begins, length, 128)
        rotations = _words(_counters(begins, length, seeds), tensor, BUCKET_STREAM, pool_key)[..., 0]
        block = calls * 128 // seeds - (begins // seeds)[:, None]
        first = rotations.gather(1, block) + calls * 128
        buckets_of = (first[..., None] + torch.arange(128, device=begins.device)) & (seeds - 1)
        at = _cut(buckets_of.flatten(1), begins, length, 128)
        signed = grads[rows, columns].to(total.dtype) * _signs(begins, length, tensor, SIGN_STREAM, pool_key)
        total.index_add_(0, at.reshape(-1), signed.reshape(-1))
