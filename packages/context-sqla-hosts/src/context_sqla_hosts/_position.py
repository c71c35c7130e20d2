"""Positions in the write-ahead log: what PostgreSQL calls LSN, with the timeline on which it means something."""

from typing import NamedTuple

_PAGE = 8192  # XLOG_BLCKSZ; other sizes need a PostgreSQL that was built for them
_HEADER = 24  # of a page
_LONG_HEADER = 40  # of the first page of a segment


class Position(NamedTuple):
    """A place in the history of a cluster; a later timeline is later, whatever the LSN (a promotion may go back).

    Args:
        timeline: grows with every promotion.
        lsn: the byte position in the write-ahead log.
    """

    timeline: int
    lsn: int

    def __str__(self) -> str:
        return f"{self.timeline}:{format_lsn(self.lsn)}"


def parse_lsn(text: str) -> int:
    """Read "16/B374D848" as a number.

    Raises:
        ValueError: it is no LSN.
    """
    high, separator, low = text.partition("/")
    if not separator or not (0 < len(high) <= 8 and 0 < len(low) <= 8):
        raise ValueError("an LSN looks like '16/B374D848'")
    return (int(high, 16) << 32) + int(low, 16)


def format_lsn(lsn: int) -> str:
    """Write a number as PostgreSQL writes an LSN."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def end_of_record(insert: int, segment: int) -> int:
    """Return the end of the last record before an insert position.

    At the beginning of a page the insert position lies behind the page's header, where no replica can be before the next record
    is written. What has been replayed ends at the page's beginning.

    Args:
        insert: from `pg_current_wal_insert_lsn()`.
        segment: the size of a segment in bytes.
    """
    if segment and insert % segment == _LONG_HEADER:
        return insert - _LONG_HEADER
    if insert % _PAGE == _HEADER and (not segment or insert % segment >= _PAGE):
        return insert - _HEADER
    return insert
