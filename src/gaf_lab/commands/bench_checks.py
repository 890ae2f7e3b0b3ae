"""What benchmarks refuse before they measure."""

from collections.abc import Sequence
from typing import Any

from gaf_lab.records.output import make_file
from gaf_lab.settings.checks import ConfigError, check_count

# more than these only takes time
MOST_ROUNDS, MOST_BATCH = 100_000, 100_000


def check_sizes(options: Any, least_k: int, most_k: int) -> None:
    """Refuses sizes that cannot be measured, or that take too long."""
    check_counts("k", options.k, least_k, most_k)
    check_batches_and_rounds(options)


def check_batches_and_rounds(options: Any) -> None:
    batches = options.b if isinstance(options.b, tuple) else (options.b,)
    check_counts("b", batches, 2, MOST_BATCH, "BatchNorm needs two samples.")
    check_rounds(options)


def check_counts(name: str, values: Sequence[int], least: int, most: int, reason: str = "") -> None:
    """Refuses numbers out of their range, and none at all."""
    if not values:
        raise ConfigError(f"{name} must name at least one number; got none. Give --{name} 20 40.")
    for value in values:
        check_count(name, value, least, most, reason)


def check_rounds(options: Any) -> None:
    """Refuses too few or too many rounds, and an output file that cannot be written."""
    check_count("rounds", options.rounds, 2, MOST_ROUNDS, "A spread needs two.")
    if options.out is not None:
        make_file(options.out)
