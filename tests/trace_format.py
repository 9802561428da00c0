"""A check of events in the Trace Event Format, for the tests of traces."""

from itertools import pairwise

REQUIRED = {"M": {"args"}, "X": {"ts", "dur", "cat"}, "s": {"ts", "id", "cat"}, "f": {"ts", "id", "cat", "bp"}}
"""The fields that each phase needs, besides name, process and thread."""


def check_format(events):
    """Check what a viewer relies on: fields and types, one slice at a time on a thread, and arrows between slices."""
    named, slices, flows = set(), {}, {}
    for event in events:
        assert {"ph", "name", "pid", "tid"} | REQUIRED[event["ph"]] <= event.keys()
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        place = event["pid"], event["tid"]
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            named.add((event["name"], *place))
        elif event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] > 0
            slices.setdefault(place, []).append((event["ts"], event["ts"] + event["dur"], event["name"]))
        else:
            flows.setdefault((event["cat"], event["name"], event["id"]), {})[event["ph"]] = event
    for place, own in slices.items():
        assert ("thread_name", *place) in named
        assert ("process_name", place[0], 0) in named
        own.sort()
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(own))
    for (_, name, _), ends in flows.items():
        assert ends.keys() == {"s", "f"}
        assert ends["f"]["bp"] == "e"
        assert ends["s"]["ts"] <= ends["f"]["ts"]
        bound = []
        for event in ends.values():
            around = [s for s in slices[event["pid"], event["tid"]] if s[0] <= event["ts"] <= s[1]]
            assert len(around) == 1
            bound.append(around[0][2])
        assert bound[0] == bound[1]  # the same operation of the same micro-batch, at two stages
        assert bound[0][0] == {"activations": "F", "errors": "B"}[name]
        assert ends["f"]["tid"] - ends["s"]["tid"] == {"activations": 1, "errors": -1}[name]
    return len(flows)
