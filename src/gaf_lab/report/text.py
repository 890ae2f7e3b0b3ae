"""Numbers and lists as text, as tables and sentences of a report show them."""

from gaf_lab.report.arms import Arm
from gaf_lab.report.measures import Measure
from gaf_lab.report.statistics import Spread

NONE, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"  # NONE: no value


def percentage(value: float, digits: int = 1) -> str:
    """A share as a percentage, without its sign %, and without a negative zero."""
    return signed(value * 100, digits).lstrip("+")


def signed(value: float, digits: int = 1) -> str:
    """A number with its sign; zero has none."""
    text = f"{value:+.{digits}f}".replace("-", MINUS)
    return text if float(f"{value:.{digits}f}") else text[1:]


def spread_as_text(spread: Spread | None, measure: Measure, second: float = 1.0) -> tuple[str, str]:
    """Mean and deviation, which is empty for one seed.

    Shares are in %, times in units of `second` seconds.
    """
    if spread is None:
        return NONE, ""
    units = {
        "share": (100.0, ".1f"),
        "distance": (1.0, ".3f"),
        "seconds": (1 / second, ".1f"),
        "number": (1.0, ".4g"),
    }
    scale, digits = units[measure.unit]
    mean = f"{spread.mean * scale:{digits}}"
    if spread.deviation is None:
        return mean, ""
    return mean, f"± {spread.deviation * scale:{digits.replace('4g', '2g')}}"


def difference_as_text(value: float, measure: Measure) -> str:
    """A difference with its sign: of a share in percentage points, of a number to three digits."""
    if measure.unit != "number":
        return signed(value * 100)
    return f"{value:+.3g}".replace("-", MINUS) if value else "0"


def with_star(name: str, arm: Arm) -> str:
    """A name of the arm, with a star if its numbers are those of unfinished runs."""
    return name if arm.finished_runs else f"{name} *"


def listing(parts: list[str]) -> str:
    """ "a, b and c"."""
    if len(parts) == 1:
        return parts[0]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def count_of(n: int, noun: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def unbreakable(text: str) -> str:
    """The text without line breaks around "=" and within "95% CI"."""
    space = "\N{NO-BREAK SPACE}"
    return text.replace(" = ", f"{space}={space}").replace("95% CI ", f"95%{space}CI ")
