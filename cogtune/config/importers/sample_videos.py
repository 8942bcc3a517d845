"""Sample videos during training: prompts, images and interval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cogtune.config.choices import SEPARATOR
from cogtune.config.importers.translating import Imported, existing
from cogtune.system.files import read_bytes
from cogtune.system.json_files import MOST_JSON, read_json

_FLAGS = (
    "validation_dir",
    "validation_prompts",
    "validation_prompt",
    "validation_prompt_separator",
    "validation_images",
    "validation_videos",
    "validation_dataset_file",
    "validation_steps",
    "validation_epochs",
    "validation_every_n_epochs",
    "validation_every_n_steps",
)


def validation(made: Imported) -> None:
    """Set prompts and images, which each program names in its own way."""
    program = made.given.program
    wanted = made.on("do_validation") if program in ("CogVideo", "CogKit") else True
    if made.has("do_validation"):
        note = ""
        if program == "CogVideo" and not wanted:
            note = "; that program treats any value as true, even false"
        made.say("do_validation", "kept", f"sample videos are {'on' if wanted else 'off'}{note}")
    if wanted:
        {"CogVideo": _files, "CogKit": _test_data, "finetrainers": _finetrainers}.get(program, _line)(made)
        if "validation_prompts" in made.values:
            _interval(made)
    for flag in _FLAGS:
        if made.has(flag) and flag not in made.told:
            why = "there are no prompts to sample" if wanted else "sample videos are off"
            made.say(flag, "none", why)


def _files(made: Imported) -> None:
    """Read lists from a separate folder, as CogVideo does."""
    folder = Path(made.word("validation_dir") or "")
    for flag in ("validation_prompts", "validation_images"):
        if word := made.word(flag):
            made.set(flag, str(folder / word), flag)
    if made.has("validation_dir"):
        made.say("validation_dir", "kept", "in the paths of the lists")
    if made.has("validation_videos"):
        made.say("validation_videos", "none", "video-to-video is not supported")


def _test_data(made: Imported) -> None:
    """Read prompts from the table in ``test/``, as CogKit does."""
    root = made.word("data_root")
    table = Path(root or "") / "test" / "metadata.jsonl"
    if not existing(str(table)):
        made.say("do_validation", "to do", f"write the prompts of {table} to a .txt file, one per line, and set "
                 "validation_prompts to it")  # fmt: skip
        return
    try:
        lines = read_bytes(table, MOST_JSON).decode("utf-8-sig").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        made.problems.append(f"{table}: {error}")
        return
    _set_prompts(made, "do_validation", [row for row in rows if isinstance(row, dict)], table.parent)


def _set_prompts(made: Imported, flag: str, rows: list[dict[str, Any]], folder: Path) -> None:
    prompts = [str(row.get("prompt") or row.get("caption") or "") for row in rows]
    images = [str(row.get("image_path") or row.get("image") or row.get("file_name") or "") for row in rows]
    if not prompts or not all(prompts):
        made.problems.append(f"--{flag}: not every row has a prompt")
        return
    made.set("validation_prompts", SEPARATOR.join(prompts), flag)
    if made.spec is not None and made.spec.image_to_video and all(images):
        paths = [image if Path(image).is_absolute() or existing(image) else str(folder / image) for image in images]
        made.set("validation_images", SEPARATOR.join(paths), flag)


def _line(made: Imported) -> None:
    """Read prompts from one argument, as diffusers and CogVideoX Factory do."""
    separator = made.word("validation_prompt_separator") or SEPARATOR
    for flag, key in (("validation_prompt", "validation_prompts"), ("validation_images", "validation_images")):
        if word := made.word(flag):
            made.set(key, SEPARATOR.join(part.strip() for part in word.split(separator)), flag)
    if made.has("validation_prompt_separator"):
        same = separator == SEPARATOR
        made.say(
            "validation_prompt_separator",
            "kept",
            f"{SEPARATOR} in cogtune" + ("" if same else f", in place of {separator}"),
        )


def _finetrainers(made: Imported) -> None:
    """Read a JSON file of rows, or prompts followed by sizes, as finetrainers does."""
    if word := made.word("validation_dataset_file"):
        file = made.given.file(word)
        if file is None:
            made.say("validation_dataset_file", "to do", "no such file: set validation_prompts")
            return
        value = read_json(file)
        rows = value.get("data") if isinstance(value, dict) else None
        _set_prompts(made, "validation_dataset_file", [r for r in rows or [] if isinstance(r, dict)], file.parent)
        return
    for flag in ("validation_prompts", "validation_images"):
        if word := made.word(flag):
            parts = [part.partition("@@@")[0].strip() for part in word.split(SEPARATOR)]
            note = "sizes after @@@ are ignored: sample videos have the training size" if "@@@" in word else ""
            made.set(flag, SEPARATOR.join(parts), flag, note)


def _interval(made: Imported) -> None:
    """Set how often sample videos are made."""
    for flag in ("validation_steps", "validation_every_n_steps"):
        if made.has(flag) and (steps := made.number(flag)) is not None:
            made.set("sample_every", steps, flag)
            return
    for flag in ("validation_epochs", "validation_every_n_epochs"):
        if made.has(flag) and (epochs := made.number(flag)) is not None:
            made.set("sample_epochs", epochs, flag)
            return
