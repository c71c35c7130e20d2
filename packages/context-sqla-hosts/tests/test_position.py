"""Positions in the log."""

import pytest
from context_sqla_hosts import Position, format_lsn, parse_lsn
from context_sqla_hosts._position import end_of_record
from hypothesis import given
from hypothesis import strategies as st

SEGMENT = 16 * 1024 * 1024


@given(st.integers(0, 2**64 - 1))
def test_an_lsn_is_read_as_it_is_written(lsn):
    """What we write, we read; PostgreSQL's own form is the same."""
    assert parse_lsn(format_lsn(lsn)) == lsn


@pytest.mark.parametrize("text", ["", "16", "/", "16/", "/1", "1/123456789", "x/1", "1/2/3"])
def test_what_is_no_lsn_is_refused(text):
    """A wrong LSN is an error, not a small number."""
    with pytest.raises(ValueError):
        parse_lsn(text)


def test_a_later_timeline_is_later_whatever_the_lsn():
    """A promotion may go back in the log."""
    assert Position(2, 5) > Position(1, 900)
    assert str(Position(2, 0x16_B374_D848)) == "2:16/B374D848"


@pytest.mark.parametrize(
    ("insert", "end"),
    [
        (SEGMENT + 40, SEGMENT),  # after the long header of a segment's first page
        (SEGMENT + 8192 + 24, SEGMENT + 8192),  # after that of another page
        (SEGMENT + 24, SEGMENT + 24),  # no page header ends here
        (SEGMENT + 8192 + 40, SEGMENT + 8192 + 40),
        (SEGMENT + 500, SEGMENT + 500),
    ],
)
def test_the_end_of_the_log_does_not_count_a_page_header(insert, end):
    """A replica that has everything cannot be behind the header of an empty page."""
    assert end_of_record(insert, SEGMENT) == end


@given(st.integers(0, 2**40))
def test_the_end_is_never_more_than_a_header_before_the_insert_position(insert):
    """Nothing but a header is left out."""
    assert insert - end_of_record(insert, SEGMENT) in (0, 24, 40)
