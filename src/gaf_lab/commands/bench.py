"""`gaf bench`: what a step costs. The first word chooses what is measured."""

from rich.console import Console

from gaf_lab.commands.bench_accumulate import BenchAccumulateOptions, run_bench_accumulate
from gaf_lab.commands.bench_cpu import BenchCPUOptions, run_bench_cpu
from gaf_lab.commands.bench_ddp import BenchDDPOptions, run_bench_ddp
from gaf_lab.commands.bench_guard import BenchGuardOptions, run_bench_guard
from gaf_lab.commands.bench_hsdp import BenchHSDPOptions, run_bench_hsdp
from gaf_lab.commands.bench_samples import BenchSamplesOptions, run_bench_samples
from gaf_lab.commands.bench_train import BenchTrainOptions, run_bench_train
from gaf_lab.commands.common import Command, Words, say
from gaf_lab.settings.checks import ConfigError, nearest

BENCHMARKS: dict[str, tuple[Command, str | None]] = {
    "accumulate": (run_bench_accumulate, BenchAccumulateOptions.__doc__),
    "ddp": (run_bench_ddp, BenchDDPOptions.__doc__),
    "hsdp": (run_bench_hsdp, BenchHSDPOptions.__doc__),
    "train": (run_bench_train, BenchTrainOptions.__doc__),
    "cpu": (run_bench_cpu, BenchCPUOptions.__doc__),
    "guard": (run_bench_guard, BenchGuardOptions.__doc__),
    "samples": (run_bench_samples, BenchSamplesOptions.__doc__),
}


def run_bench(words: Words, console: Console) -> int:
    if words[:1] in (["-h"], ["--help"]):
        say(console, "usage: gaf bench WHAT [OPTIONS]; gaf bench WHAT --help\n")
        for name, (_, text) in BENCHMARKS.items():
            say(console, f"  {name:10} {text}")
        return 0
    if not words or words[0] not in BENCHMARKS:
        word = " ".join(words[:1])
        known = ", ".join(f"gaf bench {name}" for name in BENCHMARKS)
        raise ConfigError(
            f"bench needs the name of a benchmark; got {word!r}.{nearest(word, BENCHMARKS)} "
            f"There is: {known}."
        )
    return BENCHMARKS[words[0]][0](words[1:], console)
