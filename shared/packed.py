"""Packed base weights: the definition, to the bit. Every kernel is a fast twin of this module.

Packed are weights as bitsandbytes quantises them. The base weight of a run is what they stand for, rounded once to the
run's dtype; what a direction adds is added to that (`shared.directions.add_displacement`). So a device that keeps the
weights packed and one that unpacked them hold the same base, with the same digest. In float32, every operation rounded
to nearest even, element i of the flat row-major tensor:

    4 bit (nf4, fp4): table[c[i]] * scales[i div block]; c[i] is a half of byte i div 2, the upper for even i; the
        table has 16 numbers and comes with the weights.
    8 bit (LLM.int8's rows): (codes[i] * scales[i div block]) * float32(1 / 127); block is the length of a row.

Double quantisation of 4-bit scales: each is (table2[b] * scales2[j div block2]) + offset, b its byte and j its number.
Source: QLoRA (Dettmers et al., 2023), section 3; LLM.int8 (Dettmers et al., 2022), section 2; the order of the
operations is that of bitsandbytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.directions import float32_to_bf16
from shared.messages import WeightDtype

EIGHT_BIT_UNIT = np.float32(7.874015718698502e-3)  # 1 / 127, as bitsandbytes writes it

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class PackedArray:
    """One tensor: codes uint8 (N + 1 div 2,) with a table float32 (16,), or int8 (N,) without; scales float32."""

    codes: NDArray[np.uint8] | NDArray[np.int8]
    scales: Floats
    block: int  # weights that share a scale
    table: Floats | None


def unpack(packed: PackedArray, dtype: WeightDtype, start: int, stop: int) -> NDArray[np.generic]:
    """The base weights start..stop in the storage of `dtype` (float32, float16, or uint16 patterns for bf16): (n,)."""
    index = np.arange(start, stop)
    scale = packed.scales[index // packed.block]
    with np.errstate(over="ignore", invalid="ignore"):
        if packed.table is None:
            values = (packed.codes[index].astype(np.float32) * scale) * EIGHT_BIT_UNIT
        else:
            both = packed.codes[index // 2]
            values = packed.table[np.where(index % 2, both & 15, both >> 4)] * scale
        values[np.isnan(values)] = np.float32(np.nan)
        if dtype == "bf16":
            return float32_to_bf16(values)
        return values.astype({"fp32": np.float32, "fp16": np.float16}[dtype])
