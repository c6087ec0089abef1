"""Receipt codes, each with its sentence (PROTOCOL.md, section "Receipt codes")."""

from __future__ import annotations

from enum import IntEnum


class Refusal(IntEnum):
    """A receipt's code. 0 and 1 say the update counts; every other code is a refusal."""

    ACCEPTED = 0
    DUPLICATE = 1
    MALFORMED = 10
    UNSUPPORTED_VERSION = 11
    OVERSIZED = 12
    WRONG_KIND = 13
    RETAINED = 14
    UNKNOWN_RUN = 20
    STALE_ROUND = 21
    FUTURE_ROUND = 22
    NOT_SELECTED = 23
    CONFLICT = 24
    RUN_CLOSED = 25
    NON_FINITE = 30
    SCALAR_COUNT = 31
    SEED_OUTSIDE_POOL = 32
    WEIGHT_OUT_OF_RANGE = 33
    DIVERGED = 34
    COEFFICIENT_COUNT = 35
    FIRST_ORDER = 36
    LARGE_CHANGE = 37
    BUSY = 40
    STORAGE = 41

    @property
    def sentence(self) -> str:
        """What the code means, as one sentence for people."""
        return _SENTENCES[self]

    @property
    def is_success(self) -> bool:
        """True when the update counts in its round."""
        return self in (Refusal.ACCEPTED, Refusal.DUPLICATE)

    @property
    def may_retry(self) -> bool:
        """True when the same update may be sent again later."""
        return self in (Refusal.BUSY, Refusal.STORAGE)


_SENTENCES = {
    Refusal.ACCEPTED: "The update is stored and counts in its round.",
    Refusal.DUPLICATE: "This very update was accepted before; it counts once and nothing needs to be sent.",
    Refusal.MALFORMED: "The payload is not a message of this kind; check the client against PROTOCOL.md.",
    Refusal.UNSUPPORTED_VERSION: "The payload speaks a protocol version this side does not; upgrade the older side.",
    Refusal.OVERSIZED: "The payload is longer than its kind allows and was not decoded.",
    Refusal.WRONG_KIND: "The payload's kind does not belong on this topic.",
    Refusal.RETAINED: "Uplinks must not be retained; send the update again without the retain flag.",
    Refusal.UNKNOWN_RUN: "This aggregator does not serve a run of that name.",
    Refusal.STALE_ROUND: "The round of this update is over; drop the update and follow the current plan.",
    Refusal.FUTURE_ROUND: "The round of this update has not been planned yet; wait for its plan.",
    Refusal.NOT_SELECTED: "The plan of this round does not select this device.",
    Refusal.CONFLICT: "A different update of this device was accepted for this round; the first one counts.",
    Refusal.RUN_CLOSED: "The run is paused or finished and takes no updates.",
    Refusal.NON_FINITE: "A number is NaN or infinite; check the model and lower the step.",
    Refusal.SCALAR_COUNT: "The number of scalars is not between one and the plan's local steps.",
    Refusal.SEED_OUTSIDE_POOL: "A seed is not in [0, K).",
    Refusal.WEIGHT_OUT_OF_RANGE: "The sample count is outside what the run allows.",
    Refusal.DIVERGED: "The model this device rebuilt differs from the fleet's; its update was left out.",
    Refusal.COEFFICIENT_COUNT: "The number of coefficients is not the run's K.",
    Refusal.FIRST_ORDER: "This run takes no changes of coefficients; send scalars.",
    Refusal.LARGE_CHANGE: "The change of the coefficients is larger than the plan's step rule allows.",
    Refusal.BUSY: "The aggregator's queue is full; send the same update again after a pause.",
    Refusal.STORAGE: "The aggregator cannot store updates right now; send the same update again after a pause.",
}
