"""Print the section of CHANGELOG.md of a version, which is the text of its release.

The argument is the tag, such as v0.1.0. The command fails if pyproject.toml has another version, or if CHANGELOG.md has
no section for it.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Print the section for the tag that is the argument of the command."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    if sys.argv[1:] != [f"v{version}"]:
        sys.exit(
            f"pyproject.toml has version {version}: give the tag v{version}, got {' '.join(sys.argv[1:]) or 'none'}"
        )
    # A heading is the version, and the date of the release if it is known.
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    section = re.search(rf"^## {re.escape(version)}(?: .*)?\n(.*?)(?=^## |\Z)", changelog, re.M | re.S)
    if section is None:
        sys.exit(f"CHANGELOG.md has no section {version}")
    print(section[1].strip())


if __name__ == "__main__":
    main()
