"""What is asked of ``cogtune infer``, and what of it is wrong whatever the model."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cogtune.config.choices import VideoFormat, parse_bytes
from cogtune.config.run_config import is_list_file
from cogtune.data.layouts.lines import NotTextError, as_utf8, listed_lines
from cogtune.data.layouts.media import is_image, may_be_clip
from cogtune.data.layouts.nearest import look_alike
from cogtune.data.video.generated import SUFFIXES
from cogtune.models.geometry import Size
from cogtune.models.locate import locate
from cogtune.models.variants import FrozenPrecision, Precision, SamplingScheduler
from cogtune.run.lora_paths import file_and_weight, find_lora, is_on_hub
from cogtune.system.errors import CogtuneError, UsageError, counted
from cogtune.system.files import os_errors_explained, read_bytes

WRONG = "cannot sample this video"

_MOST_PROMPTS = 1 << 24
"""Bytes of the largest file of prompts that is read."""

STRENGTH = 0.8
"""Of a video made of another, when nobody says: diffusers' default."""

MOST_SEED = 2**63 - 1
MOST_VIDEOS = 100_000
"""Maximum number of videos per prompt."""


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """What to sample. None, or nothing, means: as the run or the model has it."""

    loras: tuple[str, ...] = ()
    """Each ``LORA`` or ``LORA:WEIGHT``: a file of any program, an adapter's folder, a checkpoint, a run, a Hub id."""
    model: str | None = None
    """Base model; or the result of full fine-tuning: a run, a checkpoint or a merged folder."""
    prompts: tuple[str, ...] = ()
    """Prompts, and text files with one in a line."""
    negative_prompt: str = ""
    id_token: str | None = None
    """Put in front of the prompts."""
    images: tuple[Path, ...] = ()
    """First frames for an image-to-video model: files, and folders of them."""
    videos: tuple[Path, ...] = ()
    """Clips to make other videos of: files, and folders of them."""
    strength: float | None = None
    size: str | None = None
    """``HEIGHTxWIDTH`` or ``FRAMESxHEIGHTxWIDTH``."""
    frames: int | None = None
    fps: float | None = None
    precision: Precision | None = None
    base_precision: FrozenPrecision | None = None
    """Of the matrix products with the base model's weights."""
    text_encoder_precision: FrozenPrecision | None = None
    """In which the text encoder's weights are stored."""
    num_videos: int = 1
    seed: int = 42
    """Of the first video of each prompt; each other has the next one."""
    steps: int = 50
    guidance: float = 6.0
    scheduler: SamplingScheduler | None = None
    lora_scales: tuple[float, ...] = ()
    """What the strength of all LoRAs is multiplied by; a video for each."""
    lora_alpha: float | None = None
    """The LoRA's alpha, for a file that does not say; None leaves it to the file, else to the rank."""
    vram: str | None = None
    """A budget of the GPU's memory, such as ``8GB``."""
    output: Path | None = None
    """A file for one video, or a folder."""
    format: VideoFormat | None = None
    grid: bool = False
    """Whether to write one more video, of all of them side by side."""
    force: bool = False
    """Whether to make again what is there."""


@dataclass
class Problems:
    """All that is wrong with a request, gathered to be reported at once."""

    lines: list[str] = field(default_factory=list)
    errors: list[CogtuneError] = field(default_factory=list)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Keep an error of the block for later."""
        try:
            yield
        except CogtuneError as error:
            self.errors.append(error)

    def refuse(self) -> None:
        """Raise if there is a problem.

        Raises:
            UsageError: with all of them.
            CogtuneError: the one that there is, if it came as an error of its own.
        """
        if len(self.errors) == 1 and not self.lines:
            raise self.errors[0]
        if self.errors or self.lines:
            told = ["; ".join((error.message, *error.details)) for error in self.errors]
            hints = dict.fromkeys(error.hint for error in self.errors if error.hint)
            raise UsageError(WRONG, "; ".join(hints) if len(hints) == 1 else "", details=[*self.lines, *told])


@dataclass(frozen=True)
class Row:
    """What videos are made of, but for the seed: a prompt, and the picture or clip that they start from."""

    prompt: str
    image: Path | None = None
    video: Path | None = None


def number_problems(request: InferRequest) -> list[str]:
    """Return what is wrong with the numbers of a request."""
    numbers = [
        ("--fps", request.fps),
        ("--guidance", request.guidance),
        ("--lora-alpha", request.lora_alpha),
        ("--strength", request.strength),
        *(("--lora-scale", scale) for scale in request.lora_scales),
    ]
    found = [
        f"{name}: {value} is not a finite number"
        for name, value in numbers
        if value is not None and not math.isfinite(value)
    ]
    if request.lora_alpha is not None and request.lora_alpha <= 0:
        found.append(f"--lora-alpha must be greater than 0, got {request.lora_alpha:g}")
    if request.strength is not None and not 0 < request.strength <= 1:
        found.append(f"--strength must be greater than 0 and at most 1, got {request.strength:g}")
    if request.strength is not None and not request.videos:
        found.append("--strength requires --video")
    if request.num_videos > MOST_VIDEOS:
        found.append(f"--num-videos must be at most {MOST_VIDEOS:,}, got {request.num_videos:,}")
    elif request.seed + request.num_videos - 1 > MOST_SEED:
        found.append(
            f"--seed {request.seed} is too large for --num-videos {request.num_videos}: seeds end at {MOST_SEED}"
        )
    if request.vram is not None and parse_bytes(request.vram) <= 0:
        found.append(f"--vram: '{request.vram}' is not an amount of memory; write it in GB or GiB, such as 8GB")
    if not request.loras:
        found += [
            f"--{name} requires --lora"
            for name, value in (("lora-scale", request.lora_scales), ("lora-alpha", request.lora_alpha))
            if value not in (None, ())
        ]
    if len(request.loras) > 1 and request.lora_alpha is not None:
        found.append("--lora-alpha cannot be used with several LoRAs; set their strengths with --lora FILE:WEIGHT")
    return found


def refuse_missing(request: InferRequest) -> None:
    """Reject a request for a LoRA or model that does not exist. Needs no torch, so that it takes no time.

    Raises:
        UsageError: with all that is wrong with the request, as far as it can be known without them.
        CogtuneError: the only problem, if it came as an error of its own.
    """
    problems = Problems(number_problems(request))
    for text in request.loras:
        with problems.gathered():
            name, _ = file_and_weight(text)
            if not is_on_hub(name):
                find_lora(Path(name).expanduser())
    if request.model is not None and request.model.startswith(_PATHS):
        with problems.gathered():
            locate(request.model, weights=False)
    if problems.errors:
        prompts_asked(request.prompts, problems)
        files_asked("--image", request.images, problems)
        files_asked("--video", request.videos, problems)
        problems.refuse()


_PATHS = (".", "/", "~")
"""How a model begins that can only be a folder."""


def size_asked(request: InferRequest, default: Size) -> Size:
    """Return the size that is asked for, completed from ``default``.

    Raises:
        UsageError: it is written in another way.
    """
    size = default
    if request.size is not None:
        match = re.fullmatch(r"\s*(\d+)\s*[xX×]\s*(\d+)\s*", request.size)
        try:
            size = Size(default.num_frames, int(match[1]), int(match[2])) if match else Size.parse(request.size)
        except ValueError as error:
            raise UsageError(f"--size: {error}", "write it HEIGHTxWIDTH, or FRAMESxHEIGHTxWIDTH") from error
    return size if request.frames is None else Size(request.frames, size.height, size.width)


def names_frames(request: InferRequest) -> bool:
    """Return whether the request says how many frames a video has."""
    return request.frames is not None or len(re.findall("[xX×]", request.size or "")) > 1


def prompts_asked(prompts: Sequence[str], problems: Problems, option: str = "--prompt") -> list[str]:
    """Return the prompts that an option names, including those in files."""
    found: list[str] = []
    for text in prompts:
        if not is_list_file(text):
            found.append(text)
            continue
        with problems.gathered():
            found += _in_file(Path(text), problems, option)
    return found


def _in_file(path: Path, problems: Problems, option: str) -> list[str]:
    try:
        data = read_bytes(path, _MOST_PROMPTS)
    except CogtuneError as error:
        raise UsageError(f"{option}: {error.message}{look_alike(path)}", error.hint) from error
    try:
        data, _ = as_utf8(data)
    except NotTextError as error:
        problems.lines.append(f"{option}: {path} {error}")
        return []
    lines = listed_lines(data)
    wrong = [number for number, line in enumerate(lines, 1) if not isinstance(line, str)]
    if wrong:
        problems.lines.append(f"{option}: {path} is not UTF-8 in line {', '.join(map(str, wrong))}")
    prompts = [line for line in lines if isinstance(line, str) and line]
    if not lines:
        problems.lines.append(f"{option}: {path} is empty")
    return prompts


def files_asked(option: str, paths: tuple[Path, ...], problems: Problems) -> list[Path]:
    """Return the files that an option names, those in folders in the order of their names."""
    kind, what = (_may_be_image, "image") if option == "--image" else (may_be_clip, "video")
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.is_file() and kind(PurePosixPath(file.name)))
            if not inside:
                problems.lines.append(f"{option}: {path} contains no {what}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            problems.lines.append(f"{option}: no such file: {path}{look_alike(path)}")
    return found


def _may_be_image(file: PurePosixPath) -> bool:
    return is_image(file) or file.suffix.lower() in (".webp", ".avif")


def rows_of(prompts: list[str], images: list[Path], videos: list[Path], problems: Problems) -> list[Row]:
    """Return a row for each prompt, image and clip; a list of one serves all rows."""
    several = {
        name: len(items)
        for name, items in (("prompt", prompts), ("image", images), ("video", videos))
        if len(items) > 1
    }
    if len(set(several.values())) > 1:
        told = " and ".join(counted(count, name) for name, count in several.items())
        problems.lines.append(f"{told}: pass one for all, or the same number of each")
        return []
    count = max(several.values(), default=1)

    def at(items: list[Path], number: int) -> Path | None:
        return None if not items else items[number if len(items) > 1 else 0]

    if not prompts:
        return []
    return [
        Row(prompts[number if len(prompts) > 1 else 0], at(images, number), at(videos, number))
        for number in range(count)
    ]


def names_file(output: Path | None) -> bool:
    """Return whether ``--output`` names one video rather than a folder."""
    return output is not None and output.suffix.lower() in SUFFIXES


def output_problems(request: InferRequest, problems: Problems, videos: int) -> None:
    """Add what is wrong with ``--output`` for a number of videos."""
    output = request.output
    with problems.gathered():
        _check_output(output or Path(), is_folder=not names_file(output))
    if output is None or not names_file(output):
        name = PurePosixPath(output.name if output is not None else "")
        if (may_be_clip(name) or is_image(name)) and not Path(output or "").is_dir():
            problems.lines.append(f"--output {output}: expected a folder, or a file that ends in {', '.join(SUFFIXES)}")
        return
    if videos > 1:
        problems.lines.append(f"--output {output} names one file for {videos} videos; pass a folder")
    if request.format is not None and output.suffix.lower() != f".{request.format}":
        problems.lines.append(f"--output {output} cannot be used with --format {request.format}")


def _check_output(output: Path, *, is_folder: bool) -> None:
    """Reject a place that cannot be written, before the minutes that sampling takes.

    Raises:
        CogtuneError: a folder has the name of a file, or its own folder is a file or not writable.
    """
    with os_errors_explained(output):
        if not is_folder and output.is_dir():
            raise CogtuneError(f"cannot write {output}: it is a folder", "choose another --output")
        place = output.absolute() / "file" if is_folder else output.absolute()
        folder = next(above for above in place.parents if above.exists())
        if not folder.is_dir():
            raise CogtuneError(f"cannot write {output}: {folder} is a file", "choose an --output inside a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise CogtuneError(
                f"cannot write {output}: {folder} is not writable", "check its permissions, or choose another --output"
            )
