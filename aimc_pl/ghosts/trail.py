"""What has happened in a step so far, to name values by and to compare between processes."""

from collections.abc import Sequence

from aimc_pl.ghosts import refusals


class Trail:
    """The events of each stretch: a mark, which tells names and shapes, and a name for messages.

    Args:
        texts: of the stretches before this stage's, as their own processes saw them.
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
        """All marks so far."""
        return *self._ended, tuple(self._marks)

    @property
    def texts(self) -> tuple[str, ...]:
        """Of the stretches up to this stage's, to be sent."""
        return *self._texts, "".join(f"{mark:08x}" for mark in self.way[self._own])

    def note(self, name: str, mark: int) -> None:
        """An event: its mark is of 32 bits, or 0 if only the event's own process knows it."""
        self._marks.append(mark)
        self._names.append(name)

    def end_stretch(self) -> None:
        """Go on to the next.

        Raises:
            UsageError: if the process of the stretch has taken another way through it.
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
