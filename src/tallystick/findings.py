"""What the doctor finds."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class Finding:
    """What was found about one part. `text` says what it is when it is good, and how to mend it when it is not.

    `notable`: good, and yet worth a look.
    """

    part: str
    good: bool
    text: str
    notable: bool = False

    def as_json(self) -> dict[str, object]:
        return {"part": self.part, "ok": self.good, "notable": self.notable, "text": self.text}


def good(part: str, text: str) -> Finding:
    """A part that is as it should be."""
    return Finding(part, good=True, text=text)


def notable(part: str, text: str) -> Finding:
    """A part that may be as it should be: somebody has to look."""
    return Finding(part, good=True, text=text, notable=True)


def bad(part: str, text: str) -> Finding:
    """A part to be mended."""
    return Finding(part, good=False, text=text)


def brief(error: Exception) -> str:
    """The first line of what an error says."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def minute(at: datetime) -> str:
    """A time as it is shown, in UTC."""
    return f"{at:%Y-%m-%d %H:%M} UTC"
