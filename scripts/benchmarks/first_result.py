"""This benchmark tells how long a newcomer waits for the first result.

It runs what ``./scripts/demo`` runs after the installation, and the program of README.md, each in a new process with
one thread. It takes the time by the clock, and the processor time, in which the process computes: other programs on the
machine lengthen the first much, and the second a little. The benchmark takes a minute on one core. Usage:

    .venv/bin/python scripts/benchmarks/first_result.py --folder docs/results
"""

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from machine import conditions, write_measured

from aimc_pl.studies.arguments import study_parser
from aimc_pl.studies.rows import Row

README = Path(__file__).parents[2] / "README.md"


def cases(quick: bool) -> dict[str, str]:
    """Return Python programs by what they stand for. A quick one trains for an epoch."""
    arguments = ["fit", "--config", "digits_async.yaml", *(["--trainer.max_epochs=1"] if quick else [])]
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    return {
        "demo": f"from aimc_pl.cli import main\nmain({arguments})",
        "README": re.sub(r"max_epochs=\d+", "max_epochs=1", program) if quick else program,
    }


def run(what: str, program: str) -> Row:
    """Run a program in a new process and folder. Return its time by the clock, and the time that it computes."""
    before, start = _processor_seconds(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, cwd=folder, env=environment)
    return {
        "what": what,
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(_processor_seconds() - before, 1),
    }


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def report(rows: Sequence[Row]) -> None:
    """Print a line per program."""
    for row in rows:
        print(f"{row['what']}: {row['seconds']} s, of which the processor computed {row['processor_seconds']} s")


def main() -> None:
    """Run all programs, write the rows and print the report."""
    args = study_parser(__doc__).parse_args()
    print(conditions(threads=1))
    rows = [run(what, program) for what, program in cases(args.quick).items()]
    write_measured(args.folder / "first_result.csv", rows)
    report(rows)


if __name__ == "__main__":
    main()
