from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from tallystick.usage.buckets import HOUR, find_bucket, floor_hour

START = datetime(2026, 3, 1, tzinfo=UTC)
times = st.integers(0, 5 * 3600 * 10).map(lambda tenths: START + tenths * timedelta(milliseconds=100))
boundaries = st.lists(
    st.integers(0, 5 * 3600).map(lambda seconds: START + timedelta(seconds=seconds)), unique=True
).map(sorted)


@given(times, boundaries)
def test_a_bucket_holds_its_timestamp_and_never_spans_a_boundary_or_an_hour(
    timestamp: datetime, cuts: list[datetime]
) -> None:
    start, end = find_bucket(timestamp, cuts)
    assert start <= timestamp < end
    assert floor_hour(start) == floor_hour(timestamp)
    assert end - start <= HOUR
    assert not any(start < cut < end for cut in cuts)


@given(times, times, boundaries)
def test_two_timestamps_share_a_bucket_or_their_buckets_do_not_overlap(
    one: datetime, other: datetime, cuts: list[datetime]
) -> None:
    first, second = sorted([find_bucket(one, cuts), find_bucket(other, cuts)])
    assert first == second or first[1] <= second[0]


def test_an_event_at_the_very_end_of_a_period_belongs_to_the_next() -> None:
    end = START + timedelta(minutes=17, seconds=23)
    assert find_bucket(end, [end]) == (end, START + HOUR)
    assert find_bucket(end - timedelta(microseconds=1), [end]) == (START, end)
