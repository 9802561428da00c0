"""What a step cannot do when its stages are in different processes, in one line each."""

from aimc_pl.errors import UsageError


def never_reached(stage: int, boundary: str) -> UsageError:
    """The step ends before a stage begins."""
    return UsageError(
        f"the step ended in stage {stage}: it does not call {boundary!r} after the boundaries before it (a module "
        "inside a compiled function cannot begin a stage: name the module around it)"
    )


def shared(parameter: str, *stages: int) -> UsageError:
    """Two stages use one parameter."""
    first, second = sorted(stages)
    return UsageError(f"parameter {parameter!r} is used by stages {first} and {second}: keep both uses on one stage")


class ReadsValueError(UsageError):
    """The step decides by values that only another process has."""


def reads(stage: int, what: str) -> ReadsValueError:
    """Python reads a value of another stage."""
    return ReadsValueError(
        f"the step reads a value of stage {stage} in Python ({what.strip('_')}): keep what depends on values inside "
        "one module, or train with devices=1"
    )


def foreign(what: str, label: str, stage: int) -> UsageError:
    """Code outside of the step reads a weight that is elsewhere."""
    return UsageError(
        f"{what.strip('_')} outside of training_step reads {label!r}, which only the process of stage {stage} has: "
        "decide by metrics that are logged, look at weights after the fit, or train with devices=1"
    )


def other_hook(here: str, own: int, there: str, stage: int) -> UsageError:
    """Hooks of two processes ask for different things."""
    return UsageError(
        f"the processes do not compute the same with gradients: stage {own} calls {here} where stage {stage} calls "
        f"{there}, or of other parameters. Hooks must do the same in all processes"
    )


def spans_stages(what: str) -> UsageError:
    """Something that must be computed as a whole lies in several stages."""
    return UsageError(f"{what} spans stages: keep it inside one module, or use schedule='sync' with devices=1")


def hidden(reader: int, stage: int) -> UsageError:
    """A stage reads what a module of another stage has not returned."""
    return UsageError(
        f"stage {reader} reads a value made inside a module of an earlier stage ({stage}) and kept apart from its "
        "outputs: return it"
    )


def left_behind(shape: tuple[int, ...]) -> UsageError:
    """A micro-batch reads an activation of another one."""
    return UsageError(
        f"a micro-batch reads an activation that another has left behind (of shape {shape}): pass it as an argument, "
        "or keep both places on one stage"
    )


def written_through_a_view(made: int, written: int) -> UsageError:
    """A stage changes a value of another stage in place, through a view."""
    return UsageError(
        f"a value of stage {made} was changed in place, through a view, by stage {written}: use the out-of-place "
        "operation"
    )


def not_sent(stage: int, made: int) -> UsageError:
    """A stage needs a value that it has not been sent."""
    return UsageError(
        f"stage {stage} needs a value of stage {made} that stage {stage - 1} has not sent: the step takes another way "
        "than it took before with such a batch"
    )


def another_way(stretch: int, event: int, stage: int, here: str | None, there: bool) -> UsageError:
    """Processes disagree.

    Args:
        stretch: in which they do.
        event: the first that differs.
        stage: of this process.
        here: what the event is in this process, if there is one.
        there: whether there is one in the process of the stage before.
    """
    ours = "nothing more" if here is None else repr(here)
    theirs = "something else, or of another shape," if there else "nothing more"
    return UsageError(
        f"stages do not take the same way through the step: in the stretch of stage {stretch}, operation {event} is "
        f"{ours} for stage {stage} and {theirs} for stage {stage - 1}. All processes need the same batches, constants "
        "and counters"
    )
