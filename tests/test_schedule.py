"""These tests compare clock tables with closed forms, with drawings, and with rules that hold for every pipeline."""

from collections import Counter, defaultdict
from itertools import accumulate, combinations, product
from unittest.mock import MagicMock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import ScheduleInterleavedZeroBubble

from aimc_pl.diagram import draw_text
from aimc_pl.schedule import Schedule, check_order

SCHEDULES = [
    ("none", "half"),
    ("sync", "half"),
    ("1f1b", "half"),
    ("zero_bubble", "half"),
    ("async", "half"),
    ("async", "full"),
]
SIZES = pytest.mark.parametrize("up_to", [4, pytest.param(16, marks=pytest.mark.slow)])
UP_TO_16 = st.integers(1, 16)
schedules = st.builds(
    lambda kind, stages, microbatches: Schedule(kind[0], stages, microbatches, kind[1]),
    st.sampled_from(SCHEDULES),
    UP_TO_16,
    UP_TO_16,
)


def clocks_of(schedule, total):
    return {operation: clock for clock, row in enumerate(schedule.clocks(total)) for operation in row}


def test_async_draws_as_in_the_paper():
    assert draw_text(Schedule("async", 3, 3), 3).splitlines() == [
        "clock     0  1  2  3  4  5  6  7  8  9",
        "stage 2        F0 B0 F1 B1 F2 B2      ",
        "stage 1     F0    F1 B0 F2 B1    B2   ",
        "stage 0  F0    F1    F2 B0    B1    B2",
    ]


def test_sync_draws_as_in_the_paper():
    assert draw_text(Schedule("sync", 3, 3), 3).splitlines() == [
        "clock     0  1  2  3  4  5  6  7  8  9",
        "stage 2        F0 F1 F2 B0 B1 B2      ",
        "stage 1     F0 F1 F2       B0 B1 B2   ",
        "stage 0  F0 F1 F2             B0 B1 B2",
    ]


def test_gradients_of_weights_fill_the_clocks_that_1f1b_leaves_free():
    assert draw_text(Schedule("zero_bubble", 3, 4), 4).splitlines() == [
        "clock     0  1  2  3  4  5  6  7  8  9 10 11 12 13",
        "stage 2        F0 B0 F1 B1 F2 B2 F3 B3 W0 W1 W2 W3",
        "stage 1     F0    F1 B0 F2 B1 F3 B2 W0 B3 W1 W2 W3",
        "stage 0  F0    F1    F2 B0 F3 B1 W0 B2 W1 B3 W2 W3",
    ]


def test_full_duplex_turns_around_in_the_last_stage():
    assert draw_text(Schedule("async", 2, 3, "full"), 3).splitlines() == [
        "clock        0     1     2     3     4",
        "stage 1        F0/B0 F1/B1 F2/B2      ",
        "stage 0     F0    F1 F2/B0    B1    B2",
    ]


@pytest.mark.parametrize(("name", "duplex"), SCHEDULES)
@pytest.mark.parametrize("total", [1, 3, 16, 40])
def test_closed_forms_for_all_sizes(name, duplex, total):
    """Check the closed forms, written out here, for all M ≤ 16 and a run of `total` micro-batches."""
    for stages in range(1, 17):
        schedule = Schedule(name, stages, total, duplex)
        rows = list(schedule.clocks(total))
        busy = sum(map(len, rows))
        cycles = len(rows) * (2 if duplex == "full" else 1)
        expected = {
            ("none", "half"): 2 * stages * total,
            ("sync", "half"): 2 * (stages + total - 1),
            ("1f1b", "half"): 2 * (stages + total - 1),
            ("zero_bubble", "half"): max(3 * total + stages - 1, 2 * (stages + total) - 1),
            ("async", "half"): 2 * total + 2 * (stages - 1),
            ("async", "full"): 2 * (total + 2 * stages - 2),
        }[name, duplex]
        assert cycles == expected == schedule.num_cycles(total)
        assert busy == (3 if name == "zero_bubble" else 2) * stages * total
        assert schedule.density(total) == pytest.approx(busy / (stages * cycles), rel=1e-12)
        assert schedule.speedup(total) == pytest.approx(busy / cycles, rel=1e-12)


@SIZES
def test_zero_bubble_is_1f1b_with_a_gradient_in_every_free_clock(up_to):
    """Check the two tables against each other, and that no gradient could come in an earlier clock of its stage."""
    for stages in range(1, up_to + 1):
        for total in range(1, up_to + 1):
            rows = [*Schedule("zero_bubble", stages, total).clocks()]
            of_1f1b = [*Schedule("1f1b", stages, total).clocks()]
            assert [[each for each in row if each.kind != "W"] for row in rows[: len(of_1f1b)]] == of_1f1b
            waiting, most = Counter(), Counter()
            for row in rows:
                at = {stage: kind for kind, stage, _ in row}
                for stage in range(stages):
                    kind = at.get(stage, "")
                    if kind == "W":
                        waiting[stage] -= 1
                    assert kind or not waiting[stage]
                    waiting[stage] += kind == "B"
                    most[stage] = max(most[stage], waiting[stage])
            # What waits between B and W, as docs/SCHEDULES.md says.
            assert most == {stage: max(total - (stages - 1 - stage), 1) for stage in range(stages)}


@pytest.mark.parametrize(("stages", "total"), [(2, 2), (2, 6), (3, 9), (4, 8), (8, 16)])
def test_zero_bubble_takes_the_clock_cycles_of_torchs_schedule(stages, total):
    """Compare with torch's own table, one stage per rank, and count what its ranks hold from forward to gradient."""
    stage = MagicMock(group_size=stages, group_rank=0, num_stages=stages, stage_index=0, has_backward=True)
    for table in ScheduleInterleavedZeroBubble([stage], total).pipeline_order.values():
        assert len(table) == Schedule("zero_bubble", stages, total).num_cycles()
        changes = [{"F": 1, "I": 0, "W": -1}[str(action).strip("0123456789")] for action in table if action]
        assert max(accumulate(changes)) == stages


@pytest.mark.parametrize(("duplex", "ways"), [("half", 1), ("full", 2)])
@pytest.mark.parametrize("later", [0, 1, 2, 5])
def test_staleness_grows_by_the_backwards_that_an_update_waits_for(duplex, ways, later):
    """Check docs/SCHEDULES.md against the table: updates that come `later` backwards after their own."""
    for stages in range(1, 10):
        updates, seen = Counter(), {}
        for row in Schedule("async", stages, 1, duplex).clocks(40):
            for kind, stage, k in row:
                if kind == "F":
                    seen[stage, k] = updates[stage]
            for kind, stage, k in row:
                # B(stage, k) is over, and the update from micro-batch k - later follows.
                if kind == "B" and k >= later:
                    staleness = updates[stage] - seen[stage, k - later]
                    assert staleness == min(k - later, ways * (stages - 1 - stage) + later)
                    updates[stage] += 1


@pytest.mark.parametrize(("name", "duplex"), SCHEDULES)
def test_by_default_the_pipeline_drains_after_a_mini_batch(name, duplex):
    """Check that the numbers depend on K alone, and that K is B unless it is given."""

    def numbers(schedule, *total):
        stages = range(schedule.num_stages)
        return (
            [*schedule.clocks(*total)],
            [schedule.forward_clock(stage, 1, *total) for stage in stages],
            [schedule.backward_clock(stage, 1, *total) for stage in stages],
            [schedule.in_flight(stage, *total) for stage in stages],
            schedule.num_clocks(*total),
            schedule.num_cycles(*total),
            schedule.density(*total),
            schedule.speedup(*total),
        )

    expected = numbers(Schedule(name, 3, 5, duplex))
    assert numbers(Schedule(name, 3, 2, duplex), 5) == numbers(Schedule(name, 3, 9, duplex), 5) == expected
    kinds = "FBW" if name == "zero_bubble" else "FB"
    assert Counter(operation.kind for row in expected[0] for operation in row) == dict.fromkeys(kinds, 15)


@SIZES
@pytest.mark.parametrize(("name", "duplex"), SCHEDULES)
def test_in_flight_counted(name, duplex, up_to):
    for stages in range(1, up_to + 1):
        for total in range(1, up_to + 1):
            schedule = Schedule(name, stages, total, duplex)
            held, most = Counter(), Counter()
            for row in schedule.clocks(total):
                for kind, stage, _ in row:
                    held[stage] += {"F": 1, "B": -1, "W": 0}[kind]
                    most[stage] = max(most[stage], held[stage])
            assert most == {stage: schedule.in_flight(stage, total) for stage in range(stages)}


@pytest.mark.parametrize("duplex", ["half", "full"])
@pytest.mark.parametrize("total", [1, 5, 16, 40])
def test_async_versions_and_staleness_counted(duplex, total):
    for stages in range(1, 17):
        schedule = Schedule("async", stages, 1, duplex)
        updates, seen = Counter(), {}
        for row in schedule.clocks(total):
            for kind, stage, k in row:
                delay = (stages - 1 - stage) * (2 if duplex == "full" else 1)
                if kind == "F":
                    seen[stage, k] = updates[stage]
                    assert schedule.version(stage, k) == seen[stage, k] == max(0, k - delay)
                else:
                    assert schedule.staleness(stage, k) == updates[stage] - seen[stage, k] == min(k, delay)
            # Updates come after all operations of a clock.
            updates.update(stage for kind, stage, _ in row if kind == "B")


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_no_other_order_has_less_staleness(stages):
    """Check all tables that stages repeat every second clock, so that they are never idle, with short enough waits."""
    clocks = range(2 * stages + 3)
    least = [len(clocks)] * stages
    for forward, backward in product(combinations(clocks, stages), combinations(reversed(clocks), stages)):
        # A stage cannot do both in a clock, and the last stage has both in this order.
        if backward[-1] < forward[-1] or any((b - f) % 2 == 0 for f, b in zip(forward, backward, strict=True)):
            continue
        for stage, (first, last) in enumerate(zip(forward, backward, strict=True)):
            # The updates by micro-batches that are n places before or after this one.
            between = [n for n in range(-len(clocks), len(clocks)) if first <= last + 2 * n < last]
            least[stage] = min(least[stage], len(between))
    assert least == [Schedule("async", stages).max_staleness(stage) for stage in range(stages)]


@pytest.mark.parametrize("duplex", ["half", "full"])
@pytest.mark.parametrize("a", [2, 3, 7])
def test_staleness_counted_where_stages_accumulate(duplex, a):
    """Check versions and staleness where a stage makes an update after every a-th backward."""
    for stages in range(1, 10):
        schedule = Schedule("async", stages, 1, duplex, accumulate=a)
        assert schedule == Schedule("async", stages, 1, duplex).accumulating(a)
        backwards, seen, oldest = Counter(), {}, {}
        for row in schedule.clocks(40):
            for kind, stage, k in row:
                version = backwards[stage] // a
                if kind == "F":
                    seen[stage, k] = version
                    assert schedule.version(stage, k) == version
                    continue
                oldest[stage] = min(oldest.get(stage, version), seen[stage, k])
                if (k + 1) % a == 0:
                    assert schedule.staleness(stage, k) == version - oldest.pop(stage)
            backwards.update(stage for kind, stage, _ in row if kind == "B")


@pytest.mark.parametrize("name", ["none", "sync", "1f1b", "zero_bubble"])
def test_one_update_per_minibatch_has_no_staleness(name):
    schedule = Schedule(name, 4, 3)
    assert {schedule.version(m, k) for m in range(4) for k in range(3)} == {0}
    assert {schedule.staleness(m, k) for m in range(4) for k in range(7)} == {0}


class Shifted(Schedule):
    """A schedule in which the forwards, backwards or gradients of one stage come ``early`` clocks too soon."""

    early = 0
    kind = "B"
    stage = 1

    def forward_clock(self, stage, microbatch, num_microbatches=None):
        early = self.early * (("F", stage) == (self.kind, self.stage))
        return super().forward_clock(stage, microbatch, num_microbatches) - early

    def backward_clock(self, stage, microbatch, num_microbatches=None):
        early = self.early * (("B", stage) == (self.kind, self.stage))
        return super().backward_clock(stage, microbatch, num_microbatches) - early

    def weight_clock(self, stage, microbatch, num_microbatches=None):
        early = self.early * (("W", stage) == (self.kind, self.stage))
        return super().weight_clock(stage, microbatch, num_microbatches) - early


@SIZES
@pytest.mark.parametrize(("name", "duplex"), SCHEDULES)
def test_named_schedules_are_in_order(name, duplex, up_to):
    for stages in range(1, up_to + 1):
        for microbatches in range(1, up_to + 1):
            check_order(Schedule(name, stages, microbatches, duplex))


@pytest.mark.parametrize(
    ("kind", "stage", "early", "message"),
    [
        (
            "F",
            2,
            1,
            r"Shifted has F\(stage 2, micro-batch 0\) in clock 1, and F\(stage 1, micro-batch 0\), which it needs, in",
        ),
        (
            "B",
            1,
            1,
            r"Shifted has B\(stage 1, micro-batch 0\) in clock 3, and B\(stage 2, micro-batch 0\), which it needs, in",
        ),
        ("B", 1, 9, r"Shifted has no clock for B\(stage 1, micro-batch 0\)"),
        (
            "B",
            0,
            -1,
            r"Shifted has F\(stage 0, micro-batch 3\) and B\(stage 0, micro-batch 0\) in clock 6, and in half duplex "
            "a stage does one of them",
        ),
    ],
)
def test_clocks_out_of_order_are_refused(kind, stage, early, message):
    schedule = Shifted("async", 3, 4)
    check_order(schedule)
    object.__setattr__(schedule, "kind", kind)
    object.__setattr__(schedule, "stage", stage)
    object.__setattr__(schedule, "early", early)
    with pytest.raises(ValueError, match=message):
        check_order(schedule)


@pytest.mark.parametrize(
    ("early", "message"),
    [
        (1, r"Shifted has B\(stage 0, micro-batch 1\) and W\(stage 0, micro-batch 0\) in clock 7, and in half duplex"),
        (3, r"Shifted has W\(stage 0, micro-batch 0\) in clock 5, and B\(stage 0, micro-batch 0\), which it needs"),
    ],
)
def test_gradients_out_of_order_are_refused(early, message):
    """Check stage 0 of 3: B of 4 micro-batches in clocks 5, 7, 9 and 11, and W in 8, 10, 12 and 13."""
    schedule = Shifted("zero_bubble", 3, 4)
    check_order(schedule)
    for name, value in {"kind": "W", "stage": 0, "early": early}.items():
        object.__setattr__(schedule, name, value)
    with pytest.raises(ValueError, match=message):
        check_order(schedule)


@pytest.mark.parametrize(
    ("name", "length"), [("none", 3), ("sync", 3), ("1f1b", 3), ("zero_bubble", 3), ("async", 3 + 2 * 4)]
)
def test_the_table_is_checked_up_to_its_length(name, length):
    class Forgetful(Schedule):
        """A schedule without one of its micro-batches."""

        def operations(self, clock, num_microbatches=None):
            return [each for each in super().operations(clock, num_microbatches) if each.microbatch != forgotten]

    forgotten = length
    check_order(Forgetful(name, 4, 3))
    forgotten = length - 1
    with pytest.raises(ValueError, match=rf"no clock for F\(stage 0, micro-batch {forgotten}\)"):
        check_order(Forgetful(name, 4, 3))


@given(schedules, st.integers(1, 48))
def test_every_forward_has_its_backward(schedule, total):
    counts = Counter(operation for row in schedule.clocks(total) for operation in row)
    kinds = "FBW" if schedule.splits_backward else "FB"
    expected = {(kind, m, k) for kind in kinds for m in range(schedule.num_stages) for k in range(total)}
    assert set(counts) == expected
    assert set(counts.values()) == {1}


@given(schedules, st.integers(1, 48))
def test_nothing_arrives_before_it_was_sent(schedule, total):
    clock = clocks_of(schedule, total)
    for (kind, m, k), at in clock.items():
        if kind == "F" and m:
            assert clock["F", m - 1, k] < at
        if kind == "B" and m < schedule.num_stages - 1:
            assert clock["B", m + 1, k] < at
        if kind == "B" and m == schedule.num_stages - 1:
            assert clock["F", m, k] < at or (schedule.duplex == "full" and clock["F", m, k] == at)
        if kind == "W":
            assert clock["B", m, k] < at


@given(schedules, st.integers(1, 48))
def test_a_stage_does_one_thing_in_a_clock(schedule, total):
    for row in schedule.clocks(total):
        at_stage = defaultdict(list)
        for kind, stage, _ in row:
            at_stage[stage].append(kind)
        for kinds in at_stage.values():
            assert kinds in (["F"], ["B"], ["W"]) or (schedule.duplex == "full" and kinds == ["F", "B"])


@given(schedules, st.integers(1, 48))
def test_open_ended_table_is_the_same_until_the_drain(schedule, total):
    if not schedule.is_async:
        return
    for clock in range(schedule.forward_clock(0, total)):
        assert schedule.operations(clock) == schedule.operations(clock, total)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fast", 2), "unknown schedule 'fast': choose one of none, sync, 1f1b, zero_bubble, async$"),
        (("sync", 0), "num_stages must be"),
        (("sync", 1001), "num_stages must be"),
        (("sync", 2, 100_001), "num_microbatches must be"),
        (("sync", 2, 0), "num_microbatches must be"),
        (("sync", 2, 2.5), "num_microbatches must be"),
        (("sync", True), "num_stages must be"),
        (("sync", 2, 2, "full"), "duplex='full' is for"),
        (("async", 2, 2, "both"), "unknown duplex 'both': choose one of half, full$"),
        (("sync", 2, 2, "half", 2), "accumulate is for schedule='async', not for schedule='sync'"),
        (("async", 2, 2, "half", 0), "accumulate must be"),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


def test_the_largest_schedule_is_accepted():
    assert Schedule("async", 1000, 100_000).max_staleness(0) == 999
