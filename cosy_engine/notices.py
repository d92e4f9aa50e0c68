"""What a caller should know about a request that is served all the same."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Notice:
    """One plain sentence.

    Attributes:
        param: name of the parameter that it is about.
        code: short name of what it says, for callers that say it in words of their own; and
        values: what those words need to know.
    """

    message: str
    param: str
    code: str
    values: dict[str, object] = field(default_factory=dict)
