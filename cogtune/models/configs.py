"""What the config files of a diffusers checkpoint may hold, by component.

The limits are far beyond every published CogVideoX model. They keep a config from making a library build millions of
modules, or a table of positions that fills the memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from cogtune.system.reading import Schema, abridged, problems_in, read_object, refuse

_Depth = Annotated[int, Field(ge=1, le=256)]
_Width = Annotated[int, Field(ge=1, le=65_536)]
_Side = Annotated[int, Field(ge=1, le=4096)]
_Step = Annotated[int, Field(ge=1, le=64)]
_Number = Annotated[float, Field(ge=-1e6, le=1e6)]
_Positive = Annotated[float, Field(gt=0, le=1e6)]

_MOST_POSITIONS = 2**27
"""Numbers in a transformer's table of positions; the largest published one has 54 million."""


class TransformerConfig(Schema):
    """``transformer/config.json``."""

    num_layers: _Depth
    num_attention_heads: Annotated[int, Field(ge=1, le=1024)]
    attention_head_dim: Annotated[int, Field(ge=1, le=1024)]
    in_channels: Annotated[int, Field(ge=1, le=1024)]
    out_channels: Annotated[int, Field(ge=1, le=1024)]
    patch_size: _Step
    patch_size_t: _Step | None = None
    text_embed_dim: _Width
    max_text_seq_length: _Side
    sample_height: _Side
    sample_width: _Side
    sample_frames: _Side
    use_rotary_positional_embeddings: bool
    use_learned_positional_embeddings: bool = False
    ofs_embed_dim: _Width | None = None
    time_embed_dim: _Width = 512
    temporal_compression_ratio: _Step = 4
    spatial_interpolation_scale: _Positive = 1.0
    temporal_interpolation_scale: _Positive = 1.0
    activation_fn: str = "gelu-approximate"
    timestep_activation_fn: str = "silu"
    attention_bias: bool = True
    patch_bias: bool = True
    norm_elementwise_affine: bool = True
    flip_sin_to_cos: bool = True
    freq_shift: _Number = 0
    norm_eps: _Number = 1e-5
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _positions_fit(self) -> TransformerConfig:
        if not self.use_rotary_positional_embeddings or self.use_learned_positional_embeddings:
            rows, columns = self.sample_height // self.patch_size, self.sample_width // self.patch_size
            frames = (self.sample_frames - 1) // self.temporal_compression_ratio + 1
            tokens = rows * columns * frames + self.max_text_seq_length
            if tokens * self.num_attention_heads * self.attention_head_dim > _MOST_POSITIONS:
                raise ValueError("the table of positions is too large")
        return self


class VAEConfig(Schema):
    """``vae/config.json``."""

    scaling_factor: _Positive
    invert_scale_latents: bool = False
    block_out_channels: Annotated[list[_Width], Field(min_length=1, max_length=16)] = Field(
        default_factory=lambda: [128]
    )
    down_block_types: Annotated[list[str], Field(min_length=1, max_length=16)] = Field(default_factory=lambda: [""])
    up_block_types: Annotated[list[str], Field(min_length=1, max_length=16)] = Field(default_factory=lambda: [""])
    layers_per_block: _Step = 3
    latent_channels: Annotated[int, Field(ge=1, le=1024)] = 16
    in_channels: _Step = 3
    out_channels: _Step = 3
    norm_num_groups: _Width = 32
    norm_eps: _Number = 1e-6
    act_fn: str = "silu"
    sample_height: Annotated[int, Field(ge=8, le=65_536)] = 480
    sample_width: Annotated[int, Field(ge=8, le=65_536)] = 720
    temporal_compression_ratio: Annotated[float, Field(ge=1, le=64)] = 4
    shift_factor: _Number | None = None
    latents_mean: Annotated[list[_Number], Field(max_length=1024)] | None = None
    latents_std: Annotated[list[_Number], Field(max_length=1024)] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False


class SchedulerConfig(Schema):
    """``scheduler/scheduler_config.json``."""

    num_train_timesteps: Annotated[int, Field(ge=1, le=100_000)]
    snr_shift_scale: _Positive
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.00085
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.012
    beta_schedule: str = "scaled_linear"
    trained_betas: Annotated[list[_Number], Field(max_length=100_000)] | None = None
    clip_sample: bool = True
    clip_sample_range: _Number = 1.0
    sample_max_value: _Number = 1.0
    set_alpha_to_one: bool = True
    steps_offset: Annotated[int, Field(ge=0, le=100_000)] = 0
    prediction_type: str = "v_prediction"
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False


class TextEncoderConfig(Schema):
    """``text_encoder/config.json``, of a T5 encoder."""

    d_model: _Width = 512
    d_ff: _Width = 10_240
    d_kv: _Width = 64
    num_layers: _Depth = 6
    num_decoder_layers: _Depth | None = None
    num_heads: Annotated[int, Field(ge=1, le=1024)] = 64
    vocab_size: Annotated[int, Field(ge=1, le=1_048_576)] = 32_128
    relative_attention_num_buckets: _Side = 32
    relative_attention_max_distance: Annotated[int, Field(ge=1, le=1_048_576)] = 128
    dropout_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    layer_norm_epsilon: _Number = 1e-6
    feed_forward_proj: str = "gated-gelu"


class TokenizerConfig(Schema):
    """``tokenizer/tokenizer_config.json``."""

    tokenizer_class: str | None = None
    extra_ids: Annotated[int, Field(ge=0, le=65_536)] = 100
    added_tokens_decoder: dict[str, dict[str, Any]] = Field(default_factory=dict)


COMPONENTS: dict[str, tuple[str, str]] = {
    "transformer": ("diffusers", "config.json"),
    "vae": ("diffusers", "config.json"),
    "scheduler": ("diffusers", "scheduler_config.json"),
    "text_encoder": ("transformers", "config.json"),
    "tokenizer": ("transformers", "tokenizer_config.json"),
}
"""The components of a CogVideoX pipeline: the library that loads each, and the name of its config."""


class Configs:
    """The checked configs of the checkpoint in ``folder``.

    Raises:
        CogtuneError: a file is missing or damaged, or with every key of all of them whose value is wrong.
    """

    def __init__(self, folder: Path) -> None:
        problems: list[str] = []

        def checked(component: str, schema: type[Schema], *, needed: bool = True) -> dict[str, Any]:
            path = folder / component / COMPONENTS[component][1]
            if not needed and not path.exists():
                return {}
            value = read_object(path)
            problems.extend(f"{path}: {problem}" for problem in problems_in(value, schema))
            return value

        transformer = checked("transformer", TransformerConfig)
        vae = checked("vae", VAEConfig)
        scheduler = checked("scheduler", SchedulerConfig)
        checked("text_encoder", TextEncoderConfig, needed=False)
        checked("tokenizer", TokenizerConfig, needed=False)
        refuse(problems, "download the checkpoint again, or restore the file")
        self.transformer = TransformerConfig.model_validate(transformer)
        self.vae = VAEConfig.model_validate(vae)
        self.scheduler = SchedulerConfig.model_validate(scheduler)


def read_index(path: Path) -> tuple[str, tuple[str, ...]]:
    """Return the pipeline's class and its components by a ``model_index.json``; those that it says it has not are
    left out.

    A component is a folder beside the file, and a class of diffusers or transformers: diffusers would import any
    module that the file names.

    Raises:
        CogtuneError: the file is damaged, or names a component that a CogVideoX pipeline has not.
    """
    index = read_object(path)
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        pipeline = ""
    problems, found = [], []
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue
        if name not in COMPONENTS:
            problems.append(f"{path}: {abridged(name)} is not a component of a CogVideoX pipeline")
        elif value == [None, None]:
            continue
        elif len(value) != 2 or value[0] != COMPONENTS[name][0] or not isinstance(value[1], str):
            problems.append(f"{path}: {name}: {abridged(value)} is not a class of {COMPONENTS[name][0]}")
        else:
            found.append(name)
    if pipeline.startswith("CogVideoX"):
        refuse(problems, f"a CogVideoX pipeline has the components {', '.join(COMPONENTS)}")
    return pipeline, tuple(found)
