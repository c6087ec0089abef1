"""What a plan is to the one that is followed, whether it fits the run, and its deadlines. Part of `session`; no I/O."""

from __future__ import annotations

from typing import Literal

from edge_client.state import Patience, State
from shared.errors import PeerError
from shared.messages import Plan, Run
from shared.refusals import Refusal

Relation = Literal["stale", "same", "amended", "newer"]


def relation(current: Plan | None, plan: Plan) -> Relation:
    """How a plan that came in relates to the one that is followed."""
    if current is None or plan.round > current.round:
        return "newer"
    if plan == current:
        return "same"
    if plan.round < current.round or plan.published_at_ms < current.published_at_ms:
        return "stale"
    return "amended" if plan.nonce == current.nonce else "newer"


def check_plan(run: Run, plan: Plan) -> None:
    """Raise PeerError where `plan` does not fit the run."""
    if plan.levels is not None and len(plan.levels) != run.seeds:
        raise PeerError(Refusal.MALFORMED, f"{len(plan.levels)} significance levels; allowed: {run.seeds}")


def patience_for(state: State, plan: Plan) -> Patience:
    """When to ask for the plan again: well past its deadline."""
    overdue_s = state.identity.limits.overdue_s
    wait_s = plan.deadline_s if plan.phase == "open" else state.identity.limits.overdue_max_s
    return Patience(state.now_s + wait_s + overdue_s, 2 * overdue_s)


def conclude_s(state: State, plan: Plan, is_retained: bool) -> float | None:
    """When a slow device sends what it has. A live plan counts from now; a retained one from its date, if plausible."""
    age_s = (state.unix_ms - plan.published_at_ms) / 1000 if is_retained else 0.0
    if not 0.0 <= age_s < plan.deadline_s:
        return None  # past, or the clocks disagree: the deadline cannot be known, so train to the end
    return state.now_s + (plan.deadline_s - age_s) * state.identity.limits.conclude_share
