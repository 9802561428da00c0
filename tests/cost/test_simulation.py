"""These tests compare simulations with closed forms, and with a simulation tick by tick that is written differently."""

import random
from collections import Counter, deque
from dataclasses import replace
from itertools import count, pairwise, product

import pytest

from aimc_pl.cost import StageTimes, simulate
from aimc_pl.errors import UsageError
from aimc_pl.schedule import Schedule

KINDS = [
    ("none", "half"),
    ("sync", "half"),
    ("1f1b", "half"),
    ("zero_bubble", "half"),
    ("async", "half"),
    ("async", "full"),
]


@pytest.mark.parametrize(("name", "duplex"), KINDS)
def test_equal_stages_and_free_links_give_the_clock_cycles_and_memory_of_the_table(name, duplex):
    for num_stages, size, minibatches in product(range(1, 9), range(1, 8), (1, 3)):
        schedule = Schedule(name, num_stages, size, duplex)
        # A backward of two cycles, one of which is for the gradient of the weights, where this is an operation.
        operations = 3 if name == "zero_bubble" else 2
        times = StageTimes(backward=operations - 1, gradient=operations - 2, kept=1)
        timeline = simulate(schedule, [times] * num_stages, num_minibatches=minibatches)
        fill = minibatches * size if schedule.is_async else size
        cycles = schedule.num_cycles(fill) * (1 if schedule.is_async else minibatches)
        assert timeline.makespan == cycles
        assert timeline.utilization == pytest.approx(operations * minibatches * size / cycles)
        assert timeline.peaks == [schedule.in_flight(stage, fill) for stage in range(num_stages)]


class Ticks:
    """A simulation in whole ticks. At every tick each stage looks whether the head of its list can begin."""

    def __init__(self, schedule, stages, latency, minibatches):
        self.schedule, self.stages, self.latency = schedule, stages, latency
        self.lists = [deque() for _ in stages]
        fill = minibatches * schedule.num_microbatches if schedule.is_async else schedule.num_microbatches
        for first in range(0, minibatches * schedule.num_microbatches, fill):
            for stage, todo in enumerate(self.lists):
                todo += self.operations(stage, first, fill)
        self.arrived, self.done = {}, {}
        self.wires = {}
        self.working_until = 0

    def operations(self, stage, first, fill):
        """Return what a stage does from a fill to a drain: by clock, the forward before the backward.

        Gradients of weights, where they are operations, take the clocks that are left, in order.
        """
        schedule = self.schedule
        forwards = {schedule.forward_clock(stage, k, fill): k for k in range(fill)}
        backwards = {schedule.backward_clock(stage, k, fill): k for k in range(fill)}
        full = schedule.duplex == "full"
        if schedule.name == "zero_bubble":
            free = (clock for clock in count(min(backwards)) if clock not in {*forwards, *backwards})
            gradients = {clock: k for k, clock in zip(range(fill), free, strict=False)}
            table = [(clock, "F", k) for clock, k in forwards.items()]
            table += [(clock, "B", k) for clock, k in backwards.items()]
            table += [(clock, "W", k) for clock, k in gradients.items()]
            for clock, kind, k in sorted(table):
                yield kind, first + k, fill * (clock == max(gradients)), (first, clock)
            return
        for clock in range(schedule.num_clocks(fill)):
            for kind, clocks in (("F", forwards), ("B", backwards)):
                if clock in clocks:
                    number = 1 if schedule.is_async else fill * (clock == max(backwards))
                    yield kind, first + clocks[clock], number, (first, clock)
                elif full:
                    yield kind, None, 1, (first, clock)

    def run(self):
        """Return the end of the last operation or update."""
        tick, last = 0, 0
        busy_until = [0] * len(self.stages)
        while any(self.lists):
            for stage, todo in enumerate(self.lists):
                if todo and tick >= busy_until[stage] and self.can_begin(stage, *todo[0][:2], tick):
                    if self.schedule.name == "none" and (self.working_until > tick or self.others_first(stage)):
                        continue
                    busy_until[stage], worked = self.begin(stage, *todo.popleft()[:3], tick)
                    last = max(last, busy_until[stage] * worked)
            tick += any(self.lists) and self.advance(tick, busy_until)
        return last

    def advance(self, tick, busy_until):
        """Return 0 as long as an operation without a duration may let another one begin in the same tick."""
        again = any(
            todo
            and tick >= busy_until[stage]
            and self.can_begin(stage, *todo[0][:2], tick)
            and not (self.schedule.name == "none" and (self.working_until > tick or self.others_first(stage)))
            for stage, todo in enumerate(self.lists)
        )
        return 0 if again else 1

    def others_first(self, stage):
        """Return whether another stage has an operation in an earlier clock, which goes first under ``none``."""
        return any(todo[0][3] < self.lists[stage][0][3] for todo in self.lists if todo)

    def can_begin(self, stage, kind, k, tick):
        if k is None:
            return True
        if kind == "W":
            return True  # its backward has run, in the order of the stage's list
        source = stage - 1 if kind == "F" else stage + 1
        ready = not 0 <= source < len(self.stages) or self.arrived.get((kind, stage, k), tick + 1) <= tick
        return ready and (kind == "F" or self.done.get((stage, k), tick + 1) <= tick)

    def begin(self, stage, kind, k, number, tick):
        """Return when the stage is free again, and whether it worked."""
        times = self.stages[stage]
        error = times.backward - times.gradient if self.schedule.name == "zero_bubble" else times.backward
        end = tick + {"F": times.forward, "B": error, "W": times.gradient}[kind]
        updated = end + (number * times.update + times.step if kind != "F" and number else 0)
        if k is None:
            return updated, False
        self.working_until = max(self.working_until, end)
        if kind == "F":
            self.done[stage, k] = end
        target = stage + 1 if kind == "F" else stage - 1
        if kind != "W" and 0 <= target < len(self.stages):
            leaves = max(end, self.wires.get((stage, target), 0))
            self.wires[stage, target] = leaves + (times.send if kind == "F" else times.send_back)
            self.arrived[kind, target, k] = self.wires[stage, target] + self.latency
        return updated, True


def uneven(num_stages, seed, least=1):
    rng = random.Random(seed)
    stages = [
        StageTimes(*(rng.randint(least, 6) for _ in range(2)), *(rng.randint(0, 3) for _ in range(4)))
        for _ in range(num_stages)
    ]
    return [replace(stage, gradient=rng.randint(0, int(stage.backward))) for stage in stages]


@pytest.mark.parametrize(("name", "duplex"), KINDS)
def test_uneven_stages_and_slow_links_as_tick_by_tick(name, duplex):
    for seed in range(25):
        rng = random.Random(1000 + seed)
        num_stages, size, minibatches, latency = (
            rng.randint(1, 6),
            rng.randint(1, 7),
            rng.randint(1, 3),
            rng.randint(0, 4),
        )
        schedule = Schedule(name, num_stages, size, duplex)
        stages = uneven(num_stages, seed)
        expected = Ticks(schedule, stages, latency, minibatches).run()
        assert simulate(schedule, stages, latency, minibatches).makespan == expected, (seed, schedule)


@pytest.mark.parametrize(("name", "duplex"), KINDS)
def test_nothing_slower_makes_a_run_shorter(name, duplex):
    for seed in range(8):
        num_stages, size = 1 + seed % 5, 1 + seed % 4
        schedule, stages = Schedule(name, num_stages, size, duplex), uneven(num_stages, seed, least=0)
        before = simulate(schedule, stages, 1, 2).makespan
        assert simulate(schedule, stages, 2, 2).makespan >= before
        for index, field in product(range(num_stages), ("forward", "backward", "update", "step", "send", "send_back")):
            slower = [*stages]
            slower[index] = replace(stages[index], **{field: getattr(stages[index], field) + 2.5})
            assert simulate(schedule, slower, 1, 2).makespan >= before


@pytest.mark.parametrize(("name", "duplex"), KINDS)
def test_every_operation_runs_once_and_after_what_it_needs(name, duplex):
    schedule, stages = Schedule(name, 4, 5, duplex), uneven(4, 7)
    timeline = simulate(schedule, stages, 2, 3)
    spans = {(span.kind, span.stage, span.microbatch): span for span in timeline.spans}
    kinds = Counter(kind for kind, *_ in spans)
    assert len(spans) == len(timeline.spans)
    updates = sum(stage.update + stage.step > 0 for stage in stages) * (15 if schedule.is_async else 3)
    gradients = 15 * sum(stage.gradient > 0 for stage in stages) if name == "zero_bubble" else 0
    assert kinds == Counter(F=60, B=60, U=updates, W=gradients)
    for (kind, stage, k), span in spans.items():
        if kind == "F" and stage:
            assert span.start >= spans["F", stage - 1, k].end + stages[stage - 1].send + 2
        if kind == "W":
            assert span.start >= spans["B", stage, k].end
        if kind == "B":
            assert span.start >= spans["F", stage, k].end
            if stage < 3:
                assert span.start >= spans["B", stage + 1, k].end + stages[stage + 1].send_back + 2
    for stage in range(4):
        own = sorted((span.start, span.end) for span in timeline.spans if span.stage == stage)
        assert all(end <= start for (_, end), (start, _) in pairwise(own))


@pytest.mark.parametrize(("num_stages", "size"), [(1, 1), (3, 4), (5, 2), (4, 9)])
def test_forwards_and_backwards_of_different_lengths(num_stages, size):
    f, b, u, s = 2.0, 5.0, 0.5, 0.25
    stages = [StageTimes(f, b, u, s)] * num_stages

    def makespan(name, minibatches=1):
        return simulate(Schedule(name, num_stages, size), stages, num_minibatches=minibatches).makespan

    # The update of a stage runs beside the backwards of the next, which takes longer.
    assert makespan("none") == pytest.approx(num_stages * size * (f + b) + size * u + s)
    assert makespan("sync") == pytest.approx((num_stages + size - 1) * (f + b) + size * u + s)
    # A mini-batch of sync ends with the update of stage 0, so another mini-batch takes the same time again.
    assert makespan("sync", 3) == pytest.approx(3 * makespan("sync"))
    assert makespan("1f1b") == pytest.approx(makespan("sync"))
    # Under async every micro-batch more takes what the stages work for it.
    assert makespan("async", 9) - makespan("async", 8) == pytest.approx(size * (f + b + u + s))


@pytest.mark.parametrize(("num_stages", "size"), [(1, 1), (1, 4), (3, 3), (4, 9), (6, 7)])
def test_zero_bubble_shortens_the_way_back_by_the_gradients(num_stages, size):
    """Check the closed forms of docs/COST.md: with gradients of weights shorter and longer than other operations."""
    u, s = 0.5, 0.25
    for f, b, w in product((0.5, 1, 2), (0.5, 1, 3), (0, 0.25, 1, 2, 5)):
        stages = [StageTimes(f, b + w, u, s, gradient=w)] * num_stages

        def makespan(name, minibatches=1, stages=stages):
            return simulate(Schedule(name, num_stages, size), stages, num_minibatches=minibatches).makespan

        update = size * u + s
        expected = size * (f + b + w) + (num_stages - 1) * max(f, b, f + b - w) + update
        assert makespan("zero_bubble") == pytest.approx(expected)
        # The next mini-batch begins when stage 0 is updated. A later stage may still be at work.
        first = size * (f + b + w) + (num_stages - 1) * max(b, f + b - w) + update
        assert makespan("zero_bubble", 3) == pytest.approx(2 * first + expected)
        assert makespan("1f1b") == pytest.approx((num_stages + size - 1) * (f + b + w) + update)
        # Without gradients that may wait, as on crossbars that learn by pulses, nothing is gained.
        assert w or makespan("zero_bubble") == pytest.approx(makespan("1f1b"))


def test_what_a_gradient_needs_is_kept_until_then():
    """Check 3 stages and 5 micro-batches. Of stage 0, in its own clocks: F F F B F B F B W B W B W W W."""
    times = StageTimes(backward=2, gradient=1, kept=10, deferred=4)
    assert simulate(Schedule("1f1b", 3, 5), [times] * 3, num_minibatches=2).peaks == [30, 20, 10]
    # Stage 0 holds three micro-batches and two that wait, stage 1 two and three, stage 2 one and four.
    peaks = simulate(Schedule("zero_bubble", 3, 5), [times] * 3, num_minibatches=2).peaks
    assert peaks == [30 + 2 * 4, 20 + 3 * 4, 10 + 4 * 4]


@pytest.mark.parametrize("num_stages", [2, 5])
def test_latency_adds_to_the_way_there_and_back(num_stages):
    schedule = Schedule("sync", num_stages, 3)
    free = simulate(schedule, [StageTimes()] * num_stages).makespan
    assert simulate(schedule, [StageTimes()] * num_stages, latency=0.5).makespan == free + 2 * (num_stages - 1) * 0.5


def test_a_narrow_link_sends_one_result_at_a_time():
    stages = [StageTimes(1, 1, send=3), StageTimes(1, 1)]
    timeline = simulate(Schedule("sync", 2, 4), stages)
    starts = [span.start for span in timeline.spans if (span.kind, span.stage) == ("F", 1)]
    assert starts == [4, 7, 10, 13]


def test_inputs_and_errors_wait_for_the_update_of_a_mini_batch():
    stages = [StageTimes(kept=10, pending=4, update=0.1)] * 3
    assert simulate(Schedule("1f1b", 3, 6), stages).peaks == [30 + 3 * 4, 20 + 4 * 4, 10 + 5 * 4]
    assert simulate(Schedule("sync", 3, 6), stages).peaks == [60, 60, 60]
    assert simulate(Schedule("async", 3, 6), stages, num_minibatches=4).peaks[2] == 10


class Reversed(Schedule):
    """A schedule of the user's own, whose stages wait a clock between forwards and backwards."""

    def backward_clock(self, stage, microbatch, num_microbatches=None):
        return super().backward_clock(stage, microbatch, num_microbatches) + 1


@pytest.mark.parametrize("a", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("duplex", ["half", "full"])
def test_stages_that_accumulate_make_fewer_updates(a, duplex):
    """Check 7 micro-batches: ⌈7/a⌉ updates of every stage, the last at the drain, and how long stages work."""
    times = StageTimes(forward=2.0, backward=3.0, update=0.5, step=4.0, pending=1.0)
    timeline = simulate(Schedule("async", 3, 7, duplex, accumulate=a), [times] * 3)
    updates = [span for span in timeline.spans if span.kind == "U"]
    assert Counter(span.stage for span in updates) == dict.fromkeys(range(3), -(-7 // a))
    assert [timeline.busy(stage) for stage in range(3)] == [7 * 5.5 + -(-7 // a) * 4.0] * 3
    assert timeline.peaks == [min(a, 7)] * 3


def test_a_schedule_of_ones_own_runs():
    own, built_in = Reversed("sync", 3, 4), Schedule("sync", 3, 4)
    stages = uneven(3, 5)
    # It has the same order, and the simulation does not wait for idle clocks.
    assert simulate(own, stages).makespan == simulate(built_in, stages).makespan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": [StageTimes()]}, "has 2 stages, got the times of 1"),
        ({"latency": -1}, "latency must be a finite number of at least 0"),
        ({"num_minibatches": 0}, "num_minibatches must be a whole number of at least 1"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        simulate(Schedule("sync", 2, 2), **{"stages": [StageTimes()] * 2, **change})
    with pytest.raises(UsageError, match="forward of a stage must be a finite number of at least 0, got nan"):
        StageTimes(float("nan"))
    with pytest.raises(UsageError, match=r"gradient of a stage, a part of its backward, .* at most 1.0, got 2"):
        StageTimes(gradient=2)
