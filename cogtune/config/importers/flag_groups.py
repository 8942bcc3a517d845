"""Flags that decide a key together."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Callable
from pathlib import Path

from cogtune.config.importers import launch, optimizer, sample_videos
from cogtune.config.importers.translating import Imported, Remark, existing
from cogtune.models import layers
from cogtune.models.checkpoint_configs import ModelSpec, published_spec
from cogtune.models.geometry import FRAME_STEP, Size
from cogtune.models.locate import spec_of
from cogtune.models.variants import VARIANTS, published
from cogtune.system.errors import CogtuneError
from cogtune.system.json_files import read_json

_LISTS = {"prompts.txt", "prompt.txt", "captions.txt", "caption.txt", "videos.txt", "video.txt", "images.txt"}
"""File names of lists that cogtune finds in a dataset's folder."""


def model(made: Imported) -> None:
    """Set the base model, which decides the valid sizes and number formats."""
    flag = "model_path" if made.has("model_path") else "pretrained_model_name_or_path"
    name = made.word(flag)
    for other in ("model_name", "model_type"):
        if made.has(other):
            made.say(other, "better", "the model type is read from the model")
    family = made.word("model_name") or "cogvideox"
    if not family.lower().startswith("cogvideo"):
        made.problems.append(f"--model_name {family}: cogtune trains only CogVideoX models")
    if name is None:
        made.problems.append(f"--{flag} is missing: it names the base model")
        return
    spec, note = _spec(name)
    if spec is None:
        made.problems.append(f"--{flag} {name}: neither a local folder nor a published model ({', '.join(VARIANTS)})")
        made.told.add(flag)
        return
    made.spec = spec
    made.set("model", name if not note else spec.variant.hub_id, flag, note)


def _spec(name: str) -> tuple[ModelSpec | None, str]:
    """Return a model's spec, and a remark if another model is used in its place."""
    if published(name) is not None:
        return spec_of(name), ""
    if existing(name):
        try:
            return spec_of(name), ""
        except CogtuneError:
            return None, ""
    for row in VARIANTS.values():
        if Path(name).name.lower() == row.hub_id.partition("/")[2].lower():
            return published_spec(
                row
            ), f"{name} does not exist on this machine, so the published model of that name is used"
    return None, ""


def kind(made: Imported) -> None:
    """Decide between LoRA and full fine-tuning."""
    asked = made.values.get("type")
    if made.given.program in ("diffusers", "CogVideoX Factory"):
        made.values["type"] = "sft" if "sft" in made.given.script else "lora"
        made.sources["type"] = made.given.script or made.given.program
    elif asked == "full-finetune":
        made.values["type"] = "sft"
    elif asked not in (None, "lora", "sft"):
        made.problems.append(f"--training_type {asked}: use lora or sft")


def data(made: Imported) -> None:
    """Set where clips and captions are, and which frames are read."""
    program, flag = made.given.program, "instance_data_root" if made.has("instance_data_root") else "data_root"
    root = made.word(flag)
    if made.has("dataset_config"):
        _dataset_config(made)
    elif made.has("dataset_name") and root is None:
        made.set("data", made.word("dataset_name"), "dataset_name")
    elif root is None:
        made.problems.append(f"--{flag} is missing: it names the dataset")
    elif program == "CogKit":
        made.set("data", str(Path(root) / "train"), flag, "CogKit keeps its training samples in train/")
    else:
        made.set("data", root, flag)
    if root is not None:
        for table in ("dataset_name", "dataset_file"):
            if made.has(table):
                made.say(table, "to do", f"move that table to {root}, as CSV, JSON lines or Parquet")
    for column in ("caption_column", "video_column", "image_column"):
        words = made.given.flags.get(column)
        if words:
            _column(made, column, words[0])
    made.values["sampling"], made.sources["sampling"] = "uniform", f"what {program} does"
    text = "sampling: uniform, spread over the whole clip as before; `head` reads them at the model's frame rate"
    made.remarks.append(Remark("frames of a clip", "", "kept", text))
    reshape = made.word("video_reshape_mode", "reshape_mode")
    for mode in ("video_reshape_mode", "reshape_mode"):
        if made.has(mode):
            if reshape in ("center", "random"):
                made.set("reshape", reshape, mode)
            else:
                made.say(
                    mode,
                    "better",
                    "reshape: center, so clips are scaled and cropped; `stretch` distorts them as before",
                )
    if reshape is None:
        text = "clips are scaled and cropped, not distorted; `reshape: stretch` distorts them as before"
        made.remarks.append(Remark("shape of a clip", "", "better", text))


def _column(made: Imported, flag: str, word: str) -> None:
    if not word.lower().endswith(".txt"):
        made.set(flag, word, flag)
    elif Path(word).name.lower() in _LISTS:
        made.say(flag, "better", "cogtune finds its lists in the dataset's folder")
    else:
        usual = {"caption_column": "prompts.txt", "video_column": "videos.txt", "image_column": "images.txt"}[flag]
        made.say(flag, "to do", f"save that list as {usual} in the dataset's folder")


def _dataset_config(made: Imported) -> None:
    """Read finetrainers' file of datasets."""
    name = made.word("dataset_config") or ""
    file = made.given.file(name)
    if file is None:
        made.problems.append(f"--dataset_config {name}: no such file; it names the dataset")
        made.told.add("dataset_config")
        return
    value = read_json(file)
    datasets = value.get("datasets") if isinstance(value, dict) else None
    first = datasets[0] if isinstance(datasets, list) and datasets and isinstance(datasets[0], dict) else {}
    if not first.get("data_root"):
        made.problems.append(f"--dataset_config {name}: data_root is missing")
        made.told.add("dataset_config")
        return
    made.set("data", str(first["data_root"]), "dataset_config")
    if isinstance(datasets, list) and len(datasets) > 1:
        made.say("dataset_config", "to do", f"it lists {len(datasets)} datasets: combine their clips in one folder")
    known = ("data_root", "dataset_type", "id_token", "video_resolution_buckets", "reshape_mode")
    for key, item in first.items():
        if key == "id_token" and item:
            made.set("id_token", str(item), "dataset_config")
        elif key == "video_resolution_buckets":
            made.given.flags.setdefault(key, ["x".join(map(str, size)) for size in item])
        elif key == "remove_common_llm_caption_prefixes":
            made.say("dataset_config", "none", f"{key}: captions are used unchanged")
        elif key == "reshape_mode":
            made.given.flags.setdefault(key, [str(item)])
        elif key == "caption_options":
            made.say("dataset_config", "to do", f"{key}: set `caption_column` to choose the caption")
        elif key not in known:
            made.problems.append(f"--dataset_config {name}: unknown key {key}")


def size(made: Imported) -> None:
    """Set frames, height and width."""
    found: list[tuple[str, Size]] = []
    problems = made.problems
    if words := made.given.flags.get("train_resolution"):
        text = "x".join(re.findall(r"\d+", " ".join(words)))
        _parsed(found, "train_resolution", text, problems)
    elif words := made.given.flags.get("video_resolution_buckets"):
        for word in words:
            _parsed(found, "video_resolution_buckets", word, problems)
    elif made.has("height_buckets") or made.has("width_buckets"):
        frames = made.given.flags.get("frame_buckets") or [made.word("max_num_frames") or "49"]
        heights = made.given.flags.get("height_buckets") or [made.word("height") or "480"]
        widths = made.given.flags.get("width_buckets") or [made.word("width") or "720"]
        for parts in itertools.product(frames, heights, widths):
            _parsed(found, "height_buckets", "x".join(parts), problems)
    elif made.word("height") and made.word("max_num_frames"):
        words = [made.word(name) or "" for name in ("max_num_frames", "height", "width")]
        _parsed(found, "max_num_frames", "x".join(words), problems)
    flags = ("train_resolution", "video_resolution_buckets", "height_buckets", "width_buckets", "frame_buckets")
    for flag in (*flags, "height", "width", "max_num_frames"):
        if made.has(flag) and not any(flag == of for of, _ in found):
            made.say(flag, "kept", "in `size`" if len(found) < 2 else "in `buckets`")
    sizes = list(dict.fromkeys(_legal(made, flag, one) for flag, one in found))
    if len(sizes) == 1:
        made.set("size", str(sizes[0]), found[0][0])
    elif sizes:
        made.set("buckets", [str(one) for one in sizes], found[0][0])


def _parsed(found: list[tuple[str, Size]], flag: str, text: str, problems: list[str]) -> None:
    try:
        found.append((flag, Size.parse(text)))
    except ValueError as error:
        problems.append(f"--{flag}: {error}")


def _legal(made: Imported, flag: str, one: Size) -> Size:
    """Return the size with a number of frames that the VAE accepts."""
    frames = max(1, (one.num_frames - 1) // FRAME_STEP) * FRAME_STEP + 1
    if frames == one.num_frames:
        return one
    text = f"{one.num_frames} frames become {frames}: the VAE requires {FRAME_STEP}N+1 frames"
    made.say(flag, "better", text)
    return Size(frames, one.height, one.width)


def length(made: Imported) -> None:
    """Set steps or epochs; steps take precedence if both are given, as in all of these programs."""
    steps, epochs = made.word("train_steps", "max_train_steps"), made.word("train_epochs", "num_train_epochs")
    names = ("train_steps", "max_train_steps", "train_epochs", "num_train_epochs")
    used = next((name for name in names[: 2 if steps else 4] if made.word(name)), None)
    if used is None or not (steps or epochs):
        return
    number = made.number(used)
    if number is not None:
        made.set("steps" if steps else "epochs", number, used)
    for name in names:
        if made.has(name) and name != used:
            made.say(name, "none", f"--{used} takes precedence, as in that program")


def precision(made: Imported) -> None:
    """Set the number format."""
    config = launch.accelerate_config(made)
    flag = "mixed_precision" if made.has("mixed_precision") else "transformer_dtype"
    words = made.given.flags.get(flag) or made.given.launch.get("mixed_precision")
    word = (words or [str(config.get("mixed_precision") or made.word("mixed_precision") or "")])[0].lower()
    wanted = {"no": "fp32", "fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "": "bf16"}.get(word)
    if wanted is None:
        made.problems.append(f"--{flag} {word}: expected bf16, fp16 or fp32")
        wanted = "bf16"
    for name in ("mixed_precision", "transformer_dtype"):
        if made.has(name) and name != flag:
            made.say(name, "none", f"--{flag} takes precedence")
    if "mixed_precision" in made.given.launch:
        made.told.add("mixed_precision")
    if made.spec is not None and wanted == "fp16" and made.spec.precision_problems("fp16"):
        made.set("precision", "bf16", flag, "this model overflows in fp16, which makes black videos")
    elif wanted == "fp32":
        made.set("precision", "fp32", flag, "bf16 needs half the memory, and the model was trained in it")
    else:
        made.set("precision", wanted, flag)


def recompute(made: Imported) -> None:
    """Set gradient checkpointing."""
    if made.has("gradient_checkpointing"):
        made.set("gradient_checkpointing", made.on("gradient_checkpointing"), "gradient_checkpointing")
    elif made.given.program in ("diffusers", "CogVideoX Factory", "finetrainers"):
        text = "on unless you set gradient_checkpointing: false; it gives the same result with far less memory"
        made.remarks.append(Remark("--gradient_checkpointing", "(off, its default)", "better", text))


def targets(made: Imported) -> None:
    """Set the layers that get an adapter: ends of names, or a pattern as in PEFT."""
    words = made.given.flags.get("target_modules")
    if words is None:
        return
    if made.spec is None or not (len(words) == 1 and re.search(r"[*()|\[\]^$+?]", words[0])):
        made.set("target_modules", words, "target_modules")
        return
    try:
        pattern = re.compile(words[0])
    except re.error as error:
        made.problems.append(f"--target_modules {words[0]}: {error}")
        return
    matched = {name for name in layers.layers(made.spec) if pattern.fullmatch(name)}
    ends = [end for end in layers.names(made.spec) if set(layers.targeted(made.spec, [end])) <= matched]
    if not matched:
        made.problems.append(f"--target_modules {words[0]}: no layer of the model matches")
        return
    short = [end for end in ends if not any(end != other and end.endswith(f".{other}") for other in ends)]
    whole = bool(short) and set(layers.targeted(made.spec, short)) == matched
    made.set("target_modules", short if whole else sorted(matched), "target_modules")


def tracker(made: Imported) -> None:
    """Set the trackers that are installed."""
    if not made.has("report_to"):
        return
    word = (made.word("report_to") or "none").lower()
    wanted = {"all": ["tensorboard", "wandb"], "none": []}.get(word, [word])
    known = [name for name in wanted if name in ("tensorboard", "wandb", "trackio")]
    here = [name for name in known if importlib.util.find_spec(name) is not None]
    if here:
        made.set("tracker", here, "report_to")
    for name in wanted:
        if name not in known:
            made.say("report_to", "none", f"{name} is not supported; use tensorboard, wandb or trackio")
        elif name not in here:
            made.say("report_to", "to do", f"run `pip install 'cogtune[{name}]'`, then set tracker: [{name}]")
    if not wanted:
        made.say("report_to", "better", "every run saves its curves; `cogtune report` shows them")


def timeout(made: Imported) -> None:
    """Convert seconds to minutes."""
    if made.has("nccl_timeout") and (seconds := made.number("nccl_timeout")) is not None:
        made.set("nccl_timeout", seconds / 60, "nccl_timeout", "in minutes")


def lora_only(made: Imported) -> None:
    """Drop LoRA settings from a full fine-tune."""
    if made.values.get("type") == "sft":
        for key, flag in (("rank", "rank"), ("alpha", "lora_alpha"), ("target_modules", "target_modules")):
            if key in made.values:
                made.drop(key)
                made.remarks = [remark for remark in made.remarks if remark.flag != f"--{flag}"]
                made.say(flag, "none", "only for LoRA, and this is a full fine-tune")


ALL: tuple[Callable[[Imported], None], ...] = (
    kind,
    data,
    size,
    length,
    precision,
    recompute,
    optimizer.optimizer,
    launch.strategy,
    optimizer.schedule,
    targets,
    tracker,
    timeout,
    sample_videos.validation,
    lora_only,
)
"""In order: later ones read what earlier ones have set."""
