"""This package holds tools for your own studies: resumable sweeps, statistics, ensembles of small networks, bounds.

``docs/STUDY.md`` walks through a study. The modules:

- :mod:`aimc_pl.studies.sweeps` runs cases in parallel. A stopped sweep continues where it was.
- :mod:`aimc_pl.studies.grids` runs a config of the command for every combination of some values.
- :mod:`aimc_pl.studies.rows` keeps the rows of a sweep in a CSV file, and selects from them.
- :mod:`aimc_pl.studies.statistics` computes means with confidence intervals.
- :mod:`aimc_pl.studies.arguments` defines the command line that studies share.
- :mod:`aimc_pl.studies.ensemble` trains many copies of a small network at once.
- :mod:`aimc_pl.studies.theory` computes bounds on convergence, and fits their form to runs.
"""
