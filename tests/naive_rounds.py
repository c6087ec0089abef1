"""The round logic once more, naively: a fold over the accepted updates in dicts and Python floats, no import of kseed.

Written from PROTOCOL.md (sections 7.5, 9.4 to 9.9) and the settings' meaning, for runs of K = 256 without
over-selection. `second_maths` draws the seeds and applies the step rule.
"""

from __future__ import annotations

import hashlib
import math
import struct
from fractions import Fraction

from second_changes import WIDTHS, finite, publish
from second_changes import read as read_change
from second_maths import deltas, draw, significance_levels, takes_part
from second_msgpack import Refused
from second_worth import combination

POOL = 256
CODES = {"ACCEPTED": 0, "DUPLICATE": 1, "MALFORMED": 10, "STALE_ROUND": 21, "FUTURE_ROUND": 22, "NOT_SELECTED": 23}
CODES |= {"CONFLICT": 24, "RUN_CLOSED": 25, "NON_FINITE": 30, "SCALAR_COUNT": 31, "WEIGHT_OUT_OF_RANGE": 33}
CODES |= {"SEED_OUTSIDE_POOL": 32, "DIVERGED": 34, "COEFFICIENT_COUNT": 35, "FIRST_ORDER": 36, "LARGE_CHANGE": 37}


class NaiveRun:
    """One run. `settings` is the run's configuration as a dict; an update is a dict with its device and payload."""

    def __init__(self, settings, key):
        self.settings, self.key, self.form = settings, key, settings["scalar_format"]
        self.phase, self.reason, self.round = "created", "", 0
        self.coefficients, self.carried, self.change = [0.0] * POOL, [0.0] * POOL, None
        self.accepted, self.late = {}, {}  # device -> update of this round; (device, round) -> update of an earlier one
        self.past = []  # closed rounds that are remembered: what an update of theirs is judged by
        self.excluded = {}  # device -> round in which its model differed last
        self.journal = []  # (round, device, payload, round that counts it) of everything that was ever accepted
        self.extensions = self.opened_at = self.published_at = self.deadline_at = 0
        self.part = 1.0  # of the fleet, selected when a round opens; a run that never opens it or is over asks nobody
        self.step_rms, self.mean_square, self.count, self.reference = settings["step_rms"], 0.0, 0, None
        self.promised = 0.0
        self.sums, self.counts = [0.0] * POOL, [1] * POOL
        self.known = {"noise": 0.5, "noise_rounds": 0, "agreement": 0.0, "agreement_rounds": 0}

    # What happens. Each returns the receipts to send, as (device, round, code).

    def begin(self, now):
        """The network is there, for the first time or again: whoever was left out is told again."""
        if self.phase == "created":
            self._open(now)
        elif self.phase == "open" and not self.published_at <= now < self.deadline_at:
            self._renew(now)
        last = self.past[-1] if self.past else {"left_out": []}
        return [(name, last["round"], CODES["DIVERGED"]) for name in last["left_out"]]

    def arrive(self, update, now):
        """A device's update."""
        code = self._code(update)
        receipts = [(update["device"], update["round"], CODES[code])]
        if code != "ACCEPTED":
            return receipts
        self.journal.append((update["round"], update["device"], update["payload"], self.round))
        if update["round"] < self.round:
            self.late[update["device"], update["round"]] = update
            return receipts
        self.accepted[update["device"]] = update
        if len(self.accepted) >= self.settings["quorum"] and self._votes() >= self.settings["min_updates"]:
            receipts += self.close(now)
        return receipts

    def tick(self, now):
        """Time has passed."""
        if self.phase != "open" or now < self.deadline_at:
            return []
        if self._votes() >= self.settings["min_updates"]:
            return self.close(now)
        self.extensions += 1
        self._renew(now)
        return []

    def pause(self, now, reason):
        """The operator's wish."""
        if self.phase in ("created", "open"):
            self._end("paused", reason or "paused by the operator", now)
        return []

    def resume(self, now):
        """The operator's wish."""
        if self.phase == "paused":
            self.phase, self.reason = "open", ""
            self._renew(now)
        return []

    def stop(self, now, reason):
        """The operator's wish."""
        reason = reason or "stopped by the operator"
        if self.phase == "finished":
            return []
        if self._votes() >= self.settings["min_updates"]:
            return self.close(now, reason)
        self._end("finished", reason, now)
        return []

    # What is said.

    def plan(self):
        """The plan as plain JSON."""
        s, every = self.settings, self.settings["evaluate_every"]
        return {
            "round": self.round,
            "phase": self.phase,
            "nonce": self._nonce(self.round).hex(),
            "local_steps": s["local_steps"],
            "one_sided": s["one_sided"],
            "batch_size": s["batch_size"],
            "eps": s["eps"],
            "step": self._rule(),
            "participation": self._selection(),
            "common_seeds": s["common_seeds"],
            "levels": None if self._levels() is None else self._levels().hex(),
            "evaluate": every > 0 and (self.phase == "finished" or self.round % every == 0),
            "published_at_ms": self.published_at,
            "deadline_s": s["deadline_s"],
            "reason": self.reason,
            "change": self.change and {name: getattr(x, "hex", lambda x=x: x)() for name, x in self.change.items()},
        }

    def coefficient_bytes(self):
        """Of the current version, K float32."""
        return struct.pack(f"<{POOL}f", *self.coefficients)

    # An update that arrives (section 7.5).

    def _code(self, update):
        device, number, s = update["device"], update["round"], self.settings
        past = next((one for one in self.past if one["round"] == number), None)
        if past and past["accepted"].get(device) == update["payload"]:
            return "DUPLICATE" if update["digest"] == past["digest"] else "DIVERGED"
        if self.phase != "open":
            return "RUN_CLOSED"
        if number > self.round:
            return "FUTURE_ROUND"
        if number < self.round and (past is None or s["late"] == "refuse"):
            return "STALE_ROUND"
        if not takes_part((past or self._work())["selection"], self._nonce(number), device):
            return "NOT_SELECTED"
        wrong = self._wrong_numbers(update)
        if wrong is None and past:
            wrong = self._too_late(update, past)
        if wrong is not None:
            return wrong
        first = self.late.get((device, number)) if past else self.accepted.get(device)
        if first is None:
            return "ACCEPTED"
        return "DUPLICATE" if first["payload"] == update["payload"] else "CONFLICT"

    def _wrong_numbers(self, update):
        size = WIDTHS[self.form]
        if update["change"] is not None:
            if self.settings["first_order"] == "refuse":
                return "FIRST_ORDER"
            try:
                _, values = read_change(update["change"], self.form, POOL, None)
            except Refused as refused:
                return refused.args[0]
            rule = next((one["rule"] for one in self.past if one["round"] == update["round"]), self._rule())
            if math.sqrt(sum(Fraction(x) ** 2 for x in values)) > (
                self.settings["local_steps"] * rule["clip"] * rule["step_rms"]
            ):
                return "LARGE_CHANGE"
        elif len(update["scalars"]) % size:
            return "MALFORMED"
        elif not 1 <= len(update["scalars"]) // size <= self.settings["local_steps"]:
            return "SCALAR_COUNT"
        losses = (update["train_loss"], update["held_out_loss"], update["held_out_accuracy"])
        try:
            self._scalars(update)
        except Refused as refused:
            return refused.args[0]
        if not all(math.isfinite(loss) for loss in losses if loss is not None):
            return "NON_FINITE"
        return None if 1 <= update["samples"] <= self.settings["max_samples"] else "WEIGHT_OUT_OF_RANGE"

    def _too_late(self, update, past):
        if past["digest"] is None:
            return "STALE_ROUND"
        if update["digest"] != past["digest"]:
            return "DIVERGED"
        return "CONFLICT" if update["device"] in past["accepted"] else None

    def _scalars(self, update):
        return finite(update["scalars"], self.form)

    def _votes(self):
        return sum(device not in self.excluded for device in self.accepted)

    # The end of a round.

    def close(self, now, stopped=None):
        """Combine what is there and go on to the next round; the receipts of those left out."""
        work = self._work()
        votes = [update["digest"] for device, update in self.accepted.items() if device not in self.excluded]
        right = [digest for digest in set(votes) if 2 * votes.count(digest) > len(votes)]
        counted = [name for name in sorted(self.accepted) if right and self.accepted[name]["digest"] == right[0]]
        left_out = [name for name in sorted(self.accepted) if name not in counted]
        self.change = {"seeds": b"", "exponent": 0, "values": b""}
        if right:
            self._combine(counted)
            for name in counted:
                self.excluded.pop(name, None)
            self.excluded |= dict.fromkeys(left_out, self.round)
        receipts = [(name, self.round, CODES["DIVERGED"]) for name in left_out]
        self._remember({**work, "digest": right[0] if right else None, "left_out": left_out})
        self.round += 1
        self.extensions = self.opened_at = self.published_at = self.deadline_at = 0
        self.part = 1.0
        if stopped is not None or self.round >= self.settings["rounds"]:
            self._end("finished", stopped or f"all {self.settings['rounds']} rounds are done", now)
        else:
            self._open(now)
        return receipts

    def _remember(self, closed):
        for one in self.past:
            one["accepted"] |= {
                name: late["payload"] for (name, made), late in self.late.items() if made == one["round"]
            }
        accepted = {name: update["payload"] for name, update in self.accepted.items()}
        kept = self.settings["max_staleness"] if self.settings["late"] == "fold" else 1
        self.past = [*self.past, {**closed, "accepted": accepted}][-kept:]
        self.accepted, self.late = {}, {}

    def _combine(self, counted):
        """Section 9.9; nothing where a coefficient would leave float32."""
        plans = {one["round"]: one for one in [*self.past, self._work()]}
        updates = {(name, self.round): self.accepted[name] for name in counted} | self.late
        is_by_samples = self.settings["weighting"] == "samples"
        samples = {kind: [u["samples"] for u in updates.values() if (u["change"] is None) == kind] for kind in (1, 0)}
        kinds, drawn = ([], []), []  # first-order, forward-only: (weight, change)
        for name, made in sorted(updates):
            plan, update = plans[made], updates[name, made]
            own, scalars = [0.0] * POOL, self._scalars(update)
            if update["change"] is not None:
                for seed, value in zip(*read_change(update["change"], self.form, POOL, None), strict=True):
                    own[seed] = value
            owner = None if self.settings["common_seeds"] else name
            _, seeds = draw(self._nonce(made), owner, len(scalars), POOL, plan["levels"])
            for seed, delta in zip(seeds, deltas(plan["rule"], scalars), strict=True):
                own[seed] += delta
            own_kind = samples[update["change"] is None]
            weight = update["samples"] / sum(own_kind) if is_by_samples else 1 / len(own_kind)
            kinds[update["change"] is None].append((weight / math.sqrt(1 + self.round - made), own))
            drawn += zip(seeds, scalars, strict=True)
        known = dict(self.known)
        total = combination(POOL, known, kinds[1], kinds[0], self.settings["server_scale"])
        length = 1.0 if kinds[0] else self._length([self.accepted[name] for name in counted])
        total = [length * value for value in total]
        common = None
        if self.settings["common_seeds"]:
            _, common = draw(self._nonce(self.round), None, self.settings["local_steps"], POOL, self._levels())
        following = publish(
            self.coefficients, self.carried, total, self.settings["change_format"], common and sorted(set(common))
        )
        if following is None:
            return
        self.coefficients, self.carried, self.change = following
        self.known = known
        for seed, scalar in drawn:
            self.sums[seed] += min(abs(scalar), 1000.0)
            self.counts[seed] += 1
        self._learn([self.accepted[name] for name in counted], bool(kinds[0]))

    def _learn(self, updates, has_first_order):
        """The normalised rule's next step: the fleet's mean square, and a step that keeps its promises."""
        if self.settings["step"] == "plain":
            return
        scalars = [self._scalars(update) for update in updates if update["change"] is None]
        length = self._length(updates)
        if scalars:
            self.mean_square, self.count = self._squares(scalars)
        promise = self._promise(scalars, self.mean_square) * length
        known = [update for update in updates if update["held_out_loss"] is not None]
        if has_first_order:
            promise = 0.0
        if not known:
            self.promised += promise
            if has_first_order:
                self.promised, self.reference = 0.0, None
            return
        loss = self._loss(known)
        if self.reference is not None and self.promised > 0 and self.settings["kept_promise"]:
            kept = max(0.0, self.reference - loss) / self.promised
            least = 0.5 if loss > self.reference else 1 / 1.2
            factor = min(1.2, max(least, math.sqrt(kept / self.settings["kept_promise"])))
            first = self.settings["step_rms"]
            self.step_rms = min(2 * first, max(first / 64, self.step_rms * factor))
        self.reference, self.promised = loss, promise

    def _loss(self, known):
        weighed = sum(update["samples"] * Fraction(update["held_out_loss"]) for update in known)
        return float(weighed / sum(update["samples"] for update in known))

    def _length(self, updates):
        """No round promises more than the whole loss, times the limit."""
        known = [update for update in updates if update["held_out_loss"] is not None]
        loss = self._loss(known) if known else self.reference
        scalars = [self._scalars(update) for update in updates if update["change"] is None]
        if self.settings["step"] == "plain" or not scalars or loss is None or loss <= 0:
            return 1.0
        promise = self._promise(scalars, self._squares(scalars)[0])
        limit = self.settings["promise_limit"]
        return min(1.0, limit * loss / promise) if limit and promise > 0 else 1.0

    def _squares(self, scalars):
        """The mean square, and for how many steps it stands."""
        squares = sorted(float(sum(Fraction(g) ** 2 for g in one)) / len(one) for one in scalars)
        median = (squares[(len(squares) - 1) // 2] + squares[len(squares) // 2]) / 2
        steps = sum(map(len, scalars))
        total = self.count + steps
        mean_square = self.mean_square * (self.count / total) + median * (steps / total)
        return mean_square, min(total, max(1, round(1 / (1 - self.settings["decay"]))))

    def _promise(self, scalars, mean_square):
        """The fall of the loss that a round promises."""
        if not scalars:
            return 0.0
        n, steps = len(scalars), sum(map(len, scalars))
        factor = {"mean": 1.0, "sqrt": math.sqrt(n), "sum": n}[self.settings["server_scale"]]
        return factor * self.step_rms * (steps / n) * math.sqrt(mean_square)

    # What follows from the settings.

    def _work(self):
        """What an update of this round is judged and replayed by."""
        made = {"selection": self._selection(), "rule": self._rule(), "levels": self._levels()}
        return {"round": self.round, **made}

    def _nonce(self, number):
        return hashlib.sha256(self.key + struct.pack("<Q", number)).digest()[:16]

    def _rule(self):
        s = self.settings
        if s["step"] == "plain":
            return {"tag": "plain", "lr": s["lr"]}
        prior = {"prior_mean_square": self.mean_square, "prior_count": self.count}
        return {"tag": "normalised", "step_rms": self.step_rms, "clip": s["clip"], "decay": s["decay"], **prior}

    def _selection(self):
        if self.settings["devices"]:
            return {"tag": "listed", "devices": list(self.settings["devices"])}
        part = self.part * 2.0 ** min(self.extensions, 64)
        return {"tag": "everyone"} if part >= 1 else {"tag": "threshold", "below": int(part * 2**32)}

    def _levels(self):
        if self.settings["algorithm"] == "fedkseed" or self.counts == [1] * POOL:
            return None
        return significance_levels([total / count for total, count in zip(self.sums, self.counts, strict=True)])

    def _open(self, now):
        self.phase, self.opened_at, self.part = "open", now, self.settings["participation"]
        self._renew(now)

    def _renew(self, now):
        self.published_at = max(now, self.published_at)
        self.deadline_at = now + math.ceil(self.settings["deadline_s"] * 1000)

    def _end(self, phase, reason, now):
        self.phase, self.reason = phase, reason
        self.published_at = max(now, self.published_at)
