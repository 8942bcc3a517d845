"""Fixtures that several test files share: tiny models, drawn clips, and the program itself."""

from __future__ import annotations

import gc
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest

from cogtune.data.synthetic import draw_dataset
from cogtune.data.video.clips import write_video
from cogtune.models import nano_models
from cogtune.models.locate import locate
from cogtune.models.variants import NANO_VARIANTS
from cogtune.run.launch import ENVIRONMENT
from cogtune.system.pool import usable_cores
from tests.support.in_process import Ran
from tests.support.in_process import run as run_in_process

EXTENSIONS = Path(os.environ.get("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions"))
"""What DeepSpeed compiles, a minute each: another environment, or another ninja, would do it over and over."""

KERNELS = EXTENSIONS / f"cogtune-{sys.implementation.cache_tag}-torch-{version('torch')}"
"""Where cogtune has them compiled; a bare script takes them from there."""

BUILD = """
from cogtune.training.deepspeed_ops import ADAM, building, load_collectives
from deepspeed.ops.op_builder import CPUAdamBuilder
load_collectives()
with building(ADAM):
    CPUAdamBuilder().load()
"""


MOST_WORKERS = 8
"""Beyond these, importing torch in each costs more than it brings."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Spread whole folders of tests over processes, half as many again as cores: many tests wait for a process."""
    options = config.option
    if os.environ.get("PYTEST_XDIST_WORKER") or not config.pluginmanager.hasplugin("xdist"):  # itself such a process
        return
    on_gpu = "gpu" in options.markexpr.replace("not gpu", "")  # one after another, since they measure its memory
    folders = all(Path(argument.partition("::")[0]).is_dir() for argument in config.args)
    if folders and not on_gpu and options.numprocesses is None and not (options.collectonly or options.usepdb):
        options.numprocesses = min(MOST_WORKERS, math.ceil(1.5 * usable_cores()))
        options.dist = "worksteal"


gc.disable()  # a quarter of the time in which all test modules are imported is the search for garbage that is not there


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Collect garbage from here on, but not among what was imported."""
    gc.freeze()
    gc.enable()


def pytest_configure() -> None:
    """Let the programs that tests start be hung up and interrupted, also where the tests run under nohup or in a
    script's background: a signal that is ignored there would be ignored by them as well, which a handler is not."""
    for name in ("SIGHUP", "SIGINT", "SIGQUIT"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile DeepSpeed's kernels before the first test, in whose time limit the minutes that it takes would fall."""
    if os.environ.get("PYTEST_XDIST_WORKER") or session.config.option.collectonly or not find_spec("deepspeed"):
        return
    if all((KERNELS / name).is_file() for name in ("cpu_adam/cpu_adam.so", "deepspeed_shm_comm/deepspeed_shm_comm.so")):
        return
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    ours = {"TORCH_EXTENSIONS_DIR": str(EXTENSIONS), "PATH": path, "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", BUILD], env={**os.environ, **ours}, stdout=sys.stderr, check=False)


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own, shared by the processes that run them, and no way to the Hub."""
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COGTUNE_HOME", str(shared / "home"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MKL_CBWR", ENVIRONMENT["MKL_CBWR"])  # many tests run training in their own process
        patch.setenv("TORCH_EXTENSIONS_DIR", str(EXTENSIONS))
        patch.setenv("PATH", os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
        yield shared / "home"


@pytest.fixture(scope="session")
def torch_forked() -> None:
    """Decoders are forked with torch imported, as in a process that encodes; a check of clips has a server without."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Put the environment back: a command that runs in the test's own process sets some of it for its children."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def tiny(home: Path) -> Callable[[str], Path]:
    """The folder of a variant's tiny model."""
    return lambda name: locate(f"tiny:{name}")


@pytest.fixture(scope="session")
def untrained_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts of the nano models, with new transformers."""
    from cogtune.modeling.nano import new_transformer
    from tools.nano.common import note

    parts = tmp_path_factory.mktemp("nano") / "parts"
    shutil.copytree(nano_models.NANO_PARTS, parts, ignore=shutil.ignore_patterns("transformer-*"))
    for name in NANO_VARIANTS:
        part = nano_models.transformer_part(name)
        new_transformer(name).half().save_pretrained(parts / part)
        note(parts, part, {})
    return parts


@pytest.fixture
def nano(home: Path, untrained_parts: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """The folder of a nano model. In the test, ``nano:NAME`` means one whose transformer is new."""
    monkeypatch.setattr(nano_models, "NANO_PARTS", untrained_parts)
    return lambda name: locate(f"nano:{name}")


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six drawn clips with captions; read only, but for the cache in ``.cogtune``, which tests share."""
    return draw_dataset(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 100 frames at 16 per second: long enough for every model."""
    root = tmp_path_factory.mktemp("film")
    (root / "videos").mkdir()
    y, x = np.mgrid[0:192, 0:288]
    frames = [
        np.stack([(x + 3 * t) % 256, (y + t) % 256, (x + y - 2 * t) % 256], axis=-1).astype(np.uint8)
        for t in range(100)
    ]
    write_video(root / "videos" / "0.mp4", np.stack(frames), 16.0)
    (root / "videos.txt").write_text("videos/0.mp4\n")
    (root / "prompts.txt").write_text("coloured stripes move to the left\n")
    return root


Cogtune = Callable[..., Ran]


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cogtune:
    """Run a command in an empty folder and in this process, which has imported everything; for what it answers."""

    def run(*words: object, status: int = 0, env: dict[str, str] | None = None) -> Ran:
        monkeypatch.chdir(tmp_path)
        for name, value in (env or {}).items():
            monkeypatch.setenv(name, value)
        return run_in_process(capsys, *words, status=status)

    return run


@pytest.fixture
def cogtune(tmp_path: Path) -> Cogtune:
    """Run the real program in an empty folder; its status and what it printed."""

    def run(
        *words: object,
        status: int = 0,
        cwd: Path = tmp_path,
        env: dict[str, str] | None = None,
        seconds: float = 1000,
    ) -> Ran:
        done = subprocess.run(
            [sys.executable, "-m", "cogtune", *map(str, words)],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == status, f"{words}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return Ran(done.returncode, done.stdout, done.stderr)

    return run
