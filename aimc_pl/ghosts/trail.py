"""A record of the events in a step so far. It numbers the events, and lets processes compare what they have seen.

A *stretch* is the part of the step that one stage computes. An *event* is a module or a torch function that is called
in it.
"""

from collections.abc import Sequence

from aimc_pl.ghosts import refusals


class Trail:
    """The events of each stretch: for every event a mark, which is a hash of name and shapes, and a name for messages.

    Args:
        texts: the marks of the stretches before this stage's own, as the processes of these stretches saw them.
        own: the stage of this process.
    """

    def __init__(self, texts: tuple[str, ...], own: int) -> None:
        self._texts = texts
        self._own = own
        self._ended: list[tuple[int, ...]] = []
        self._marks: list[int] = []
        self._names: list[str] = []

    @property
    def event(self) -> int:
        """The number of the next event."""
        return len(self._marks)

    @property
    def way(self) -> tuple[tuple[int, ...], ...]:
        """All marks so far, by stretch."""
        return *self._ended, tuple(self._marks)

    @property
    def texts(self) -> tuple[str, ...]:
        """The marks of the stretches up to this stage's own, as texts to be sent."""
        own = self.way[self._own] if self._own < len(self.way) else ()  # the step may end before this stage begins
        return *self._texts, "".join(f"{mark:08x}" for mark in own)

    def note(self, name: str, mark: int) -> None:
        """Note an event. Its mark has 32 bits, and is 0 if only the process of the event's stage knows the mark."""
        self._marks.append(mark)
        self._names.append(name)

    def end_stretch(self) -> None:
        """End the current stretch.

        Raises:
            UsageError: if the process of the stretch has seen other events in it.
        """
        stretch = len(self._ended)
        if stretch < self._own:
            self._compare(stretch, _marks_of(self._texts[stretch]))
        self._ended.append(tuple(self._marks))
        self._marks, self._names = [], []

    def _compare(self, stretch: int, theirs: Sequence[int]) -> None:
        ours = self._marks
        pairs = enumerate(zip(theirs, ours, strict=False))
        event = next((number for number, (a, b) in pairs if b and a != b), min(len(theirs), len(ours)))
        if event < max(len(theirs), len(ours)):
            here = self._names[event] if event < len(ours) else None
            raise refusals.another_way(stretch, event, self._own, here, event < len(theirs))


def _marks_of(text: str) -> list[int]:
    return [int(text[start : start + 8], 16) for start in range(0, len(text), 8)]
