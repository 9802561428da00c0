"""This module lets ``python -m aimc_pl`` be the command ``aimc-pl``."""

from aimc_pl.cli import main

if __name__ == "__main__":
    main()
