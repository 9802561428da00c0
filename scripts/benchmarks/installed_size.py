"""This benchmark sums the sizes of the files of an installation, with and without what only CUDA needs.

It follows the requirements of the installed package ``aimc-pl``. Files that Python compiles at the first import do not
count. torch's CPU wheel is not needed: what it lacks are the libraries of CUDA that are counted here. Usage:

    .venv/bin/python scripts/benchmarks/installed_size.py --folder docs/results
"""

import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from aimc_pl.studies.arguments import study_parser
from aimc_pl.studies.rows import Row, write_rows

PARTS = {
    "CUDA packages and triton": r"^(nvidia|cuda|triton)",
    "CUDA libraries of torch": r"^torch/lib/lib(torch_cuda|torch_nvshmem|c10_cuda)",
    "everything else": "",
}
"""The parts of an installation, and what the paths of their files begin with. The first that fits counts."""


def cases() -> list[metadata.Distribution]:
    """Return the package and everything that it requires, each once."""
    packages, waiting, seen = dict[str, metadata.Distribution](), [Requirement("aimc-pl")], set[str]()
    while waiting:
        requirement = waiting.pop()
        if (what := f"{requirement.name} {sorted(requirement.extras)}") in seen:
            continue
        seen.add(what)
        package = metadata.distribution(requirement.name)
        packages[package.name] = package
        for inner in map(Requirement, package.requires or []):
            extras = ["", *requirement.extras]
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(inner)
    return [*packages.values()]


def run(packages: Sequence[metadata.Distribution]) -> list[Row]:
    """Return the gigabytes (10⁹ bytes) of each part."""
    sizes = dict.fromkeys(PARTS, 0)
    for file in (file for package in packages for file in package.files or []):
        path = Path(str(file.locate()))
        if path.is_file() and path.suffix != ".pyc":
            part = next(part for part, pattern in PARTS.items() if re.match(pattern, str(file)))
            sizes[part] += path.stat().st_size
    return [{"part": part, "gigabytes": round(size / 1e9, 2)} for part, size in sizes.items()]


def report(rows: Sequence[Row]) -> None:
    """Print a line per part."""
    for row in rows:
        print(f"{row['part']}: {row['gigabytes']} GB")


def main() -> None:
    """Sum the sizes, write the rows and print the report."""
    args = study_parser(__doc__).parse_args()
    rows = run(cases())
    write_rows(args.folder / "installed_size.csv", rows)
    report(rows)


if __name__ == "__main__":
    main()
