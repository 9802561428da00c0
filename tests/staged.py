"""Functions with which the tests of the core build and run steps in stages."""

from aimc_pl.flight import Flight, StagedStep
from aimc_pl.stage import Stage
from aimc_pl.trial import Trials


def make_step(network, names, function=None, **kwargs):
    """Return a step whose stages 1 … M−1 begin with the modules of these names, recorded on ``function`` if given."""
    step = StagedStep(network, names, [Stage(index) for index in range(len(names) + 1)], **kwargs)
    if function is not None:
        Trials(network, [function]).record(step)
    return step


def fly(step, functions, order=None):
    """Run micro-batches through all stages and return their flights.

    They run one after the other or in ``order``, a list of triples (pass, stage, micro-batch).
    """
    stages = range(len(step.stages))
    if order is None:
        order = [
            (kind, stage, k)
            for k in range(len(functions))
            for kind, around in (("F", stages), ("B", reversed(stages)))
            for stage in around
        ]
    flights = [Flight(step, function) for function in functions]
    with step.running():
        for kind, stage, k in order:
            (flights[k].forward if kind == "F" else flights[k].backward)(stage)
    return flights


def overlapping(num_stages, num_microbatches):
    """Return an order in which the forwards overlap, one stage behind each other, and the backwards follow."""
    clocks = range(num_stages + num_microbatches - 1)
    forwards = [
        ("F", clock - k, k)
        for clock in clocks
        for k in reversed(range(num_microbatches))
        if 0 <= clock - k < num_stages
    ]
    return forwards + [("B", stage, k) for k in range(num_microbatches) for stage in reversed(range(num_stages))]
