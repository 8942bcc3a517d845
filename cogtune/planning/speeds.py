"""How fast GPUs are, and how long a step takes."""

from __future__ import annotations

from cogtune.config.run_config import RunConfig
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.models.geometry import video_tokens
from cogtune.models.layers import transformer_parameters
from cogtune.planning.arrangements import Speed
from cogtune.run.plan import size_of


def tokens_of(config: RunConfig, spec: ModelSpec) -> int:
    video = video_tokens(size_of(config, spec), spec.patch_size, spec.patch_size_t)
    return config.batch_size * (video + spec.max_text_seq_length)


def flops_of_step(config: RunConfig, spec: ModelSpec) -> tuple[float, float]:
    """Return operations of one optimizer step: of the linear layers, and of attention."""
    tokens = tokens_of(config, spec)
    width = spec.num_attention_heads * spec.attention_head_dim
    forward_again = 1 if config.gradient_checkpointing else 0
    backward = 1 if config.type == "lora" else 2  # a frozen weight has no gradient to be computed
    passes = config.gradient_accumulation_steps
    linear = 2.0 * transformer_parameters(spec) * tokens * (1 + forward_again + backward)
    square = 4.0 * tokens * (tokens / config.batch_size) * width * spec.num_layers * (1 + forward_again + 2.5)
    return passes * linear, passes * square


def _card(peak_tflops: float, terabytes: float, link: float = 24.0) -> Speed:
    """Return a GPU by its vendor's dense bf16 peak, of which products reach 0.80 and attention 0.42 on an H200.

    Args:
        terabytes: that its memory moves in a second.
        link: GB that its link to the host moves in a second, one way; 24 for PCIe 4.
    """
    return Speed(
        products=0.80e12 * peak_tflops, attention=0.42e12 * peak_tflops, memory=1e12 * terabytes, link=1e9 * link
    )


SPEEDS = {
    "H200": _card(989, 4.8, 54.9),
    "H100": _card(0.97 * 989, 3.35, 54.9),  # the part of an H200 that was measured
    "A100": _card(312, 2.0),
    "L40S": _card(362, 0.86),
    "5090": _card(210, 1.79, 50.0),
    "4090": _card(165, 1.01),
    "4080": _card(97, 0.72),
}
"""GPUs whose time is estimated: H200 and H100 were measured, the others follow from their vendors' figures."""


_TRAFFIC_EAGER, _TRAFFIC_COMPILED = 2200.0, 500.0
"""Bytes that a block moves for each number of its input, beside products and attention."""


_OFFLOAD_SECONDS = {"zero2-offload": 0.53e-9, "zero3-offload": 0.72e-9}
"""Of the optimizer on the host, for each trained number, by however many processes: the host's memory bounds it."""


_UNPINNED = 2.0
"""Times as long without pinned buffers, of 5b under ZeRO-2 on an H100; ZeRO-3 without them was not measured."""


def speed_of(gpu: str) -> Speed | None:
    return next((speed for name, speed in SPEEDS.items() if name in gpu), None)


def seconds_of_step(config: RunConfig, spec: ModelSpec, gpu: str) -> float | None:
    speed = speed_of(gpu)
    if speed is None or config.precision == "fp32":
        return None
    linear, square = flops_of_step(config, spec)
    numbers = tokens_of(config, spec) * spec.num_attention_heads * spec.attention_head_dim * spec.num_layers
    traffic = _TRAFFIC_COMPILED if config.compiles_blocks() else _TRAFFIC_EAGER
    seconds = linear / speed.products + square / speed.attention
    seconds += config.gradient_accumulation_steps * numbers * traffic / speed.memory
    on_the_host = _OFFLOAD_SECONDS.get(config.strategy, 0.0) * (1 if config.pin_memory else _UNPINNED)
    return seconds + on_the_host * transformer_parameters(spec) / config.num_machines
