"""``cogtune doctor``: what this machine has for cogtune, line by line: good, poor or missing, and what to do."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement

from cogtune import __version__
from cogtune.config.optimizers import OPTIMIZERS
from cogtune.models.download import home
from cogtune.planning.fit import GB, Hardware, estimate_on, local_hardware
from cogtune.system.errors import CogtuneError
from cogtune.system.gpus import Driver, driver
from cogtune.system.safe_path import STANDARD_LIBRARY

State = Literal["good", "poor", "missing"]

_SECONDS = 120.0
"""After which a probe is taken to hang."""

_SLOW_LINK = 12.0
"""GB/s: less than half of PCIe 4 with 16 lanes."""

_BUSY = 0.1
"""Share of a GPU that other programs may use before it is said."""

_ROOM = 50 * GB
"""Disk that a model, a cache and checkpoints need: 5b's weights are 22 GB, its LoRA checkpoints 0.8 GB each."""

_EXTRAS = {
    "flash-attn-4": "a faster attention kernel",
    **{facts.package: f"--optimizer {name}" for name, facts in OPTIMIZERS.items() if facts.package},
    "tensorboard": "--tracker tensorboard",
    "wandb": "--tracker wandb",
    "trackio": "--tracker trackio",
    "datasets": "--format datasets",
    "pyarrow": "tables in parquet",
}
"""Optional packages, and what each is for."""


@dataclass(frozen=True)
class Line:
    """One thing that was looked at."""

    name: str
    state: State
    found: str
    advice: str = ""
    required: bool = False
    """Whether nothing can be trained without it."""


@dataclass(frozen=True)
class Machine:
    """What the lines are made of; tests make up their own."""

    hardware: Hardware
    driver: Driver | None
    probed: Mapping[str, Any]
    """What :mod:`cogtune.modeling.probe` found, or ``error``."""
    host_free: int
    disks: Mapping[str, tuple[Path, int]]
    """Folders that will be filled, by what with, and the bytes that are free there."""
    programs: Mapping[str, str | None]
    """Paths of compilers, by name; None for those that are not there."""
    headers: bool
    """Whether Python's C headers are there."""
    versions: Mapping[str, str | None]
    """Installed packages of those that cogtune requires or can use."""
    requirements: tuple[str, ...] = ()
    login: str = ""
    """Where the Hub's token comes from, empty for none."""
    login_error: str = ""
    offline: bool = False


@dataclass(frozen=True)
class Report:
    """The lines, and what follows from them."""

    lines: tuple[Line, ...]
    presets: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether everything is there that training needs."""
        return not any(line.required and line.state == "missing" for line in self.lines)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return {"ok": self.ok, "lines": [asdict(line) for line in self.lines], "presets": list(self.presets)}


def probe() -> dict[str, Any]:
    """Return what a process of its own finds out with torch; ``error`` where it does not come back."""
    command = [sys.executable, "-m", "cogtune.modeling.probe"]
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    try:
        done = subprocess.run(
            command,
            cwd=STANDARD_LIBRARY,
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
        found = json.loads(done.stdout[done.stdout.index("{") :])
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {_SECONDS:.0f} s"}
    except ValueError:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"error": last}
    return found if isinstance(found, dict) else {"error": "no answer"}


def look() -> Machine:
    """Return this machine."""
    from cogtune.hub.remote import access_token

    login, failed = "", ""
    try:
        login = access_token(None)[1]
    except CogtuneError as error:
        failed = error.message
    places = {"the run": Path.cwd(), "cogtune's cache": home(), "the Hub's cache": _hub_cache()}
    requirements = tuple(_requirements())
    names = {Requirement(text).name for text in requirements} | set(_EXTRAS)
    return Machine(
        hardware=local_hardware(),
        driver=driver(),
        probed=probe(),
        host_free=int(psutil.virtual_memory().available),
        disks={what: (folder, _free(folder)) for what, folder in places.items()},
        programs={name: shutil.which(name) for name in ("cc", "c++", "nvcc")} | {"ninja": _ninja()},
        headers=(Path(sysconfig.get_path("include")) / "Python.h").is_file(),
        versions={name: _version(name) for name in sorted(names)},
        requirements=requirements,
        login=login,
        login_error=failed,
        offline=os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"),
    )


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _free(folder: Path) -> int:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(there).free


def _ninja() -> str | None:
    beside = Path(sys.executable).parent / "ninja"
    return shutil.which("ninja") or (str(beside) if beside.is_file() else None)


def _requirements() -> Iterator[str]:
    """Yield what cogtune requires on this system, extras left out."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for text in importlib.metadata.requires("cogtune") or ():
            needed = Requirement(text)
            if "extra" not in str(needed.marker) and (needed.marker is None or needed.marker.evaluate()):
                yield text


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine(machine: Machine) -> Report:
    """Return every line of the report on a machine."""
    presets = fitting_presets(machine.hardware)
    checks: tuple[Callable[[Machine], Iterator[Line]], ...] = (_versions, _gpus, _host, _kernels, _compilers, _rest)
    lines = [line for check in checks for line in check(machine)]
    lines.append(_presets_line(machine, presets))
    return Report(tuple(lines), presets)


def _versions(machine: Machine) -> Iterator[Line]:
    yield Line("cogtune", "good", f"{__version__}, Python {sys.version.split()[0]}")
    for text in machine.requirements:
        needed = Requirement(text)
        there = machine.versions.get(needed.name)
        install = f"pip install '{needed.name}{needed.specifier}'"
        if there is None:
            yield Line(f"package {needed.name}", "missing", "not installed", install, required=True)
        elif not needed.specifier.contains(there, prereleases=True):
            yield Line(f"package {needed.name}", "poor", f"{there}, and cogtune asks for {needed.specifier}", install)
    shown = ("torch", "diffusers", "transformers", "accelerate", "peft", "deepspeed")
    listed = ", ".join(f"{name} {machine.versions[name]}" for name in shown if machine.versions.get(name))
    if listed:
        yield Line("libraries", "good", listed)
    here, lacking = ([name for name in _EXTRAS if bool(machine.versions.get(name)) is has] for has in (True, False))
    told = ", ".join(f"{name} {machine.versions[name]}" for name in here) or "none"
    more = "; ".join(f"{name} for {_EXTRAS[name]}" for name in lacking)
    yield Line("optional packages", "good", told, f"not installed, and not needed: {more}" if more else "")


def _gpus(machine: Machine) -> Iterator[Line]:
    cards, torch = machine.hardware.cards, machine.probed.get("torch", {})
    if machine.driver is None or not cards:
        what = "no NVIDIA driver" if machine.driver is None else "no NVIDIA GPU that programs may use"
        advice = "train on a machine with an NVIDIA GPU; here, try `cogtune demo`"
        if machine.driver is not None:
            advice = "see CUDA_VISIBLE_DEVICES and `nvidia-smi`"
        yield Line("GPU", "missing", what, advice, required=True)
    else:
        yield Line("driver", "good", f"{machine.driver.version}, for CUDA up to {machine.driver.cuda}")
    for number, card in enumerate(cards):
        free = card.total - card.used
        told = f"{card.name}, {card.total / GB:.1f} GB, {free / GB:.1f} GB free"
        busy = card.used > _BUSY * card.total
        advice = "end the programs that use it (`nvidia-smi` lists them)" if busy else ""
        yield Line(f"GPU {number}", "poor" if busy else "good", told, advice)
    error = machine.probed.get("error") or machine.probed.get("torch_error")
    if error:
        yield Line("torch", "missing", f"it cannot be imported: {error}", "install torch again", required=True)
    elif cards and not torch.get("sees"):
        built = f"CUDA {torch['cuda']}" if torch.get("cuda") else "CPU only"
        cuda = machine.driver.cuda if machine.driver else ""
        advice = f"install a torch built for CUDA {cuda} or older (pytorch.org), or a newer driver"
        yield Line("torch", "missing", f"{torch.get('version')}, built for {built}, sees no GPU", advice, required=True)
    elif torch:
        yield Line("torch", "good", f"{torch['version']}, CUDA {torch['cuda']}" if cards else f"{torch['version']}")
    if torch.get("sees") and not torch.get("bf16"):
        major, minor = torch["capability"]
        told = f"compute capability {major}.{minor} has no bf16"
        yield Line("bf16", "poor", told, "only 2b trains in fp16 (--precision fp16); the others require a newer GPU")


def _host(machine: Machine) -> Iterator[Line]:
    host, free = machine.hardware.host, machine.host_free
    tight = free < 16 * GB
    advice = "close other programs; offload presets need 60 GiB and more" if tight else ""
    told = f"{host / 2**30:.0f} GiB, {free / 2**30:.0f} GiB free"
    yield Line("host memory", "poor" if tight else "good", told, advice)
    for what, (folder, room) in machine.disks.items():
        scarce = room < _ROOM
        advice = ""
        if scarce:
            move = {"the run": "--output", "cogtune's cache": "COGTUNE_HOME", "the Hub's cache": "HF_HOME"}[what]
            advice = f"free some space, or name another disk with {move}; a run of 5b takes about {_ROOM / GB:.0f} GB"
        yield Line(f"disk for {what}", "poor" if scarce else "good", f"{room / GB:.0f} GB free at {folder}", advice)


def _kernels(machine: Machine) -> Iterator[Line]:
    torch = machine.probed.get("torch", {})
    if not torch.get("sees"):
        return
    kernels: Mapping[str, float] = torch.get("attention", {})
    told = ", ".join(f"{name} {rate:.0f} TFLOP/s" for name, rate in kernels.items())
    if not kernels:
        why = torch.get("attention_error", "no fused kernel works here")
        yield Line("attention", "poor", why, "PyTorch's plain attention takes far more memory: update torch and driver")
    elif torch["capability"][0] >= 9 and "flash-attn-4" not in kernels:
        advice = (
            "flash-attn-4 is faster on this GPU: run `pip install 'cogtune[flash-attn-4]'`, then use --attention auto"
        )
        yield Line("attention", "poor", told, advice)
    else:
        yield Line("attention", "good", told)
    link = torch.get("link")
    if link is None:
        advice = "free memory on the GPU or the host, then run `cogtune doctor` again"
        yield Line("link", "poor", f"not measured: {torch.get('link_error', 'no answer')}", advice)
        return
    slow = min(link.values()) < _SLOW_LINK
    advice = (
        "check that the GPU is in a slot with 16 lanes; --vram and offload move weights over this link" if slow else ""
    )
    told = f"{link['up']:.1f} GB/s to the GPU, {link['down']:.1f} GB/s back"
    yield Line("link", "poor" if slow else "good", told, advice)


def _compilers(machine: Machine) -> Iterator[Line]:
    on_gpu = bool(machine.hardware.cards)
    lacking = [name for name in ("cc", "c++") if not machine.programs.get(name)]
    install = "apt-get install build-essential"
    if on_gpu:
        steps = [*(["a C compiler"] if "cc" in lacking else []), *([] if machine.headers else ["Python's C headers"])]
        advice = f"{install} python3-dev; until then, train with --no-compile"
        told = f"lacks {' and '.join(steps)}" if steps else "a C compiler and Python's headers are there"
        yield Line("compiled steps", "missing" if steps else "good", told, advice if steps else "")
    wants = [name for name in ("c++", "ninja") if not machine.programs.get(name)]
    if on_gpu and not machine.programs.get("nvcc"):
        wants.append("nvcc")
    told = f"lacks {', '.join(wants)}" if wants else "a C++ compiler and ninja are there"
    advice = f"{install}, pip install ninja; without, the -offload strategies' optimizer is slower" if wants else ""
    if wants == ["nvcc"]:
        advice = "install the CUDA toolkit of torch's version, if DeepSpeed's optimizer does not compile without"
    if machine.versions.get("deepspeed") is None:
        advice = "pip install deepspeed (Linux on x86-64), for the zero strategies"
        yield Line("DeepSpeed's ops", "missing", "deepspeed is not installed", advice)
    else:
        yield Line("DeepSpeed's ops", "poor" if wants else "good", told, advice)


def _rest(machine: Machine) -> Iterator[Line]:
    decoders = machine.probed.get("decoders", {})
    if av := decoders.get("av"):
        lacks = [name for name in ("h264", "hevc", "vp9", "av1") if name not in av["codecs"]]
        told = f"PyAV {av['version']}: {', '.join(av['codecs'])}"
        advice = f"clips in {', '.join(lacks)} cannot be read: pip install --upgrade av" if lacks else ""
        yield Line("decoder", "poor" if lacks else "good", told, advice)
    else:
        told = decoders.get("av_error") or "it was not found out"
        yield Line("decoder", "missing", f"PyAV: {told}", "pip install av", required=True)
    if decord := decoders.get("decord"):
        yield Line("decoder decord", "good", f"{decord['version']} (COGTUNE_DECODER=decord)")
    elif "decord_error" in decoders:
        told = f"it cannot be imported: {decoders['decord_error']}"
        yield Line("decoder decord", "poor", told, "PyAV does its work; COGTUNE_DECODER=decord would not")
    offline = "; HF_HUB_OFFLINE is set: nothing is downloaded" if machine.offline else ""
    if machine.login:
        yield Line("Hub login", "good", f"a token from {machine.login}{offline}", "`hf auth whoami` says whose it is")
    else:
        advice = "`hf auth login` or HF_TOKEN, for `cogtune push` and private repositories"
        yield Line("Hub login", "poor", f"{machine.login_error or 'none'}{offline}", advice)


def fitting_presets(hardware: Hardware) -> tuple[str, ...]:
    """Return the presets whose estimate this hardware has room for; built-in models run anywhere."""
    from cogtune.config.presets import PRESETS
    from cogtune.config.run_config import RunConfig
    from cogtune.models.variants import VARIANTS

    return tuple(
        name
        for name, row in PRESETS.items()
        if row.model not in VARIANTS or estimate_on(RunConfig.model_validate(row.values()), hardware)
    )


def _presets_line(machine: Machine, presets: tuple[str, ...]) -> Line:
    real = [name for name in presets if not name.startswith("cpu-")]
    if real:
        return Line("presets", "good", ", ".join(presets))
    advice = "`cogtune plan --preset NAME` says what one takes" if machine.hardware.cards else "they need a GPU"
    return Line("presets", "poor", f"of the real models none; {', '.join(presets)}", advice)
