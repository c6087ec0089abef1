"""What an exact gradient needs, against the memory there is: how many sequences at once, or none, with the arithmetic.

In bytes until it is said, as in `fit`, whose weights and constant it shares. Its own are what every layer was given and
one layer's activations with their gradients (`first_order_layers`), slices of a weight and of its gradient
(`first_order_gradient`), logits with their gradient, and arrays of K numbers. A model whose layers cannot run again one
by one needs more than is said here, which shows in its first step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from edge_client.fit import ITEM, LOGITS, MOST_AT_ONCE, Form, Need, Packing, Size, Work, free_on, need, shape_of
from edge_client.watching.reading import MB
from shared.messages import WeightDtype

SLICE = 1 << 22  # weights, and as many of their gradient, at a time (edge_client.first_order_gradient)
# Of one layer, run again with a graph: numbers per token and hidden or inner channel, backward's own among them.
HIDDEN, WIDE = 26, 7
ARRAYS = 16  # of K float64: gradient, moments, the offsets' change, remainder, and those that are made of them


def gradient_need(size: Size, form: Form, dtype: WeightDtype, packing: Packing, work: Work, seeds: int) -> Need:
    """What a gradient step takes beyond the memory of a process that has not loaded the model. seeds: K."""
    item = ITEM[dtype]
    tokens = work.at_once * work.length
    given = size.layers * size.hidden
    layer = HIDDEN * size.hidden + WIDE * size.wide
    logits = work.at_once * work.labelled * size.vocabulary
    return replace(
        need(size, form, dtype, packing, work),
        in_use=2 * SLICE * item,
        activations=tokens * item * (given + layer) + work.at_once * work.length**2 * 4,
        logits=3 * logits * item + 4 * 4 * min(logits, LOGITS),  # with their gradient, in parts and put together
        numbers=ARRAYS * 8 * seeds,
    )


def most_at_once(need_of: Callable[[Work], Need], free: float, work: Work) -> tuple[int, Need]:
    """As many sequences as fit into `free` bytes, up to work.at_once, or 0; and what they take, or one of them."""
    at_once = work.at_once
    while (found := need_of(replace(work, at_once=at_once))).total > free and at_once > 1:
        at_once //= 2
    return (at_once if found.total <= free else 0), found


def gradients_beside(
    config: Mapping[str, Any], dtype: WeightDtype, device: str, *, seeds: int, max_length: int
) -> tuple[int, str]:
    """How many sequences at once fit beside a model that is loaded, 0 for none; and the arithmetic.

    config: the model's; seeds: K; max_length: tokens of a sequence.
    """
    size = shape_of(config)

    def more(work: Work) -> Need:
        return replace(gradient_need(size, "loaded", dtype, "unpacked", work, seeds), weights=0.0, rest=0.0)

    free, source = free_on(device)
    at_once, found = most_at_once(more, free, Work(MOST_AT_ONCE, max_length, max_length // 2))
    many = f"{at_once or 1} sequence{'s' if at_once > 1 else ''} of {max_length} tokens at once"
    return at_once, f"{many} take {found} beside the model; {free / MB:.0f} MB are free ({source})"
