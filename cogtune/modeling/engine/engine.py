"""The memory engine: a transformer's blocks computed under an arrangement of weights and activations.

Each block's ``forward`` becomes the engine's, so that training, evaluation and sampling all pass through it. In a
forward pass with gradients the engine also learns, from an identity function on each block's outputs, when that
block's backward pass begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cogtune.config.arrangement import Arrangement, AttentionKernel, Keep
from cogtune.modeling.engine.activations import SMALLEST, OffloadedActivations
from cogtune.modeling.engine.attention import FLASH_4, FlashAttention4Processor, flash_attention_4, using
from cogtune.modeling.engine.block_weights import BlockWeights
from cogtune.modeling.engine.compute import BlockFunction, Rotary, block_function
from cogtune.modeling.engine.frozen_weights import FrozenWeights
from cogtune.modeling.engine.host import HostArena
from cogtune.modeling.engine.machine_group import MachineGroup
from cogtune.modeling.engine.stored_weights import round_weights
from cogtune.modeling.engine.streamed_parameters import StreamedParameters
from cogtune.models.variants import StoredPrecision


class _BackwardBegins(torch.autograd.Function):
    """The identity; calls a function at the beginning of the backward pass through it."""

    @staticmethod
    def forward(ctx: Any, begins: Callable[[], None], *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.begins = begins
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.begins()
        return (None, *gradients)


def blocks_of(transformer: torch.nn.Module) -> torch.nn.ModuleList:
    """Return the transformer's blocks."""
    blocks = transformer.transformer_blocks
    assert isinstance(blocks, torch.nn.ModuleList)  # as diffusers makes it
    return blocks


class Engine:
    """Runs the blocks of one transformer. Made by :func:`attach`."""

    def __init__(
        self,
        transformer: torch.nn.Module,
        arrangement: Arrangement,
        *,
        device: torch.device,
        kernel: AttentionKernel | None,
        backend: str | None,
        smallest: int,
        tell: Callable[[str], None],
        trained: StreamedParameters | None,
        group: MachineGroup | None,
        stored: StoredPrecision | None,
    ) -> None:
        self._transformer = transformer
        self._blocks = list(blocks_of(transformer))
        count = len(self._blocks)
        self.arrangement = arrangement
        self._kernel = kernel
        self._offloaded_blocks = min(arrangement.offloaded_blocks, count - arrangement.kept_whole)
        pin = device.type == "cuda"
        streamed = arrangement.streamed(count)
        self._place = {block: place for place, block in enumerate(streamed)}
        self._weights: BlockWeights | None = trained
        self._arenas = []
        if streamed and trained is None:
            arena = HostArena(pin=pin, tell=tell, group=group)
            self._arenas.append(arena)
            self._weights = FrozenWeights(
                [self._blocks[block] for block in streamed],
                slots=arrangement.slots,
                device=device,
                arena=arena,
                stored=stored,
            )
        if stored is not None:
            for number, block in enumerate(self._blocks):
                if number not in self._place:
                    round_weights(block, stored, device)
        self._activations: OffloadedActivations | None = None
        if self._offloaded_blocks:
            arena = HostArena(pin=pin, tell=tell)
            self._arenas.append(arena)
            lent = trained.lent if trained is not None else None
            self._activations = OffloadedActivations(device=device, arena=arena, lent=lent, smallest=smallest)
        keeps = {arrangement.keep_of(block, count) for block in range(count)}
        self._functions: dict[Keep, BlockFunction] = {keep: block_function(keep, backend=backend) for keep in keeps}
        self._inference = block_function("everything", backend=backend)

    @property
    def host_bytes(self) -> int:
        """Host memory of weights and activations."""
        return sum(arena.size for arena in self._arenas)

    def run(
        self,
        number: int,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary: Rotary | None,
        attention_kwargs: dict[str, Any] | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the forward pass of block ``number``."""
        # Slices of one tensor in the first block of a batch; contiguous, they are copied as they are.
        hidden, encoder = hidden_states.contiguous(), encoder_hidden_states.contiguous()
        with_gradients = torch.is_grad_enabled()
        place = self._place.get(number)
        if self._weights is not None and place is not None:
            self._weights.need(place)
        if with_gradients:
            hidden, encoder = self._with_gradients(number, hidden, encoder, temb, rotary, attention_kwargs)
        else:
            with using(self._kernel):
                hidden, encoder = self._inference(self._blocks[number], hidden, encoder, temb, rotary, attention_kwargs)
        if self._weights is not None and place is not None:
            self._weights.after_forward(place, with_backward=with_gradients)
        return hidden, encoder

    def _with_gradients(
        self,
        number: int,
        hidden: Tensor,
        encoder: Tensor,
        temb: Tensor,
        rotary: Rotary | None,
        attention_kwargs: dict[str, Any] | None,
    ) -> tuple[Tensor, Tensor]:
        count = len(self._blocks)
        offloading: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self._activations is not None:
            if number == 0:
                self._activations.begin([*self._transformer.parameters(), temb, *(rotary or ())])
            if number < self._offloaded_blocks:
                offloading = self._activations.offloading(number)
            if number == self._offloaded_blocks:
                self._activations.end_forward()
        run = self._functions[self.arrangement.keep_of(number, count)]
        with using(self._kernel), offloading:
            hidden, encoder = run(self._blocks[number], hidden, encoder, temb, rotary, attention_kwargs)
        if number == count - 1 and self._activations is not None:
            self._activations.end_forward()
        mark: Any = _BackwardBegins.apply
        hidden, encoder = mark(lambda: self._begin_backward(number), hidden, encoder)
        return hidden, encoder

    def _begin_backward(self, number: int) -> None:
        """Prepare for the backward pass of ``number``, now that the one after it is enqueued."""
        if number + 1 < len(self._blocks):
            self._end_backward(number + 1)
        if self._activations is not None:
            self._activations.fetch(number)
            self._activations.fetch(number - 1)
        place = self._place.get(number)
        if self._weights is not None and place is not None:
            self._weights.need(place)
        if number == 0:
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end_backward(0))

    def _end_backward(self, number: int) -> None:
        if self._activations is not None:
            self._activations.release(number)
        place = self._place.get(number)
        if self._weights is not None and place is not None:
            self._weights.after_backward(place)


def attach(
    transformer: torch.nn.Module,
    arrangement: Arrangement,
    *,
    device: torch.device,
    kernel: AttentionKernel | None = None,
    backend: str | None = None,
    smallest: int = SMALLEST,
    tell: Callable[[str], None] = lambda _: None,
    trained: StreamedParameters | None = None,
    group: MachineGroup | None = None,
    stored: StoredPrecision | None = None,
) -> Engine:
    """Put an engine between a CogVideoX transformer and its blocks.

    Streamed weights leave ``transformer`` for host memory at once; all else is moved to ``device`` by whoever prepares
    the model. Frozen weights that are streamed must not be read or saved from the module afterwards.

    Args:
        transformer: with its adapter in place, so that it is known which parameters are trained.
        kernel: of attention; None for PyTorch's own choice.
        backend: of ``torch.compile`` for the blocks; None to run them eagerly.
        smallest: bytes from which on a saved tensor is moved to the host.
        tell: told what the user should know, such as that the system does not give pinned memory.
        trained: the weights of all blocks, where they are trained; the arrangement streams every block then.
        group: processes that keep one copy of streamed frozen weights together; each calls this at the same time.
        stored: format in which the host holds the frozen weights of linear layers. Those of blocks that stay on the
            GPU are rounded to it, so that the arrangement changes no result.
    """
    if kernel == FLASH_4:
        transformer.set_attn_processor(FlashAttention4Processor(flash_attention_4()))  # type: ignore[operator]
    engine = Engine(
        transformer,
        arrangement,
        device=device,
        kernel=kernel,
        backend=backend,
        smallest=smallest,
        tell=tell,
        trained=trained,
        group=group,
        stored=stored,
    )
    if trained is not None:
        transformer.register_forward_pre_hook(lambda _module, _inputs: trained.begin())

    def forward_of(number: int) -> Callable[..., tuple[Tensor, Tensor]]:
        def forward(
            hidden_states: Tensor,
            encoder_hidden_states: Tensor,
            temb: Tensor,
            image_rotary_emb: Rotary | None = None,
            attention_kwargs: dict[str, Any] | None = None,
        ) -> tuple[Tensor, Tensor]:
            return engine.run(number, hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs)

        return forward

    transformer.gradient_checkpointing = False  # type: ignore[assignment]
    for number, block in enumerate(blocks_of(transformer)):
        block.forward = forward_of(number)
    return engine
