"""Parameters trained from host memory: they pass through the GPU block by block, with gradients and optimizer state.

A block's gradients leave for host memory when its backward pass is done. The optimizer's step on them is taken in the
next forward pass: state and gradients of block i+1 come up while block i is computed, new weights and state go down
behind it. The norm that gradients are clipped to is that of all of them, so it is known before the first step is taken.

With several processes each has a shard of every block on the host: gradients are reduced to it, its weights are
updated, and a block is gathered from all shards when it is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from cogtune.modeling.engine.block_weights import BlockWeights, parameters_by_block
from cogtune.modeling.engine.copies import CopyLane, wait_for
from cogtune.modeling.engine.flat_adam import AVERAGE, FlatAdam, Step
from cogtune.modeling.engine.flat_buffer import FlatBufferSpec, Piece
from cogtune.modeling.engine.host import HostArena, LentMemory, aligned
from cogtune.modeling.engine.shard_group import ShardGroup

_STATES = 2
"""Places on the GPU for a part's state, and for its gradients."""

Event = torch.cuda.Event | None


@dataclass
class Part:
    """Weights that are updated together: those of a block, or those outside of all blocks."""

    names: list[str]
    parameters: list[torch.nn.Parameter]
    spec: FlatBufferSpec
    pieces: list[Piece]
    """Of this process's shard."""
    weights: Tensor
    """This process's shard on the host, as the model computes with it."""
    state: dict[str, Tensor]
    gradient: Tensor
    norms: dict[int, Tensor] = field(default_factory=dict)
    """Of the last gradients, by parameter."""
    down: Event = None
    """The end of the last copy of weights and state to the host."""
    gradient_down: Event = None


@dataclass
class _Slot:
    """A place on the GPU for the weights of one block at a time."""

    memory: Tensor
    held: int | None = None
    loaded: Event = None
    down: Event = None


@dataclass
class _StateSlot:
    """A place on the GPU for the state and gradient of one part at a time."""

    memory: dict[str, Tensor]
    held: int | None = None
    loaded: Event = None
    free: Event = None


class StreamedParameters(BlockWeights):
    """All parameters of a transformer, trained from host memory.

    The last part holds the weights outside of all blocks; it stays on the GPU, and its state does not.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        blocks: Sequence[torch.nn.Module],
        optimizer: FlatAdam,
        *,
        slots: int,
        device: torch.device,
        arena: HostArena,
        accumulates: bool = False,
        group: ShardGroup | None = None,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Move all parameters to the host, and load what is needed first.

        Args:
            transformer: with its parameters' first values, in any type.
            accumulates: whether gradients of several passes are added up, in fp32.
            progress: called when a part is on the host.
        """
        super().__init__(len(blocks), slots)
        self.optimizer = optimizer
        self._device = device
        self._group = group or ShardGroup()
        self._up, self._down = CopyLane(device), CopyLane(device)
        self._accumulates = accumulates
        self._in_fp32 = accumulates or self._group.size > 1
        self.learning_rate = 0.0
        """Of the next step."""
        self._passes = 0
        self._steps = 0
        self._step: Step | None = None
        self._pending: set[int] = set()
        self._averaged = False
        members = parameters_by_block(transformer, blocks)
        self._order = [name for name, _ in transformer.named_parameters()]
        self.parts: list[Part] = []
        specs = [FlatBufferSpec([p.shape for p in part.values()], self._group.size) for part in members]
        largest = max(spec.size for spec in specs[: self._count])
        self._slots = [_Slot(self._empty(largest, optimizer.weight_dtype)) for _ in range(self._turns)]
        self._rest = _Slot(self._empty(specs[-1].size, optimizer.weight_dtype), held=self._count)
        gradients = torch.float32 if self._in_fp32 else optimizer.weight_dtype
        ends = list(accumulate(spec.shard_size for spec in specs))
        of_gradients = aligned(ends[-1] * gradients.itemsize)
        arena.reserve_ahead([of_gradients, *(self._host_bytes(spec) for spec in specs)])
        arena.reserve(of_gradients)
        self._gradients = arena.take(ends[-1] * gradients.itemsize).view(gradients)
        self.lent = self._lent(ends[: self._count])
        """Host memory of gradients that each block's activations may use from its update to its next backward pass."""
        for number, (own, spec) in enumerate(zip(members, specs, strict=True)):
            room = self._gradients[ends[number] - spec.shard_size : ends[number]]
            self.parts.append(self._moved(own, spec, self._slot(number).memory, room, arena))
            progress()
        widest = max(spec.shard_size for spec in specs)
        spare = {name: self._empty(size, dtype) for name, (dtype, size) in optimizer.state_of(widest).items()}
        self._states = [_StateSlot(spare)]
        for _ in range(_STATES - 1):
            self._states.append(_StateSlot({name: torch.empty_like(one) for name, one in spare.items()}))
        for slot in self._states:
            slot.memory["gradient"] = self._empty(widest, gradients)
        self._staging = [self._empty(max(spec.size for spec in specs), gradients) for _ in range(_STATES)]
        self._staged: list[Event] = [None] * _STATES
        self._leaving: list[Tensor | None] = [None] * _STATES
        """What is being copied of it, which must not be freed before."""
        self._reload()

    @property
    def steps(self) -> int:
        """The optimizer's steps so far."""
        return self._steps

    def begin(self) -> None:
        """Update the weights outside of the blocks, if a step is pending; called before each forward pass."""
        if self._count in self._pending:
            self._update(self._count)

    def need(self, number: int) -> None:
        """Ensure that the weights of block ``number`` are in their slot before the next computation."""
        if number in self._pending:
            self._update(number)
            return
        self._load(number)
        wait_for(self._slot(number).loaded)

    def after_backward(self, number: int) -> None:
        """Send the gradients of block ``number`` away, now that its backward pass is enqueued, and fetch the next."""
        self._collect(number)
        super().after_backward(number)
        if number == 0:
            self._collect(self._count)
            self._passes += 1

    def step(self, max_norm: float) -> float:
        """Begin a step with the collected gradients and return their norm; weights are updated when they are needed.

        Gradients are clipped to ``max_norm`` as ``torch.nn.utils.clip_grad_norm_`` does it. Collective.
        """
        total = self._norm()
        self._steps += 1
        self._step = Step(self._steps, self.learning_rate, (max_norm / (total + 1e-6)).clamp(max=1.0))
        self._pending = set(range(self._count + 1))
        self._passes = 0
        for slot in self._states:
            slot.held = None
        return float(total)

    def settle(self) -> None:
        """Finish a pending step, so that host memory holds all weights and state. Collective."""
        for number in (self._count, *range(self._count)):
            if number in self._pending:
                self._update(number)
        self._load_first()
        self._synchronize()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model compute with the moving average of its weights inside the context. Collective."""
        self.settle()
        self._averaged = True
        self._reload()
        try:
            yield
        finally:
            self._averaged = False
            self._reload()

    def whole(self, number: int, *, averaged: bool = False) -> dict[str, Tensor]:
        """Return the weights of a part by name, on the host, in the model's type. Collective.

        With one process they are the buffers that training continues with, not copies (except for the average).
        """
        part = self.parts[number]
        own = part.state[AVERAGE].to(self.optimizer.weight_dtype) if averaged else part.weights
        if self._group.size > 1:
            flat = self._empty(part.spec.size, self.optimizer.weight_dtype)
            part.spec.own(flat, self._group.rank).copy_(own)
            self._group.all_gather(flat)
            own = flat.cpu()
        return dict(zip(part.names, part.spec.views(own), strict=True))

    def take(self, number: int, values: Mapping[str, Tensor]) -> None:
        """Restore the weights of a part, by name, as returned by :meth:`whole`."""
        part = self.parts[number]
        for piece in part.pieces:
            value = values[part.names[piece.parameter]].reshape(-1)
            first = self._first_of(part, piece)
            part.weights[piece.place] = value[first : first + piece.size]

    def resume(self, steps: int) -> None:
        """Continue from restored weights and state, after ``steps`` steps."""
        self._steps, self._passes, self._pending = steps, 0, set()
        self._reload()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _empty(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self._device)

    def _slot(self, number: int) -> _Slot:
        return self._rest if number == self._count else self._slots[number % len(self._slots)]

    def _first_of(self, part: Part, piece: Piece) -> int:
        """Return the offset in its parameter at which a piece begins."""
        return part.spec.first(piece, self._group.rank)

    def _lent(self, ends: Sequence[int]) -> LentMemory | None:
        """Return the blocks' gradients as memory for other uses; not if they are added up over several passes.

        Args:
            ends: of each block's gradients among all, in numbers.
        """
        if self._accumulates:
            return None
        size = self._gradients.element_size()
        return LentMemory(self._gradients.view(torch.uint8), tuple(end * size for end in ends))

    def _wanted(self, spec: FlatBufferSpec) -> dict[str, tuple[torch.dtype, int]]:
        """Return type and length of what a part has on the host, its gradient aside."""
        own = spec.shard_size
        return {"weights": (self.optimizer.weight_dtype, own), **self.optimizer.state_of(own)}

    def _host_bytes(self, spec: FlatBufferSpec) -> int:
        return sum(aligned(size * dtype.itemsize) for dtype, size in self._wanted(spec).values())

    def _moved(
        self,
        own: Mapping[str, torch.nn.Parameter],
        spec: FlatBufferSpec,
        memory: Tensor,
        gradient: Tensor,
        arena: HostArena,
    ) -> Part:
        """Move a part to the host; its parameters become views of ``memory``."""
        arena.reserve(self._host_bytes(spec))  # of zeros
        host = {
            name: arena.take(size * dtype.itemsize).view(dtype) for name, (dtype, size) in self._wanted(spec).items()
        }
        weights = host.pop("weights")
        names, parameters = list(own), list(own.values())
        part = Part(names, parameters, spec, spec.pieces(self._group.rank), weights, host, gradient)
        for piece in part.pieces:
            first = self._first_of(part, piece)
            values = parameters[piece.parameter].detach().reshape(-1)[first : first + piece.size]
            self.optimizer.begin(weights, host, values.to("cpu", torch.float32), piece.place)
        for parameter, view in zip(parameters, spec.views(memory), strict=True):
            parameter.data = view
        return part

    def _reload(self) -> None:
        """Load what is needed first, whatever the GPU holds."""
        self._synchronize()
        for slot in self._slots:
            slot.held = None
        self._rest.held = None
        self._load(self._count)
        wait_for(self._rest.loaded)
        self._load_first()

    def _load(self, number: int) -> None:
        """Start to load the weights of a part into their slot, unless a pending step is about to write them."""
        slot, part = self._slot(number), self.parts[number]
        if slot.held == number or (number in self._pending and not self.optimizer.reads_weights):
            return
        whole = slot.memory[: part.spec.size]
        own = part.spec.own(whole, self._group.rank)

        def bring() -> None:
            if self._averaged:
                average = self._states[0].memory[AVERAGE][: part.spec.shard_size]
                own.copy_(average.copy_(part.state[AVERAGE], non_blocking=True))
            else:
                own.copy_(part.weights, non_blocking=True)
            if number not in self._pending:
                self._group.all_gather(whole)

        slot.held = number
        slot.loaded = self._up.run(bring, after=(slot.down, part.down))

    def _bring_state(self, number: int) -> _StateSlot:
        """Start to load the state and gradient of a part."""
        slot, part = self._states[number % _STATES], self.parts[number]
        if slot.held == number:
            return slot

        def bring() -> None:
            for name, host in {**part.state, "gradient": part.gradient}.items():
                slot.memory[name][: host.numel()].copy_(host, non_blocking=True)

        slot.held = number
        slot.loaded = self._up.run(bring, after=(slot.free, part.down, part.gradient_down))
        return slot

    def _update(self, number: int) -> None:
        """Make the pending step on a part, whose slot then holds the new weights."""
        assert self._step is not None  # or nothing is pending
        slot, part = self._slot(number), self.parts[number]
        self._load(number)
        state = self._bring_state(number)
        following = (number + 1) % (self._count + 1)
        if following in self._pending and following % _STATES != number % _STATES:
            self._bring_state(following)
        for event in (slot.loaded, slot.down, state.loaded):
            wait_for(event)
        whole = slot.memory[: part.spec.size]
        own = part.spec.own(whole, self._group.rank)
        here = {name: state.memory[name][: host.numel()] for name, host in part.state.items()}
        with torch.no_grad():
            self.optimizer.step(
                own,
                here,
                state.memory["gradient"][: part.spec.shard_size],
                part.pieces,
                self._step,
                part=number * self._group.size + self._group.rank,
            )

        def send() -> None:
            part.weights.copy_(own, non_blocking=True)
            for name, host in part.state.items():
                host.copy_(here[name], non_blocking=True)

        part.down = slot.down = state.free = self._down.run(send)
        self._group.all_gather(whole)
        slot.held, state.held = number, None
        self._pending.discard(number)

    def _collect(self, number: int) -> None:
        """Start to move a part's gradients to the host, added to those of earlier passes, and compute their norms."""
        part, place = self.parts[number], number % _STATES
        wait_for(self._staged[place])
        staging = self._staging[place][: part.spec.size]
        for view, parameter in zip(part.spec.views(staging), part.parameters, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad)
            parameter.grad = None
        self._leaving[place] = own = self._group.reduce_scatter(staging)
        if self._passes:
            # The state's room: no step is under way in a backward pass.
            before = self._states[place].memory["gradient"][: part.spec.shard_size]
            wait_for(self._up.copy(before, part.gradient, after=(part.gradient_down, self._states[place].free)))
            own.add_(before)
        part.norms = {piece.parameter: torch.linalg.vector_norm(own[piece.place].float()) for piece in part.pieces}
        part.gradient_down = self._staged[place] = self._down.copy(part.gradient, own)

    def _norm(self) -> Tensor:
        """Compute the norm of all gradients."""
        zero = torch.zeros((), device=self._device)
        norms = {name: part.norms.get(number, zero) for part in self.parts for number, name in enumerate(part.names)}
        by_parameter = torch.stack([norms[name] for name in self._order])
        if self._group.size > 1:
            return self._group.all_reduce(by_parameter.square()).sum().sqrt()
        norm: Tensor = torch.linalg.vector_norm(by_parameter)
        return norm
