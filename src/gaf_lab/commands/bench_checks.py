"""What benchmarks refuse before they measure."""

from typing import Any

from gaf_lab.records import run as records
from gaf_lab.settings.checks import ConfigError, check_count

# more than these only takes time
MOST_ROUNDS, MOST_BATCH = 100_000, 100_000


def check_sizes(options: Any, least_k: int, most_k: int) -> None:
    """Refuses sizes that cannot be measured, or that take too long."""
    for k in options.k:
        check_count("k", k, least_k, most_k)
    if not options.k:
        raise ConfigError("k must name at least one number; got none. Give --k 2 4.")
    check_count("b", options.b, 2, MOST_BATCH, "BatchNorm needs two samples.")
    check_rounds(options)


def check_rounds(options: Any) -> None:
    """Refuses too few or too many rounds, and an output file that cannot be written."""
    check_count("rounds", options.rounds, 2, MOST_ROUNDS, "A spread needs two.")
    if options.out is not None:
        records.make_file(options.out)
