"""Counts of the records of a run, and when there are too many invalid ones."""

from collections import Counter
from dataclasses import dataclass, field

MIN_RECORDS = 10_000  # before the ratio of invalid records is checked; it is always checked at the end


@dataclass
class RecordCounts:
    """Records consumed by source, those filtered or invalid by reason, and those with fields that are left out."""

    consumed: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    invalid: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)

    def add(self, source: str, consumed: int, filtered: Counter, invalid: Counter, unread: Counter) -> None:
        self.consumed[source] = self.consumed.get(source, 0) + consumed
        self.filtered = dict(Counter(self.filtered) + filtered)
        self.invalid = dict(Counter(self.invalid) + invalid)
        self.unread = dict(Counter(self.unread) + unread)

    def total(self) -> int:
        return sum(self.consumed.values())

    def too_many_invalid(self, max_ratio: float, at_end: bool) -> bool:
        """Whether more than `max_ratio` of the records are invalid."""
        total = self.total()
        return (at_end or total >= MIN_RECORDS) and sum(self.invalid.values()) > max_ratio * total

    def describe_invalid(self, max_ratio: float) -> str:
        """`3 of 200 records are invalid, more than --max_bad_ratio=0.001 (3 broken JSON)`."""
        return (
            f"{sum(self.invalid.values())} of {self.total()} records are invalid, more than "
            f"--max_bad_ratio={max_ratio:g} ({format_reasons(self.invalid)})"
        )


def format_reasons(counts: dict[str, int]) -> str:
    """`3 empty, 1 too long`, the most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(counts).most_common()) or "nothing"
