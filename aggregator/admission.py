"""Whether an update counts in the open round. The first that holds, in this order:

sent again after its round closed        DUPLICATE, or DIVERGED where it was left out
a round that is over, or is to come      STALE_ROUND, FUTURE_ROUND
the plan does not select the device      NOT_SELECTED
a change where the run takes none        FIRST_ORDER
not 1..local_steps whole scalars         MALFORMED, SCALAR_COUNT (fewer than planned: an interrupted device)
a number that is NaN or infinite         NON_FINITE
a change's seeds, their number           MALFORMED, SEED_OUTSIDE_POOL, COEFFICIENT_COUNT
a change longer than scalars can make    LARGE_CHANGE
more samples than the run allows         WEIGHT_OUT_OF_RANGE
the device's update is in, same bytes    DUPLICATE
the device's update is in, other bytes   CONFLICT
a round full of such as do not count     BUSY (late, or of an excluded device: nobody waits for them)

In a run that folds late updates in, one of a round that is over but remembered is judged by that round's plan. It is
STALE_ROUND where that round had no agreed model, and DIVERGED at once where its model was another.
"""

from __future__ import annotations

import math

from aggregator.accepted import fingerprint
from aggregator.events import UpdateArrived
from aggregator.schedule import step_rule
from aggregator.spec import nonce, participation
from aggregator.state import PastRound, State, past_round
from shared.changes import read_change
from shared.errors import PeerError
from shared.messages import StepRule, Update
from shared.numbers import NUMBER_BYTES
from shared.refusals import Refusal
from shared.seeds import takes_part
from shared.steprule import check_length
from shared.wire import scalars_from_bytes

Verdict = tuple[Refusal, str]  # code and detail
FULL_ROUND = 4  # times the quorum: then updates that do not count towards it must wait for the next round


def refusal(state: State, event: UpdateArrived) -> Verdict | None:
    """Why an update to an open run is refused (see the module); None: it is accepted."""
    progress, update = state.progress, event.update
    again = sent_again(state, event)
    if again is not None:
        return again
    if update.round > progress.round:
        return Refusal.FUTURE_ROUND, _rounds(state, update)
    past = past_round(state, update.round)
    if update.round < progress.round and (past is None or state.spec.config.late == "refuse"):
        return Refusal.STALE_ROUND, _rounds(state, update)
    selected = past.plan.participation if past else participation(state.spec.config, progress.part, progress.extensions)
    if not takes_part(selected, nonce(state.spec, update.round), event.device):
        return Refusal.NOT_SELECTED, ""
    verdict = _wrong_numbers(state, event) or (_too_late(past, event) if past else None) or _conflict(state, event)
    return verdict or _crowded(state, event)


def sent_again(state: State, event: UpdateArrived) -> Verdict | None:
    """The answer to an update that was accepted in a round that is over; None for any other."""
    past, digest = past_round(state, event.update.round), event.update.model_digest
    if past is None or past.accepted.get(event.device) != fingerprint(event.payload):
        return None
    if digest != past.model_digest:
        return Refusal.DIVERGED, f"round {event.update.round}: your model was {digest.hex()}"
    return Refusal.DUPLICATE, ""


def _rounds(state: State, update: Update) -> str:
    return f"the update is of round {update.round}, the current one is {state.progress.round}"


def _too_late(past: PastRound, event: UpdateArrived) -> Verdict | None:
    """Why a late update cannot be folded in, beyond what refuses any update."""
    digest = event.update.model_digest
    if past.model_digest is None:
        return Refusal.STALE_ROUND, f"the devices of round {past.plan.round} did not agree on a model"
    if digest != past.model_digest:
        detail = f"round {past.plan.round}: your model was {digest.hex()}, the fleet's {past.model_digest.hex()}"
        return Refusal.DIVERGED, detail
    if event.device in past.accepted:
        return Refusal.CONFLICT, ""
    return None


def _wrong_numbers(state: State, event: UpdateArrived) -> Verdict | None:
    update, config, facts = event.update, state.spec.config, state.spec.facts
    if update.change is not None and not facts.first_order:
        return Refusal.FIRST_ORDER, ""
    count, rest = divmod(len(update.scalars), NUMBER_BYTES[facts.scalar_format])
    if not rest and count > config.local_steps:  # before their values: PROTOCOL.md 5.4
        return Refusal.SCALAR_COUNT, f"{count} scalars; allowed: 1 to {config.local_steps}"
    try:
        if update.change is None:
            scalars_from_bytes(update.scalars, facts.scalar_format)
        else:
            _, values = read_change(update.change, facts.scalar_format, facts.seeds)
            check_length(values, _rule(state, update.round), config.local_steps)
    except PeerError as error:
        return error.refusal, error.detail
    measured = (update.train_loss, update.held_out_loss, update.held_out_accuracy)
    if not all(math.isfinite(value) for value in measured if value is not None):
        return Refusal.NON_FINITE, "a loss or the accuracy is not finite"
    if not 1 <= update.samples <= config.max_samples:
        return Refusal.WEIGHT_OUT_OF_RANGE, f"{update.samples} samples; allowed: 1 to {config.max_samples}"
    return None


def _rule(state: State, number: int) -> StepRule:
    past = past_round(state, number)
    return past.plan.step if past else step_rule(state.spec.config, state.fleet)


def _conflict(state: State, event: UpdateArrived) -> Verdict | None:
    if event.update.round == state.progress.round:
        first = state.updates.get(event.device)
    else:
        first = state.late.get((event.device, event.update.round))
    if first is None:
        return None
    return (Refusal.DUPLICATE if first.payload == event.payload else Refusal.CONFLICT), ""


def _crowded(state: State, event: UpdateArrived) -> Verdict | None:
    """Updates that count towards the quorum close the round; these do not, and could fill the memory."""
    is_waited_for = event.update.round == state.progress.round and event.device not in state.progress.excluded_devices
    held, most = len(state.updates) + len(state.late), FULL_ROUND * state.spec.config.quorum
    return None if is_waited_for or held < most else (Refusal.BUSY, f"the round holds {held} updates already")
