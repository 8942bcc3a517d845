"""One tree of everything that someone who means harm may offer: datasets, models, runs, checkpoints, LoRA files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.support.payload import Payload
from tests.support.zero_checkpoints import random_model, random_weights, write_zero

DEEP = "[" * 100_000 + "]" * 100_000

Words = tuple[object, ...]


def _write_archive(path: Path, pickled: bytes) -> None:
    """A file as ``torch.save`` makes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        for name, data in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
            file.writestr(f"archive/{name}", data)


class HostileTree:
    """What was downloaded: each folder of ``root`` is a copy of a good one with malice of one kind.

    Args:
        good: a dataset with its cache (``data``), a model, and a run on them (``out``), as the program makes them.
        private: the folder of somebody's own files that the malice is after.
        ran: what a payload makes when it runs.
    """

    def __init__(self, root: Path, good: Path, private: Path, ran: Path) -> None:
        self.root, self.good, self.private, self.ran = root, good, private, ran
        self.code = f"import os\nos.mkdir({str(ran)!r})\n"
        root.mkdir()
        for source, name in (("data", "data-good"), ("model", "model-good"), ("out", "run-good")):
            self._copy(source, name)
        for group in (self._datasets, self._models, self._runs, self._checkpoints, self._loras):
            group()
        for run in self.named("run"):
            settings = run / "run.yaml"
            if not settings.is_symlink():
                text = settings.read_text().replace(str(good / "data"), str(root / "data-good"))
                settings.write_text(text.replace(str(good / "model"), str(root / "model-good")))

    def named(self, kind: str) -> list[Path]:
        """The folders or files of a kind: ``data``, ``model``, ``run``, ``zero``, ``lora``."""
        return sorted(path for path in self.root.iterdir() if path.name.startswith(f"{kind}-"))

    def _copy(self, source: str, name: str) -> Path:
        return Path(shutil.copytree(self.good / source, self.root / name, symlinks=True))

    def _linked(self, path: Path, target: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    def _pipe(self, path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    def _datasets(self) -> None:
        private = self.private
        cache = self._copy("data", "data-cache") / ".cogtune"
        for name in ("latents", "text", "job", "logs"):
            self._linked(cache / name, private)
        for name in (".lock", "files.json"):
            self._linked(cache / name, private / name)
        self._linked(self._copy("data", "data-whole-cache") / ".cogtune", private)
        lists = self._copy("data", "data-list")
        self._linked(lists / "prompts.txt", private / "a.txt")
        paths = self._copy("data", "data-paths")
        (paths / "videos.txt").write_text(f"../../private/a.mp4\n{private / 'a.mp4'}\n")
        table = self._copy("data", "data-table")
        (table / "prompts.txt").unlink()
        (table / "videos.txt").unlink()
        (table / "metadata.csv").write_text(
            "file_name,text\n../../private/a.mp4,one\nvideos/../../../private/a.mp4,two\n"
        )
        clip = self._copy("data", "data-clip")
        self._linked(next((clip / "videos").iterdir()), private / "a.mp4")
        card = self._copy("data", "data-card")
        head = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": ["../../private/*.txt"]}]})
        (card / "README.md").write_text(f"---\n{head}---\n# A dataset\n")
        saved = self._copy("data", "data-saved")
        (saved / "train").mkdir()
        (saved / "dataset_dict.json").write_text('{"splits": ["train"]}')
        (saved / "train" / "dataset_info.json").write_text("{}")
        named = {"filename": "../../../private/a.arrow"}
        (saved / "train" / "state.json").write_text(json.dumps({"_data_files": [named], "_fingerprint": "0"}))
        for folder in (card, saved):  # lists would be read before these are looked at
            (folder / "prompts.txt").unlink()
            (folder / "videos.txt").unlink()
        code = self._copy("data", "data-code")
        for name in ("json.py", "random.py", "av.py", "sitecustomize.py", "data-code.py"):
            (code / name).write_text(self.code)
        self._pipe(self._copy("data", "data-pipe-of-captions") / "prompts.txt")
        pipe = self._copy("data", "data-pipe-of-a-clip")
        self._pipe(next((pipe / "videos").iterdir()))
        deep = self._copy("data", "data-deep") / ".cogtune"
        (deep / "files.json").write_text(DEEP)
        for entry in deep.glob("*/??/*.safetensors"):
            entry.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")

    def _models(self) -> None:
        def changed(path: Path, **values: Any) -> None:
            path.write_text(json.dumps(json.loads(path.read_text()) | values))

        pickled = self._copy("model", "model-pickled") / "text_encoder"
        for weights in pickled.glob("*.safetensors"):
            weights.unlink()
        (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(self.ran)))
        code = self._copy("model", "model-code")
        for folder in (code, code / "transformer", code / "tokenizer"):
            (folder / "evil.py").write_text(self.code)
        changed(code / "model_index.json", _class_name=["evil", "CogVideoXPipeline"], vae=["evil", "Model"])
        changed(code / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
        elsewhere = self._copy("model", "model-elsewhere")
        named = {".": ["diffusers", "X"], str(self.private): ["diffusers", "X"], "../../private": ["diffusers", "X"]}
        changed(elsewhere / "model_index.json", **named)
        stray = self._copy("model", "model-stray")
        for name in ("notes.txt", "id_rsa", "of-anna.json"):
            (stray / "vae" / name).write_text("a note of anna's")
        shards = self._copy("model", "model-shards") / "transformer"
        whole = next(shards.glob("*.safetensors"))
        index = {"metadata": {}, "weight_map": {"x": "../../../private/id_rsa", "y": str(self.private / "id_rsa")}}
        whole.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        whole.unlink()
        dimensions = self._copy("model", "model-dimensions")
        changed(dimensions / "transformer" / "config.json", sample_width=10**15, num_layers=10**15)
        changed(dimensions / "vae" / "config.json", layers_per_block=10**9)
        changed(dimensions / "text_encoder" / "config.json", num_layers=10**9, vocab_size=10**15)
        (self._copy("model", "model-deep") / "transformer" / "config.json").write_text(DEEP)
        self._pipe(next((self._copy("model", "model-pipe") / "transformer").glob("*.safetensors")))

    def _runs(self) -> None:
        private = self.private
        for part in ("launch", "logs", "samples"):
            self._linked(self._copy("out", f"run-{part}") / part, private)
        checkpoint = self._copy("out", "run-checkpoint")
        self._linked(checkpoint / "checkpoint-2", private)
        files = self._copy("out", "run-files")
        self._linked(files / ".lock", private / ".lock")
        self._linked(files / "metrics.jsonl", private / "id_rsa")
        self._linked(files / "report.html", private / "id_rsa")
        video = self._copy("out", "run-video") / "samples" / "step-000002"
        self._linked(next(video.glob("*.mp4")), private / "id_rsa")
        listed = self._copy("out", "run-list") / "samples" / "step-000002" / "samples.json"
        listed.write_text(json.dumps([{"file": "../../../../private/a.mp4", "prompt": "\u202eof\u0007"}]))
        self._linked(self._copy("out", "run-settings") / "run.yaml", private / "run.yaml")
        yaml_code = f"model: !!python/object/apply:os.mkdir ['{self.ran}']\n"
        (self._copy("out", "run-code") / "run.yaml").write_text(yaml_code)
        aliases = "\n".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9)}]" for n in range(1, 12))
        (self._copy("out", "run-aliases") / "run.yaml").write_text(f"k0: &k0 [1]\n{aliases}\n")
        pickled = self._copy("out", "run-pickled") / "checkpoint-2"
        (pickled / "optimizer.pt").write_bytes(pickle.dumps(Payload(self.ran)))
        self._pipe(self._copy("out", "run-pipe") / "checkpoint-2" / "optimizer.pt")
        (self._copy("out", "run-deep") / "checkpoint-2" / "state.json").write_text(DEEP)

    def _checkpoints(self) -> None:
        base = self.root / "base"
        random_model(seed=1).save_pretrained(base)
        for name in ("pickled", "linked", "latest", "pipe", "deep"):
            write_zero(self.root / f"zero-{name}", random_weights())
        shard = "pytorch_model/mp_rank_00_model_states.pt"
        _write_archive(self.root / "zero-pickled" / shard, pickle.dumps(Payload(self.ran), 2))
        self._linked(self.root / "zero-linked" / shard, self.private / "id_rsa")
        (self.root / "zero-latest" / "latest").write_text("../../private")
        self._pipe(self.root / "zero-pipe" / shard)
        nested = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."  # lists in lists
        _write_archive(self.root / "zero-deep" / shard, nested)

    def _loras(self) -> None:
        lora = (self.good / "out" / "pytorch_lora_weights.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", lora[:8])
        header = json.loads(lora[8 : 8 + length])

        def write(name: str, text: str) -> None:
            (self.root / f"lora-{name}.safetensors").write_bytes(
                struct.pack("<Q", len(text.encode())) + text.encode() + lora[8 + length :]
            )

        write("deep", DEEP)
        first = next(name for name in header if name != "__metadata__")
        write("huge", json.dumps(header | {first: header[first] | {"shape": [10**15, 10**15]}}))
        base = json.dumps({"base_model": str(self.root / "model-code"), "model_path": str(self.private)})
        write("elsewhere", json.dumps(header | {"__metadata__": {"format": "pt", "cogtune": base}}))

    def commands(self, home: Path) -> Iterator[tuple[str, Path, Words]]:
        """Every command that takes what others made, on each that it takes: its name, what it is given, its words."""
        size = ("--size", "9x64x96")
        good_data, good_model = self.root / "data-good", self.root / "model-good"
        for data in self.named("data"):
            words = (data, "--model", good_model, *size)
            yield "validate", data, ("dataset", "validate", *words, "--report", home / "page.html")
            yield "status", data, ("dataset", "cache", *words, "--status")
            yield "cache", data, ("dataset", "cache", *words)
            yield "verify", data, ("dataset", "cache", *words, "--verify")
            yield "prune", data, ("dataset", "cache", *words, "--prune", "--yes")
            train = ("train", "--preset", "cpu-lora-tiny", "--data", data, "--model", good_model, *size)
            yield "train", data, (*train, "--output", home / "out", "--steps", 1, "--overwrite")
        for model in self.named("model"):
            yield "plan", model, ("plan", "--model", model, *size)
            yield "infer", model, (*("infer", "--model", model, "--prompt", "x", "--steps", 1), *size)
            yield "push", model, ("push", model, "anna/model")
            yield (
                "cache",
                model,
                ("dataset", "cache", good_data, "--model", model, *size, "--cache-dir", home / "cache"),
            )
            train = ("train", "--preset", "cpu-lora-tiny", "--data", good_data, "--model", model, *size)
            yield "train", model, (*train, "--output", home / "dry", "--steps", 1, "--dry-run")
        for run in self.named("run"):
            if run.name != "run-settings":  # whoever names a link has asked for it
                settings = ("--config", run / "run.yaml", "--output", run)
                yield "train", run, ("train", *settings, "--dry-run", "--overwrite")
            yield "resume", run, ("train", "--resume", "latest", "--output", run)
            yield "infer", run, ("infer", "--lora", run, "--steps", 1)
            if run.name != "run-checkpoint":
                yield "merge", run, ("merge-zero", run / "checkpoint-2", "--output", home / "merged")
            yield "report", run, ("report", run)
            yield "push", run, ("push", run, "anna/boats")
        for zero in self.named("zero"):
            merge = ("merge-zero", zero, "--base", self.root / "base", "--output", home / "merged")
            yield "merge", zero, merge
            yield "push", zero, ("push", zero, "anna/zero")
            yield "infer", zero, ("infer", "--model", zero, "--prompt", "x", "--steps", 1)
        for lora in self.named("lora"):
            yield "infer", lora, ("infer", "--lora", lora, "--prompt", "x", "--steps", 1, "--model", good_model, *size)
            yield "push", lora, ("push", lora, "anna/lora")


def own_folders(given: Path, name: str, home: Path) -> tuple[Path, ...]:
    """Where a command may write that was given something: its home, and the cache or the run that it was asked for."""
    cache, good_cache = given / ".cogtune", given.with_name("data-good") / ".cogtune"
    asked: dict[str, tuple[Path, ...]] = {
        **dict.fromkeys(("validate", "status", "cache", "verify", "prune"), (cache,)),
        "train": (cache,) if given.name.startswith("data") else (given, good_cache),
        "resume": (given, good_cache),  # of the dataset that the run was made from
        "report": (given / "report.html",),
    }
    return (home, *asked.get(name, ()))
