"""How do people write a time? "90s", "30m", "2h30m": hours, minutes and seconds, each at most once, in this order."""

import re

_WRITTEN = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", re.ASCII)


def seconds(text: str) -> float | None:
    """How many seconds a text such as "2h30m" means; None where it means no time above 0."""
    found = _WRITTEN.fullmatch(text)
    parts = zip((3600.0, 60.0, 1.0), found.groups(), strict=True) if found else ()
    return sum(unit * float(part) for unit, part in parts if part) or None


def written(duration_s: float) -> str:
    """Seconds as people write them, to three digits below a minute and to the second above."""
    if duration_s < 59.5:
        return f"{duration_s:.3g}s"
    hours, rest = divmod(round(duration_s), 3600)
    minutes, left = divmod(rest, 60)
    return "".join(f"{number}{unit}" for number, unit in ((hours, "h"), (minutes, "m"), (left, "s")) if number)
