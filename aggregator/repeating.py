"""What is said again when the message network is back: brokers forget, and receipts may be lost. Pure."""

from __future__ import annotations

from aggregator.events import Publish, SendReceipt
from aggregator.state import State, plan_of, snapshot_of
from shared.messages import Receipt
from shared.refusals import Refusal


def left_out_again(state: State) -> tuple[SendReceipt, ...]:
    """DIVERGED to those whom the last closing left out: they have no reason to ask, and the receipt may be lost.

    A device that has heard it takes it for an echo: it is of a round before its fresh snapshot.
    """
    if not state.past:
        return ()
    last = state.past[-1]
    told = {one.device: f"your model was {one.digest}" for one in state.progress.excluded}
    if last.model_digest is None:
        told = dict.fromkeys(last.accepted, "no model had a majority; nothing was combined")
    number, code = last.plan.round, int(Refusal.DIVERGED)
    left_out = [device for device in sorted(told) if device in last.accepted]
    return tuple(SendReceipt(device, Receipt(number, code, told[device])) for device in left_out)


def everything(state: State) -> tuple[Publish, ...]:
    """All that is retained, for devices that have never heard of the run, and brokers that have forgotten it."""
    return Publish(state.spec.facts), Publish(snapshot_of(state)), Publish(plan_of(state))
