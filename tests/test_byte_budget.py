"""The byte budget as a function: which rounds it affords, and how it spaces the pings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edge_client.byte_budget import (
    ByteLimits,
    PastRound,
    Standing,
    Wanted,
    decide,
    keepalive_s,
    round_estimate,
    snapshot_estimate,
)
from shared.errors import UserError

DAY, NEXT = "2026-11-20", "2026-11-21"
ROUND_7 = Wanted((7, b"n"), round_bytes=2000, catch_up_bytes=0)
LIMITS = ByteLimits(day_bytes=10_000)


def decided(spent: int, wanted: Wanted | None = ROUND_7, before: Standing = Standing(), **more: object) -> Standing:  # noqa: B008
    """Noon would leave pings; a second before midnight leaves none to speak of."""
    settings: dict[str, object] = {"limits": LIMITS, "day": DAY, "seconds_left": 1.0, "keepalive_s": 300, **more}
    return decide(spent_bytes=spent, wanted=wanted, standing=before, **settings)  # type: ignore[arg-type]


def test_a_round_begins_as_long_as_it_fits_into_the_day() -> None:
    last = 10_000 - 2_000 - 700 - 1  # the round, becoming quiet, the second's pings
    assert decided(last).pause is None
    assert decided(last).begun == (7, b"n")
    stopped = decided(last + 1)
    assert stopped.is_quiet
    assert stopped.pause == (
        "byte budget: 7300 of 10000 bytes of today are used, a round takes about 2000; goes on at midnight"
    )


def test_bytes_of_the_pings_until_midnight_are_kept_back() -> None:
    assert decided(4_000, seconds_left=3000.0).pause is None  # 10 pings
    assert decided(7_000, seconds_left=3000.0).is_quiet


def test_a_device_that_must_fetch_the_model_counts_that_too() -> None:
    assert snapshot_estimate(4096) == 17_384
    assert decided(0, replace(ROUND_7, catch_up_bytes=snapshot_estimate(4096))).is_quiet


def test_a_round_that_has_begun_is_finished_and_sent_but_nothing_else_is_heard_past_the_limit() -> None:
    begun = decided(7_000)
    assert (decided(9_999, before=begun).pause, decided(9_999, before=begun).is_quiet) == (None, False)
    over = decided(10_000, before=begun)
    assert (over.pause, over.is_quiet, over.begun) == (None, True, ROUND_7.key)
    sending = decided(10_000, replace(ROUND_7, stage="sending"), over)
    assert (sending.pause, sending.is_quiet) == (None, True)


def test_an_update_that_the_broker_has_is_not_sent_again_past_the_limit() -> None:
    sent = replace(ROUND_7, stage="sent")
    assert (decided(9_999, sent).pause, decided(9_999, sent).is_quiet) == (None, False)
    stopped = decided(10_600, sent, decided(10_000, before=decided(7_000)))
    assert stopped.is_quiet
    assert stopped.pause == "byte budget: 10600 of 10000 bytes of today are used; goes on at midnight"
    assert decided(10_700, None, stopped) == stopped


def test_a_model_that_must_be_fetched_over_again_in_mid_round_is_not_past_the_limit() -> None:
    begun = decided(7_000)
    lost = replace(ROUND_7, catch_up_bytes=17_384)
    assert (decided(9_999, lost, begun).pause, decided(10_000, lost, begun).is_quiet) == (None, True)
    assert decided(10_000, lost, begun).pause is not None


def test_no_other_round_begins_past_the_limit() -> None:
    over = decided(10_000, before=decided(7_000))
    assert decided(10_000, Wanted((8, b"m"), 1, 0), over).pause is not None
    assert decided(10_000, None, over).pause is not None


def test_whether_an_update_of_an_earlier_life_counts_is_found_out_past_the_limit_too() -> None:
    kept = decided(10_000, replace(ROUND_7, stage="kept"))
    assert (kept.pause, kept.is_quiet) == (None, False)
    assert decided(10_100, replace(ROUND_7, stage="sending"), kept).pause is None


def test_the_reason_stays_as_it_was_all_day_and_the_next_day_begins_anew() -> None:
    stopped = decided(9_000)
    assert decided(9_500, before=stopped) == stopped
    assert decided(9_500, None, stopped) == stopped
    again = decided(0, before=stopped, day=NEXT)
    assert (again.pause, again.is_quiet, again.begun) == (None, False, (7, b"n"))


def test_a_round_that_is_too_dear_is_left_out_and_the_device_goes_on_listening() -> None:
    limits = ByteLimits(round_bytes=1999)
    skipped = decided(0, limits=limits)
    assert skipped.pause == (
        "byte budget: a round takes about 2000 bytes, round_bytes is 1999; goes on with a plan of fewer steps"
    )
    assert not skipped.is_quiet
    assert decided(0, Wanted((8, b"m"), 1000, 0), skipped, limits=limits).pause is None


def test_without_a_round_nothing_is_decided_until_the_day_is_spent() -> None:
    assert decided(9_999, None).pause is None
    assert decided(10_000, None).pause == ("byte budget: 10000 of 10000 bytes of today are used; goes on at midnight")


def test_no_limits_forbid_nothing() -> None:
    assert decided(10**12, limits=ByteLimits()).pause is None


def test_an_estimate_is_the_dearest_of_the_last_rounds_and_grows_with_the_steps() -> None:
    assert round_estimate([], 200) == 3000
    past = [PastRound(200, 9_999)] + [PastRound(200, 1_800), PastRound(200, 1_900)] * 4
    assert round_estimate(past, 200) == 1_900
    assert round_estimate(past, 300) == 2_900
    assert round_estimate(past, 20) == 1_900


@pytest.mark.parametrize(
    ("day_bytes", "configured_s", "expected_s"),
    [(0, 300, 300), (1_000_000, 300, 300), (300_000, 300, 605), (100_000, 300, 1800), (100_000, 3600, 3600)],
)
def test_pings_are_spaced_by_the_budget(day_bytes: int, configured_s: int, expected_s: int) -> None:
    assert keepalive_s(ByteLimits(day_bytes), configured_s) == expected_s


def test_a_rich_budget_never_pings_more_than_once_a_minute() -> None:
    assert keepalive_s(ByteLimits(10**9), 1) == 60


def test_negative_limits_are_refused() -> None:
    with pytest.raises(UserError, match="round_bytes is -1; give a number of bytes, or 0 for no limit"):
        ByteLimits(round_bytes=-1)
