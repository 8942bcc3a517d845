"""The memory engine: frozen weights streamed through the GPU, activations kept or moved, blocks compiled."""

from cogtune.modeling.engine.engine import Engine, attach

__all__ = ["Engine", "attach"]
