"""Do the kernels work on this machine? Run as a program, because one that does not may end the process: an import says
little, and a wheel made for another processor dies at its first instruction.

    python -m edge_client.smoke cuda auto 4bit      torch's device, [kernel] name, [model] load_in

Prints a line of JSON: {"kernel": ..., "why": ..., "packed": null or why bitsandbytes cannot be used, "seconds": ...}.
"""

from __future__ import annotations

import json
import sys
import time

from edge_client.threads import sleep_while_waiting
from shared.errors import UserError

POOL_KEY, TENSOR, SEEDS, ELEMENTS = 0xFEDC_BA98_7654_3210, 7, 256, 4096


def main() -> None:
    """Compare the kernel that an agent would choose with the definition in numpy, to the bit."""
    device, name, load_in = sys.argv[1:4]
    sleep_while_waiting()
    try:
        print(json.dumps(tried(device, name, load_in)))
    except UserError as error:
        sys.exit(str(error))


def tried(device: str, name: str, load_in: str) -> dict[str, object]:
    """The findings. Raises UserError where the device or the kernel cannot be used."""
    import numpy as np
    import torch

    from edge_client.kernels import PADDING, choose
    from edge_client.packed import why_not
    from shared import directions

    try:
        where = torch.device(device)
        torch.zeros(1, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"torch cannot use {device!r} here: {str(error).splitlines()[0]}") from error
    choice = choose(where, name)  # type: ignore[arg-type]
    coefficients = np.linspace(-1e-2, 1e-2, SEEDS, dtype=np.float32)
    base = np.linspace(-1, 1, ELEMENTS, dtype=np.float32)
    padded = torch.from_numpy(directions.offsets(coefficients))
    padded = torch.cat((padded, padded[:PADDING])).to(where)
    began_s = time.perf_counter()
    out = torch.empty(1, ELEMENTS, device=where)
    starts = torch.zeros(1, dtype=torch.int64, device=where)
    weights = torch.from_numpy(base).to(where)
    choice.kernel.add_hadamard(weights, starts, out, tensor=TENSOR, padded=padded, pool_key=POOL_KEY)
    displaced = directions.displacement("hadamard", POOL_KEY, TENSOR, 0, ELEMENTS, coefficients)
    if not np.array_equal(out.cpu().numpy()[0], directions.add_displacement(base, "fp32", displaced)):
        raise UserError(
            f"the weights of the {choice.kernel.name} kernel are not those of the definition; choose another."
        )
    return {
        "kernel": choice.kernel.name,
        "why": choice.reason,
        "packed": why_not(where) if load_in in ("4bit", "8bit") else None,
        "seconds": time.perf_counter() - began_s,
    }


if __name__ == "__main__":
    main()
