"""This test compares the tables of the schedules with known values."""

import paper_schedules


def test_cycles_of_eight_stages_and_eight_microbatches():
    cycles = {
        (case["schedule"], case["duplex"]): row["cycles_counted"]
        for case in paper_schedules.cases(quick=True)
        for row in paper_schedules.run(**case)
    }
    assert cycles == {
        ("none", "half"): 128,
        ("sync", "half"): 30,
        ("1f1b", "half"): 30,
        ("zero_bubble", "half"): 31,
        ("async", "half"): 30,
        ("async", "full"): 44,
    }
