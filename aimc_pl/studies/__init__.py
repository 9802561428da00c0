"""What a study of your own needs: resumable sweeps, their rows and statistics, ensembles of small networks, the bounds.

``docs/STUDY.md`` walks through a study. The modules:

- :mod:`aimc_pl.studies.sweeps` runs cases side by side; a stopped sweep goes on where it was.
- :mod:`aimc_pl.studies.rows` keeps their rows in a CSV file, and selects from them.
- :mod:`aimc_pl.studies.statistics` has means with intervals.
- :mod:`aimc_pl.studies.arguments` has the command line that studies share.
- :mod:`aimc_pl.studies.ensemble` trains many copies of a small network at once.
- :mod:`aimc_pl.studies.theory` bounds convergence, and fits the form of the bounds to runs.
"""
