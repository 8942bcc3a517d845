"""A block's computation: which intermediate results are kept for the backward pass, and compilation around that.

The choice is made inside the compiled region. Checkpointing outside of it would compute attention again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cogtune.config.arrangement import Keep
from cogtune.modeling.engine.attention import ATTENTION_OPS

Rotary = tuple[Tensor, Tensor]
BlockFunction = Callable[
    [torch.nn.Module, Tensor, Tensor, Tensor, Rotary | None, dict[str, Any] | None], tuple[Tensor, Tensor]
]
"""A block's forward pass: block, hidden states, encoder hidden states, time embedding, rotary, attention kwargs."""

_diffusers_forward = CogVideoXBlock.forward
"""By itself: diffusers has dynamo leave the class as it is, so that it would not trace a method asked of the class."""

_MATMULS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default})


def forward(
    block: torch.nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary: Rotary | None,
    attention_kwargs: dict[str, Any] | None,
) -> tuple[Tensor, Tensor]:
    """Return the forward pass that diffusers defines for a block, whatever the instance's own ``forward`` is."""
    hidden, encoder = _diffusers_forward(
        block,
        hidden_states=hidden_states,
        encoder_hidden_states=encoder_hidden_states,
        temb=temb,
        image_rotary_emb=rotary,
        attention_kwargs=attention_kwargs,
    )
    return hidden, encoder


def _saving(ops: frozenset[Any], _context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in ops else CheckpointPolicy.PREFER_RECOMPUTE


def _recomputing(kept: frozenset[Any]) -> BlockFunction:
    """Return the forward pass with the outputs of the operators ``kept`` for the backward pass, and the rest
    recomputed."""
    more: dict[str, Any] = {}
    if kept:
        more["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_saving, kept))

    def run(
        block: torch.nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary: Rotary | None,
        attention_kwargs: dict[str, Any] | None,
    ) -> tuple[Tensor, Tensor]:
        hidden, encoder = checkpoint(
            forward,
            block,
            hidden_states,
            encoder_hidden_states,
            temb,
            rotary,
            attention_kwargs,
            use_reentrant=False,
            **more,
        )
        return hidden, encoder

    return run


def block_function(keep: Keep, *, backend: str | None) -> BlockFunction:
    """Return a block's forward pass that keeps no more than ``keep`` for the backward pass.

    Args:
        backend: of ``torch.compile``; None for no compilation.
    """
    kept = {
        "inputs": frozenset[Any](),
        "attention": frozenset(ATTENTION_OPS),
        "matmuls": frozenset(ATTENTION_OPS) | _MATMULS,
    }
    run = forward if keep == "everything" else _recomputing(kept[keep])
    if backend is None:
        return run
    compiled: BlockFunction = torch.compile(run, fullgraph=True, dynamic=False, backend=backend)
    return compiled
