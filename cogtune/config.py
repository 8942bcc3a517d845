"""What the user wants: the fields of a run, which are the command line's flags and the keys of ``run.yaml``."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from cogtune.arrangement import AttentionKernel, Keep
from cogtune.geometry import Reshape, Sampling, Size
from cogtune.models import Precision
from cogtune.presets import Strategy, TrainingType

DataFormat = Literal["lists", "csv", "tsv", "jsonl", "parquet", "beside", "datasets"]

Switch = Literal["auto", "on", "off"]
"""Of what is decided by the hardware unless the user knows better."""

OptimizerName = Literal["adamw", "adam", "prodigy", "came", "adamw-8bit", "adamw-offload"]

LrScheduler = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "piecewise_constant",
]

TimestepSampling = Literal["uniform", "logit-normal"]

Tracker = Literal["tensorboard", "wandb", "trackio"]

SEPARATOR = ":::"
"""Stands between several prompts, or images, in one line."""

USUAL_RATE = 1e-4
"""The learning rate where nobody says one."""


def _option(default: Any, panel: str, help_text: str, **limits: Any) -> Any:
    return Field(default, description=help_text, json_schema_extra={"panel": panel}, **limits)


_model = functools.partial(_option, panel="Model")
_data = functools.partial(_option, panel="Data")
_training = functools.partial(_option, panel="Training")
_lora = functools.partial(_option, panel="LoRA")
_optimizer = functools.partial(_option, panel="Optimizer")
_memory = functools.partial(_option, panel="Memory")
_saving = functools.partial(_option, panel="Saving and evaluation")
_launch = functools.partial(_option, panel="Launch")


_NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"


ENGINE_KEYS = (
    "vram",
    "stream_blocks",
    "keep_activations",
    "keep_everything",
    "offload_activations",
    "attention",
)
"""The options of the memory engine; a run that sets none of them does without."""

_UNITS = {"gb": 10**9, "gib": 2**30, "mb": 10**6, "mib": 2**20}


def bytes_of(text: str) -> int:
    """The bytes that an amount such as ``8GB`` means; 0 where it is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    return int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 (resolve() would follow links, which may be moved later)


def is_list_file(value: str) -> bool:
    """Whether prompts or images are given as the text file that lists them, rather than in a line."""
    return SEPARATOR not in value and value.lower().endswith(".txt")


def _anchored_list(value: str, *, of_files: bool) -> str:
    """The same with absolute paths."""
    if is_list_file(value):
        return str(_absolute(Path(value)))
    return SEPARATOR.join(str(_absolute(Path(part.strip()))) for part in value.split(SEPARATOR)) if of_files else value


class RunConfig(BaseModel):
    """Everything that decides a run. The command line's flags and the keys of ``run.yaml`` are these fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    model: str = _model(
        "5b",
        help_text="A variant (2b, 5b, 5b-i2v, 1.5-5b, 1.5-5b-i2v), a Hub id, a local folder, or tiny:VARIANT.",
    )
    precision: Precision = _model(
        "bf16", help_text="Number format of the frozen weights and the arithmetic; fp16 is for 2b only."
    )

    data: Path = _data(
        Path("data"), help_text="The folder of clips and captions, or user/name for a dataset on the Hub."
    )
    format: DataFormat | None = _data(
        None,
        help_text="How the data is laid out: lists of lines, a table, captions beside clips, or what the datasets "
        "library reads. [default: found out]",
    )
    caption_column: str | None = _data(
        None, help_text="The column of a table that holds captions. [default: found out]"
    )
    video_column: str | None = _data(
        None, help_text="The column of a table that holds the clips' paths. [default: found out]"
    )
    image_column: str | None = _data(
        None, help_text="The column of a table that holds the images' paths. [default: found out]"
    )
    allow_outside: bool = _data(False, help_text="Take clips and images that are not in the dataset's folder too.")
    quarantine: Path | None = _data(
        None, help_text="A file of samples to leave out, as `cogtune dataset validate --quarantine` writes it."
    )
    cache_dir: Path | None = _data(
        None, help_text="Where encoded clips and captions are kept. [default: DATA/.cogtune]"
    )
    workers: int | None = _data(
        None,
        ge=0,
        help_text="Processes that decode clips for each encoder; 0 for none of their own. [default: from the cores]",
    )
    vae_tiling: Switch = _data(
        "auto", help_text="Encode clips in tiles: less memory, more time; auto where a whole one does not fit."
    )
    vae_compile: Switch = _data(
        "auto", help_text="Compile the VAE's encoder; auto on a GPU with more clips than the compile costs."
    )
    size: str | None = _data(
        None, help_text="Frames x height x width to train at, such as 49x480x720. [default: the model's own]"
    )
    fps: float | None = _data(
        None, gt=0, help_text="Frames per second taken from each clip. [default: the model's own]"
    )
    frames: int | None = _data(
        None, ge=1, help_text="Number of frames, when it alone is to differ from the size. [default: the size's]"
    )
    buckets: tuple[str, ...] = _data(
        (),
        help_text="Several sizes in place of one, such as 49x480x720,49x480x848: each clip is trained at the one that "
        "loses least of it. [default: none]",
    )
    sampling: Sampling = _data(
        "head",
        help_text="Which frames: at the rate from the first on (head) or from a drawn one (random-start), or spread "
        "evenly over the whole clip at whatever rate follows (uniform).",
    )
    skip_start: int = _data(0, ge=0, help_text="Frames skipped at the start of each clip.")
    skip_end: int = _data(0, ge=0, help_text="Frames skipped at the end of each clip.")
    reshape: Reshape = _data(
        "center",
        help_text="How frames get the size's shape: cut out their middle or a part drawn for each clip (center, "
        "random), add black bars (letterbox), or distort them (stretch).",
    )
    id_token: str = _data("", help_text="A word put in front of every caption, to call the trained concept by.")
    caption_dropout: float = _data(
        0.0, ge=0, le=1, help_text="Share of the samples trained with an empty caption, for guidance."
    )

    type: TrainingType = _training("lora", help_text="lora trains a small adapter, sft every weight.")
    steps: int = _training(1000, ge=1, help_text="Optimizer steps in all.")
    epochs: float | None = _training(None, gt=0, help_text="Passes over the data, in place of steps.")
    batch_size: int = _training(1, ge=1, help_text="Samples per GPU and forward pass.")
    gradient_accumulation_steps: int = _training(1, ge=1, help_text="Forward passes per optimizer step.")
    gradient_checkpointing: bool = _training(
        True,
        help_text="Recompute activations in the backward pass: far less memory, about a third more time.",
    )
    compile: bool | None = _training(
        None,
        help_text="Compile the transformer's blocks: less memory and time a step, after a minute's start. "
        "[default: on a GPU, where no GPU shares its weights]",
    )
    seed: int = _training(42, ge=0, le=2**31 - 1, help_text="Decides order, noise, timesteps and the adapter's start.")

    vram: str | None = _memory(
        None,
        help_text="Memory that a LoRA run may take of each card, such as 8GB: weights and activations are kept in host "
        "memory as far as they do not fit. [default: no limit, and everything on the card]",
    )
    stream_blocks: int | None = _memory(
        None,
        ge=0,
        help_text="Transformer blocks whose frozen weights stay in host memory and are streamed through the card. "
        "[default: as many as --vram asks for]",
    )
    keep_activations: Keep | None = _memory(
        None,
        help_text="What each block keeps for its backward pass: its inputs, the outputs of attention too, those of "
        "matrix products too, or everything. [default: chosen with --vram]",
    )
    keep_everything: int | None = _memory(
        None,
        ge=0,
        help_text="The last blocks, which keep everything on the card in place of that. [default: chosen with --vram]",
    )
    offload_activations: int | None = _memory(
        None,
        ge=0,
        help_text="The first blocks, whose activations wait for the backward pass in host memory. "
        "[default: chosen with --vram]",
    )
    attention: AttentionKernel | Literal["auto"] | None = _memory(
        None,
        help_text="The attention kernel; auto measures those that are there. [default: PyTorch's own choice; auto with "
        "--vram]",
    )

    timestep_sampling: TimestepSampling = _training(
        "uniform", help_text="How timesteps are drawn: all alike, or more often where a logistic normal has its mass."
    )
    timestep_mean: float = _training(
        0.0, help_text="Mean of the normal under logit-normal; above 0, noisier timesteps come more often."
    )
    timestep_std: float = _training(1.0, gt=0, help_text="Deviation of the normal under logit-normal.")
    timestep_range: str | None = _training(
        None, help_text="LOW,HIGH: train on these timesteps alone, both included. [default: 0,999, all]"
    )
    image_noise: str = _training(
        "-3,0.5",
        help_text="MEAN,STD of the log of the noise on conditioning images (image-to-video), or off.",
    )

    init_lora: Path | None = _lora(
        None,
        help_text="A LoRA of any program to begin with, in place of a new adapter; rank, alpha and layers are taken "
        "from it. [default: none]",
    )
    rank: int = _lora(128, ge=1, help_text="Rank of the adapter.")
    alpha: float | None = _lora(
        None,
        gt=0,
        help_text="Strength of the adapter is alpha / rank, with --rslora alpha / √rank. [default: the rank]",
    )
    target_modules: tuple[str, ...] = _lora(
        ("to_q", "to_k", "to_v", "to_out.0"),
        min_length=1,
        help_text="Layers that get an adapter, by the end of their names.",
    )
    lora_dropout: float = _lora(0.0, ge=0, lt=1, help_text="Share of the adapter's inputs dropped in training.")
    dora: bool = _lora(False, help_text="Learn a magnitude for each output beside the direction (DoRA).")
    rslora: bool = _lora(False, help_text="Rank-stabilised strength, alpha / √rank in place of alpha / rank.")

    optimizer: OptimizerName = _optimizer(
        "adamw", help_text="What moves the weights; all but adamw, adam and adamw-offload need the extra `optimizers`."
    )
    learning_rate: float = _optimizer(
        USUAL_RATE, gt=0, help_text="Peak learning rate; where prodigy is chosen and no rate beside it, 1."
    )
    lr_scheduler: LrScheduler = _optimizer("constant_with_warmup", help_text="How the learning rate moves.")
    warmup_steps: int = _optimizer(0, ge=0, help_text="Optimizer steps over which the learning rate rises from 0.")
    lr_cycles: int = _optimizer(1, ge=1, help_text="How often cosine_with_restarts falls from the peak.")
    lr_power: float = _optimizer(1.0, gt=0, help_text="Power of polynomial's fall; 1 is a line.")
    lr_pieces: str | None = _optimizer(
        None,
        help_text="For piecewise_constant: 1:100,0.1:200,0.01 is the full rate up to step 100, a tenth up to step 200, "
        "then a hundredth.",
    )
    beta1: float = _optimizer(0.9, ge=0, lt=1, help_text="Decay of the gradients' average.")
    beta2: float = _optimizer(0.95, ge=0, lt=1, help_text="Decay of the squared gradients' average.")
    beta3: float | None = _optimizer(
        None,
        ge=0,
        lt=1,
        help_text="The third decay of came and prodigy. [default: 0.9999 for came, √beta2 for prodigy]",
    )
    epsilon: float = _optimizer(1e-8, gt=0, help_text="Added to the denominator of a step; came has its own.")
    weight_decay: float = _optimizer(
        1e-4, ge=0, help_text="How much weights shrink, as a share of the learning rate; adam adds it to the gradient."
    )
    prodigy_decouple: bool = _optimizer(True, help_text="Prodigy: weight decay as in AdamW, apart from the gradient.")
    prodigy_bias_correction: bool = _optimizer(True, help_text="Prodigy: correct the averages' bias towards zero.")
    prodigy_safeguard_warmup: bool = _optimizer(
        True, help_text="Prodigy: keep a warm-up's small rates out of the estimate of the step size."
    )
    max_grad_norm: float = _optimizer(1.0, gt=0, help_text="Gradients are clipped to this norm.")

    output: Path = _saving(Path("out"), help_text="The run's folder.")
    checkpoint_every: int = _saving(500, ge=1, help_text="Optimizer steps between checkpoints.")
    keep_checkpoints: int = _saving(3, ge=1, help_text="How many of the newest checkpoints stay.")
    eval_every: int | None = _saving(
        None,
        ge=0,
        help_text="Steps between measurements of the loss at fixed noise; 0 for none. [default: with each checkpoint]",
    )
    validation_data: Path | None = _saving(
        None,
        help_text="Clips and captions kept out of training, to measure the loss on too: a folder, or user/name on "
        "the Hub.",
    )
    validation_samples: int = _saving(
        8, ge=1, help_text="How many samples of the validation data are measured, spread evenly over it."
    )
    validation_prompts: str | None = _saving(
        None,
        help_text="What the sample videos show: prompts with ::: between them, or a .txt file with one a line. "
        "[default: the first caption]",
    )
    validation_images: str | None = _saving(
        None,
        help_text="First frames for image-to-video models, one for each prompt: files with ::: between them, or a "
        ".txt file of paths. [default: those of the first samples]",
    )
    sample_every: int | None = _saving(
        None,
        ge=0,
        help_text="Steps between sample videos; 0 for none. [default: with each checkpoint where there are validation "
        "prompts, else none]",
    )
    sample_epochs: float | None = _saving(
        None, gt=0, help_text="Passes over the data between sample videos, in place of steps."
    )
    sample_steps: int = _saving(50, ge=1, help_text="Denoising steps of a sample video.")
    sample_guidance: float = _saving(6.0, ge=1, help_text="How closely a sample video follows its prompt.")
    tracker: tuple[Tracker, ...] = _saving(
        (), help_text="Show the run in tensorboard, wandb or trackio too, or in several; each is an extra of its name."
    )

    strategy: Strategy = _launch("ddp", help_text="How memory and work are shared out over the GPUs.")
    pin_memory: bool = _launch(
        True,
        help_text="Under offload, pin the host's buffers: a faster step; off (but for zero3-offload's weights) where "
        "pinned memory is scarce, as in WSL.",
    )
    num_processes: int = _launch(1, ge=1, help_text="GPUs to train on, of all machines together.")
    num_machines: int = _launch(
        1,
        ge=1,
        help_text="Machines to train on, each with the same command; ZeRO and --resume need an --output that all see.",
    )
    machine_rank: int = _launch(0, ge=0, help_text="Which of the machines this is; 0 is the main one.")
    main_process_ip: str | None = _launch(None, help_text="Address of machine 0, where there are several.")
    main_process_port: int = _launch(
        0, ge=0, le=65535, help_text="Port of machine 0 at which the processes meet; 0, on one machine, for a free one."
    )
    nccl_timeout: float = _launch(
        30.0, gt=0, help_text="Minutes after which a machine or process that waits for another gives up."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:
            raise ValueError(f"input should be a number, not {str(value).lower()}")
        return value

    @field_validator("target_modules", "buckets", "tracker", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
            return value
        return tuple(name.strip() for part in parts for name in part.split(",") if name.strip())

    @field_validator("warmup_steps")
    @classmethod
    def _warmup_ends(cls, warmup: int, info: ValidationInfo) -> int:
        steps = info.data.get("steps")
        if steps is not None and info.data.get("epochs") is None and warmup >= steps:
            raise ValueError(f"{warmup} is not below the {steps} steps of the run: the learning rate never gets there")
        return warmup

    @field_validator("vram")
    @classmethod
    def _vram_reads(cls, text: str | None) -> str | None:
        if text is not None and bytes_of(text) <= 0:
            raise ValueError(f"'{text}' is not an amount of memory: write it in GB or GiB, such as 8GB")
        return text

    @field_validator("timestep_range")
    @classmethod
    def _range_reads(cls, text: str | None) -> str | None:
        if text is not None and not re.fullmatch(r"\s*\d+\s*,\s*\d+\s*", text):
            raise ValueError(f"'{text}' is not a range: write LOW,HIGH, such as 500,999")
        return text

    @field_validator("image_noise", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false

    @field_validator("image_noise")
    @classmethod
    def _noise_reads(cls, text: str) -> str:
        if text != "off" and not re.fullmatch(rf"\s*-?{_NUMBER}\s*,\s*{_NUMBER}\s*", text):
            raise ValueError(f"'{text}' is no noise: write MEAN,STD of its log, such as -3,0.5, or off")
        return text

    @field_validator("lr_pieces")
    @classmethod
    def _pieces_read(cls, text: str | None) -> str | None:
        if text is None:
            return None
        if not re.fullmatch(rf"({_NUMBER}:\d+,)+{_NUMBER}", text):
            raise ValueError(f"'{text}' is no list of pieces: write SHARE:STEP,...,SHARE, such as 1:100,0.1")
        ends = [int(piece.split(":")[1]) for piece in text.split(",")[:-1]]
        if ends != sorted(set(ends)):
            raise ValueError(f"'{text}': the steps at which the pieces end must rise")
        return text

    @field_validator("num_machines")
    @classmethod
    def _shared_out(cls, machines: int, info: ValidationInfo) -> int:
        processes = info.data.get("num_processes")
        if processes is not None and processes % machines:
            raise ValueError(f"{processes} processes cannot be shared out evenly over {machines} machines")
        return machines

    @field_validator("machine_rank")
    @classmethod
    def _one_of_them(cls, rank: int, info: ValidationInfo) -> int:
        machines = info.data.get("num_machines")
        if machines is not None and rank >= machines:
            raise ValueError(f"{rank} is not one of {machines} machines, which are counted from 0")
        return rank

    @field_validator("sample_epochs")
    @classmethod
    def _one_interval(cls, epochs: float | None, info: ValidationInfo) -> float | None:
        if epochs is not None and info.data.get("sample_every") is not None:
            raise ValueError("give sample_every or sample_epochs, not both")
        return epochs

    @field_validator("size")
    @classmethod
    def _size_reads(cls, text: str | None) -> str | None:
        return None if text is None else str(Size.parse(text))

    @field_validator("buckets")
    @classmethod
    def _buckets_read(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(Size.parse(text)) for text in texts))

    @field_validator("buckets")
    @classmethod
    def _buckets_stand_alone(cls, buckets: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if buckets and info.data.get("frames") is not None:
            raise ValueError(f"buckets say their own numbers of frames: leave out frames {info.data['frames']}")
        return buckets

    @property
    def lora_alpha(self) -> float:
        """Alpha with its default, the rank."""
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def timestep_bounds(self) -> tuple[int, int] | None:
        """The lowest and the highest timestep to train on; None for all."""
        if self.timestep_range is None:
            return None
        low, high = map(int, self.timestep_range.split(","))
        return low, high

    @property
    def image_noise_log(self) -> tuple[float, float] | None:
        """Mean and deviation of the log of the conditioning images' noise; None for no noise."""
        if self.image_noise == "off":
            return None
        mean, deviation = map(float, self.image_noise.split(","))
        return mean, deviation

    @property
    def uses_engine(self) -> bool:
        """Whether the memory engine runs the transformer's blocks: it does where any of its options is set."""
        return any(getattr(self, key) is not None for key in ENGINE_KEYS)

    @property
    def vram_bytes(self) -> int | None:
        """The run's budget of each card's memory; None for no limit."""
        return None if self.vram is None else bytes_of(self.vram)

    @property
    def local_processes(self) -> int:
        """Processes on each machine."""
        return self.num_processes // self.num_machines

    @property
    def global_batch(self) -> int:
        """Samples in one optimizer step, over all processes and accumulation steps."""
        return self.batch_size * self.gradient_accumulation_steps * self.num_processes

    def total_steps(self, *counts: int) -> int:
        """Optimizer steps of the whole run over a dataset with so many samples, or so many of each size.

        A forward pass works on samples of one size, and the last one of an epoch is filled up.
        """
        return self.steps if self.epochs is None else self._steps_of(self.epochs, counts)

    def _steps_of(self, epochs: float, counts: Iterable[int]) -> int:
        passes = sum(-(-int(epochs * count) // self.batch_size) for count in counts)
        return max(1, -(-passes // (self.gradient_accumulation_steps * self.num_processes)))

    @property
    def eval_interval(self) -> int:
        """Optimizer steps between evaluations; 0 for none."""
        return self.checkpoint_every if self.eval_every is None else self.eval_every

    def sample_interval(self, *counts: int) -> int:
        """Optimizer steps between sample videos of a run; ``counts`` as for :meth:`total_steps`. 0 for none."""
        if self.sample_epochs is not None:
            return self._steps_of(self.sample_epochs, counts)
        if self.sample_every is not None:
            return self.sample_every
        return self.checkpoint_every if self.validation_prompts else 0

    def anchored(self) -> RunConfig:
        """The same with every local path absolute, so that it means the same from any folder."""
        paths: dict[str, Any] = {key: _absolute(getattr(self, key)) for key in ("data", "output")}
        paths["cache_dir"] = _absolute(self.cache_dir or self.data / ".cogtune")
        if self.init_lora is not None:
            paths["init_lora"] = _absolute(self.init_lora)
        if self.quarantine is not None:
            paths["quarantine"] = _absolute(self.quarantine)
        if self.validation_data is not None:
            paths["validation_data"] = _absolute(self.validation_data)
        for key in ("validation_prompts", "validation_images"):
            if (value := getattr(self, key)) is not None:
                paths[key] = _anchored_list(value, of_files=key == "validation_images")
        if Path(self.model).is_dir():
            paths["model"] = str(_absolute(Path(self.model)))
        return self.model_copy(update=paths)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values, in order."""
        return self.model_dump(mode="json")
