"""Copies between host and GPU that run alongside the computation; plain copies on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class CopyLane:
    """A stream of copies in one direction, ordered against the computation's stream.

    On a device without streams a copy is made at once and every event is None.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(
        self, target: Tensor, source: Tensor, *, after: Iterable[torch.cuda.Event | None] = ()
    ) -> torch.cuda.Event | None:
        """Copy once all that was enqueued for computation so far is done; an event of the copy's end.

        Args:
            after: events of other lanes that the copy has to wait for too.
        """
        return self.run(lambda: target.copy_(source, non_blocking=True), after=after)

    def run(
        self, work: Callable[[], object], *, after: Iterable[torch.cuda.Event | None] = ()
    ) -> torch.cuda.Event | None:
        """Run ``work``, which enqueues copies or collectives, in the same order as :meth:`copy`."""
        if self._stream is None:
            work()
            return None
        self._stream.wait_event(torch.cuda.current_stream(self._device).record_event())
        for event in after:
            if event is not None:
                self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            work()
        done: torch.cuda.Event = self._stream.record_event()
        return done


def wait_for(event: torch.cuda.Event | None) -> None:
    """Make the computation that is enqueued from here on wait for a copy."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)
