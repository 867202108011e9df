"""What an audit finds, and how grave it is."""

from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["failed", "unknown", "note"]
EXIT_CODES: dict[Severity, int] = {"failed": 1, "unknown": 2, "note": 0}
SHORT = 12  # characters of a digest that a person reads


@dataclass(frozen=True)
class Finding:
    """Something that does not hold, or that cannot be told."""

    severity: Severity
    check: str
    artefact: str
    expected: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return (
            f"{self.severity}: {self.artefact}: {self.check}: expected {self.expected}, "
            f"got {self.found}; {self.remedy}"
        )


@dataclass
class Checks:
    """Counts what was held against what, and keeps what did not hold."""

    findings: list[Finding] = field(default_factory=list)
    count: int = 0

    def expect(self, holds: bool, otherwise: Finding) -> bool:
        self.count += 1
        if not holds:
            self.findings.append(otherwise)
        return holds
