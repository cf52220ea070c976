"""What is left out of the sources: how much, for which reason, and the names of the first."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from ds_local.errors import DataError

NAMED = 5  # of what is left out for one reason
MALFORMED = "malformed"


class Skipped:
    """What was left out: how much by reason, and the first few names.

    Args:
        max_malformed: rows that may be malformed; a number below 1 is a share of all rows.
    """

    def __init__(
        self,
        counts: Mapping[str, int] | None = None,
        names: Mapping[str, list[str]] | None = None,
        max_malformed: float = 0,
    ) -> None:
        self.counts: Counter[str] = Counter(counts)
        self.names: dict[str, list[str]] = defaultdict(list, names or {})
        self.max_malformed = max_malformed
        self.rows = 0

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        if len(self.names[reason]) < NAMED:
            self.names[reason].append(name)

    def malformed(self, where: str, why: str) -> None:
        """A row that cannot be read. Raises DataError when there are more than are allowed."""
        self.add(MALFORMED, f"{where} {why}")
        if not self.max_malformed:
            raise DataError(f"{where} {why}; --max-malformed N leaves such rows out")
        if self.max_malformed >= 1 and self.counts[MALFORMED] > self.max_malformed:
            raise self._too_many(f"more than --max-malformed {self.max_malformed:g}")

    def check_share(self) -> None:
        """At the end. Raises DataError when too large a share of the rows was malformed."""
        found = self.counts[MALFORMED]
        if self.max_malformed < 1 and found > self.max_malformed * self.rows:
            raise self._too_many(
                f"{found / self.rows:.2%} of {self.rows}, more than --max-malformed "
                f"{self.max_malformed:g}"
            )

    def _too_many(self, what: str) -> DataError:
        first = "; ".join(name[:200] for name in self.names[MALFORMED][:2])
        return DataError(f"{self.counts[MALFORMED]} rows are malformed, {what}: {first}")

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """For example: 7 empty (a.txt, b.txt, ...), 1 NUL bytes (c.png)."""
        return ", ".join(
            f"{count} {reason} ({', '.join(self.names[reason])}"
            f"{', ...' * (count > len(self.names[reason]))})"
            for reason, count in self.counts.items()
        )
