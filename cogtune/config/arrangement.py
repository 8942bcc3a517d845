"""An arrangement of the memory engine: where weights and activations are kept, and what is recomputed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Keep = Literal["inputs", "attention", "matmuls", "everything"]
"""What a block keeps for its backward pass, from the least memory to the least time.

Its inputs alone; the outputs of attention too; those of matrix products too; or all that its backward pass reads.
"""

AttentionKernel = Literal["cudnn", "flash", "efficient", "flash-attn-4"]
"""PyTorch's three fused kernels, and that of the package flash-attn-4."""

KEEPS: tuple[Keep, ...] = get_args(Keep)
SLOTS = 2
"""Places on the GPU that streamed blocks take turns in."""


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """Where the weights and activations of a transformer's blocks are, and what of them is recomputed."""

    streamed_blocks: int = 0
    """Blocks whose frozen weights stay in host memory and are copied to the GPU when they are needed."""
    slots: int = SLOTS
    keep: Keep = "attention"
    """What each block keeps for its backward pass."""
    kept_whole: int = 0
    """The last blocks, which keep everything on the GPU in place of that."""
    offloaded_blocks: int = 0
    """The first blocks, which keep it in host memory."""
    attention: AttentionKernel | None = None
    """The attention kernel; None for PyTorch's own choice."""

    def keep_of(self, block: int, blocks: int) -> Keep:
        """Return what block number ``block`` of ``blocks`` keeps."""
        return "everything" if block >= blocks - self.kept_whole else self.keep

    def streamed(self, blocks: int) -> tuple[int, ...]:
        """Return the numbers of the streamed blocks: spread evenly, so that copies have the most time."""
        count = min(self.streamed_blocks, blocks)
        return tuple((2 * number + 1) * blocks // (2 * count) for number in range(count))

    def describe(self, blocks: int) -> str:
        """Return the arrangement as a short text, such as ``weights of 42 of 42 blocks on the host; ...``."""
        kept = {
            "inputs": "block inputs kept",
            "attention": "attention outputs kept",
            "matmuls": "attention and matrix product outputs kept",
            "everything": "all activations kept",
        }[self.keep]
        streamed = f"weights of {self.streamed_blocks} of {blocks} blocks streamed from the host"
        offloaded = f", those of {self.offloaded_blocks} blocks on the host"
        parts = [
            streamed if self.streamed_blocks else "all weights on the GPU",
            kept + (offloaded if self.offloaded_blocks else ""),
        ]
        if self.kept_whole:
            parts.append(f"nothing recomputed in the last {self.kept_whole}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Arrangement:
        """Return the arrangement of :meth:`to_dict`'s values."""
        return cls(**value)


@dataclass(frozen=True, kw_only=True)
class SamplingArrangement:
    """What of sampling is done in less memory: all on the GPU, at once and in one piece by default."""

    streamed_blocks: int = 0
    """Blocks of the transformer whose weights stay in host memory and are copied to the GPU when they are needed."""
    slots: int = SLOTS
    split_guidance: bool = False
    """Whether guidance's two samples go through the transformer one by one."""
    vae_tiles: bool = False
    """Whether the VAE works in overlapping tiles."""

    @property
    def of_transformer(self) -> Arrangement:
        """The same for the memory engine."""
        return Arrangement(streamed_blocks=self.streamed_blocks, slots=self.slots, keep="everything")

    def describe(self, blocks: int) -> str:
        """Return the arrangement as a short text, such as ``weights of 42 of 42 blocks streamed from the host``."""
        parts = []
        if self.streamed_blocks:
            parts.append(f"weights of {self.streamed_blocks} of {blocks} blocks streamed from the host")
        if self.split_guidance:
            parts.append("guidance's two samples one by one")
        if self.vae_tiles:
            parts.append("the VAE in tiles")
        return ", ".join(parts) or "all on the GPU"
