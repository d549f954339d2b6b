"""What a pass did: counts and sentences, printed by `lmoe.explain`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """`counts`: how many of each thing were changed. `notes`: a line each."""

    name: str
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, what: str, note: str = "") -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        if note:
            self.notes.append(note)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {what}" for what, count in self.counts.items())
        return "\n".join(
            [f"{self.name}: {counts or 'nothing to do'}", *map("  {}".format, self.notes)]
        )
