"""Errors for what a step cannot do when its stages are in different processes. Each message is one line."""

from aimc_pl.errors import UsageError


def never_reached(stage: int, boundary: str) -> UsageError:
    """Return the error for a step that ends before all stages have begun."""
    return UsageError(
        f"the step ended in stage {stage}: it does not call {boundary!r} after the boundaries before it (a module "
        "inside a compiled function cannot begin a stage: name the module around it)"
    )


def shared(parameter: str, *stages: int) -> UsageError:
    """Return the error for a parameter that two stages use."""
    first, second = sorted(stages)
    return UsageError(f"parameter {parameter!r} is used by stages {first} and {second}: keep both uses on one stage")


class ReadsValueError(UsageError):
    """The step decides by a value that only another process has."""


def reads(stage: int, what: str) -> ReadsValueError:
    """Return the error for a step that reads a value of another stage in Python."""
    return ReadsValueError(
        f"the step reads a value of stage {stage} in Python ({what.strip('_')}): keep what depends on values inside "
        "one module, or train with devices=1"
    )


def metric(kind: str, stage: int) -> UsageError:
    """Return the error for a metric that is logged, and that another stage than the last has updated."""
    return UsageError(
        f"the step logs a {kind} that stage {stage} updates, and only the last stage logs: update it after the last "
        "boundary, log a number in its place, or use devices=1"
    )


def metric_of_stages(kind: str, first: int, second: int) -> UsageError:
    """Return the error for a metric that two stages update."""
    return UsageError(
        f"a {kind} is used by stages {first} and {second}, each of which knows its own updates only: use it on one "
        "stage, or use devices=1"
    )


def foreign(what: str, label: str, stage: int) -> UsageError:
    """Return the error for code outside of the step that reads a value which only another process has."""
    return UsageError(
        f"{what.strip('_')} outside of training_step reads {label!r}, which only the process of stage {stage} has: "
        "decide by metrics that are logged, look at weights after the fit, or train with devices=1"
    )


def other_hook(here: str, own: int, there: str, stage: int) -> UsageError:
    """Return the error for hooks that call different functions in two processes."""
    return UsageError(
        f"hooks differ between processes: stage {own} calls {here} where stage {stage} calls {there}, or calls it on "
        "gradients of other parameters. Hooks must do the same in all processes"
    )


def spans_stages(what: str) -> UsageError:
    """Return the error for something that lies in several stages and must be computed as a whole."""
    return UsageError(f"{what} spans stages: keep it inside one module, or use schedule='sync' with devices=1")


def hidden(reader: int, stage: int) -> UsageError:
    """Return the error for a stage that reads a value which a module of another stage has not returned."""
    return UsageError(
        f"stage {reader} reads a value made inside a module of an earlier stage ({stage}) and kept apart from its "
        "outputs: return it"
    )


def left_behind(shape: tuple[int, ...]) -> UsageError:
    """Return the error for a micro-batch that reads an activation of another micro-batch."""
    return UsageError(
        f"a micro-batch reads an activation that another has left behind (of shape {shape}): pass it as an argument, "
        "or keep both places on one stage"
    )


def written_through_a_view(made: int, written: int) -> UsageError:
    """Return the error for a stage that changes a value of another stage in place, through a view."""
    return UsageError(
        f"a value of stage {made} was changed in place, through a view, by stage {written}: use the out-of-place "
        "operation"
    )


def not_sent(stage: int, made: int) -> UsageError:
    """Return the error for a stage that needs a value which it has not been sent."""
    return UsageError(
        f"stage {stage} needs a value of stage {made} that stage {stage - 1} has not sent in this shape: the step "
        "calls other operations than before with the same shapes. Let them depend on the shapes and constants of the "
        "batch and on the epoch, not on batch_idx or global_step, or use devices=1"
    )


def another_way(stretch: int, event: int, stage: int, here: str | None, there: bool) -> UsageError:
    """Return the error for processes that see different events in a stretch, the part of the step of one stage.

    Args:
        stretch: the stage whose stretch it is.
        event: the number of the first event that differs.
        stage: the stage of this process.
        here: the name of the event in this process; ``None`` if there is no such event.
        there: whether there is such an event in the process of the stage before.
    """
    ours = "nothing more" if here is None else repr(here)
    theirs = "something else, or of another shape," if there else "nothing more"
    return UsageError(
        f"stages do not take the same way through the step: in the stretch of stage {stretch}, operation {event} is "
        f"{ours} for stage {stage} and {theirs} for stage {stage - 1}. All processes need the same batches, constants "
        "and counters"
    )
