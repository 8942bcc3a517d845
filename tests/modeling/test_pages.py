"""Pinned host memory: for as long as anything uses it, and no longer."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from cogtune.modeling.engine.host import HostArena
from cogtune.modeling.engine.machine_group import MachineGroup


class Runtime:
    """CUDA's runtime as far as pinning goes: the addresses that are registered now."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert flags == 1
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    fake = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    yield fake
    gc.collect()


def test_memory_stays_pinned_while_a_view_of_it_is_left(runtime: Runtime) -> None:
    arena = HostArena(pin=True)
    arena.reserve(2**20)
    taken = arena.take(4096)
    view = taken[1024:].view(torch.float32)
    assert runtime.registered == {taken.data_ptr(): 2**20}
    del arena, taken
    gc.collect()
    assert len(runtime.registered) == 1, "the arena is gone, but a view of its memory is in use"
    view.fill_(1.0)
    del view
    gc.collect()
    assert runtime.registered == {}


def test_shared_memory_stays_pinned_while_a_view_of_it_is_left(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cogtune.modeling.engine.machine_group._gather", lambda value: [value])
    view = HostArena(pin=True, group=MachineGroup(rank=0, size=1)).take(4096).view(torch.float32)
    gc.collect()
    assert len(runtime.registered) == 1
    del view
    gc.collect()
    assert runtime.registered == {}


def test_memory_that_cuda_refuses_to_pin_is_used_as_it_is(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "cudaHostRegister", lambda *_: 2)
    monkeypatch.setattr(runtime, "cudaGetErrorString", lambda status: f"status {status}", raising=False)
    told: list[str] = []
    arena = HostArena(pin=True, tell=told.append)
    assert arena.take(4096).numel() == 4096
    arena.reserve(2**20)
    assert [text.count("status 2") for text in told] == [1], "told once"
    del arena
    gc.collect()
    assert runtime.registered == {}


def test_announced_regions_are_pinned_ahead_and_in_order(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    cards: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", cards.append)
    sizes = [2**20, 2**21, 2**20, 2**22]
    arena = HostArena(pin=True)
    arena.reserve_ahead(sizes)
    taken = []
    for size in sizes:
        arena.reserve(size)
        taken.append(arena.take(size))
        taken[-1].fill_(1)
    assert [runtime.registered[one.data_ptr()] for one in taken] == sizes
    assert cards == [1] * len(sizes), "the thread pins for this process's GPU"
    assert arena.size == sum(sizes)
    arena.reserve(2**19)  # after those that were announced
    assert len(runtime.registered) == len(sizes) + 1


def test_a_region_that_the_system_does_not_give_is_an_error_where_it_is_reserved() -> None:
    arena = HostArena(pin=False)
    arena.reserve_ahead([2**20, 2**60])
    arena.reserve(2**20)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        arena.reserve(2**60)
