"""The encoders: the same numbers as diffusers and transformers give, whatever is decided about memory and compiling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from cogtune.modeling import encoders
from cogtune.modeling.encoders import TextEncoder, VideoEncoder, pixels_to_unit, untiled_bytes, worth_compiling
from cogtune.models.geometry import Size

CPU = torch.device("cpu")
SIZE = Size(13, 64, 96)


@pytest.fixture
def frames() -> Tensor:
    return torch.randint(0, 256, (13, 3, 64, 96), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.fixture
def video(tiny: Callable[[str], Path]) -> Callable[..., tuple[VideoEncoder, list[str]]]:
    def made(**options: Any) -> tuple[VideoEncoder, list[str]]:
        said: list[str] = []
        return VideoEncoder(tiny("5b"), device=CPU, dtype=torch.float32, tell=said.append, **options), said

    return made


def plainly(folder: Path, frames: Tensor, *, tile: int = 0) -> Tensor:
    vae = AutoencoderKLCogVideoX.from_pretrained(folder / "vae")
    if tile:
        vae.enable_tiling(tile_sample_min_height=tile, tile_sample_min_width=tile)
    whole = pixels_to_unit(frames, torch.float32).permute(1, 0, 2, 3).unsqueeze(0)
    with torch.no_grad():
        parameters: Tensor = vae.encode(whole).latent_dist.parameters[0]
    return parameters


def test_moments_are_diffusers_own(
    video: Callable[..., tuple[VideoEncoder, list[str]]], tiny: Callable[[str], Path], frames: Tensor
) -> None:
    encoder, said = video()
    assert torch.equal(encoder.moments(frames), plainly(tiny("5b"), frames))
    assert said == []


def test_tiles_are_used_when_asked_for_or_needed(
    video: Callable[..., tuple[VideoEncoder, list[str]]],
    tiny: Callable[[str], Path],
    frames: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, tiled = plainly(tiny("5b"), frames), plainly(tiny("5b"), frames, tile=32)
    assert not torch.equal(whole, tiled)
    needed = untiled_bytes(SIZE, torch.float32)
    for tiling, free, expected in (
        ("off", 0, whole), ("auto", needed, whole), ("auto", needed - 1, tiled), ("on", needed, tiled),
    ):  # fmt: skip
        monkeypatch.setattr(encoders, "free_bytes", lambda _, free=free: free)
        encoder, said = video(tiling=tiling)
        encoder.vae.enable_tiling(tile_sample_min_height=32, tile_sample_min_width=32)
        assert torch.equal(encoder.moments(frames), expected), (tiling, free)
        assert [line.split(":")[0] for line in said] == (
            ["encoding 13x64x96 in tiles"] if (tiling, free) == ("auto", needed - 1) else []
        )


def test_running_out_of_memory_is_met_with_tiles(
    video: Callable[..., tuple[VideoEncoder, list[str]]],
    tiny: Callable[[str], Path],
    frames: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder, said = video()
    encoder.vae.enable_tiling(tile_sample_min_height=32, tile_sample_min_width=32)
    real = encoder._run

    def full(video: Tensor, module: Any) -> Tensor:
        if not encoder.vae.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(video, module)

    monkeypatch.setattr(encoder, "_run", full)
    assert torch.equal(encoder.moments(frames), plainly(tiny("5b"), frames, tile=32))
    assert said == ["13x64x96 does not fit on the GPU in one piece; encoding it in tiles"]
    other, _ = video(tiling="off")
    monkeypatch.setattr(other, "_run", full)
    other.vae.use_tiling = encoder.vae.use_tiling = False
    with pytest.raises(torch.OutOfMemoryError):
        other.moments(frames)


def test_a_compiler_that_fails_is_told_and_done_without(
    video: Callable[..., tuple[VideoEncoder, list[str]]],
    tiny: Callable[[str], Path],
    frames: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled(module, backend=failing, **options))
    encoder, said = video(compiled_sizes=frozenset({SIZE}))
    assert torch.equal(encoder.moments(frames[:9]), plainly(tiny("5b"), frames[:9]))  # of a size that is not compiled
    assert said == []
    assert torch.equal(encoder.moments(frames), plainly(tiny("5b"), frames))
    assert len(said) == 1
    assert said[0].startswith("compiling the VAE failed; continuing without: ")
    encoder.moments(frames)
    assert len(said) == 1


def failing(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler here")


def test_a_compiled_encoder_is_used_for_its_sizes(
    video: Callable[..., tuple[VideoEncoder, list[str]]],
    tiny: Callable[[str], Path],
    frames: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled(module, backend=backend, **options))
    encoder, said = video(compiled_sizes=frozenset({Size(17, 64, 96)}))
    encoder.moments(frames)
    assert graphs == []
    longer = torch.cat([frames, frames[:4]])
    assert torch.equal(encoder.moments(longer), plainly(tiny("5b"), longer))
    made = len(graphs)
    assert made == 2  # the first nine frames, and the eight that follow with what those left behind
    encoder.moments(longer)
    assert len(graphs) == made
    assert said == []


def test_compiling_pays_from_so_many_clips() -> None:
    native = Size(49, 480, 720)
    assert not worth_compiling(104, native)
    assert worth_compiling(105, native)
    assert worth_compiling(21, Size(81, 768, 1360))


def test_what_an_untiled_clip_takes() -> None:
    gib = 2**30
    assert 7.5 < untiled_bytes(Size(49, 480, 720), torch.bfloat16) / gib < 8.1
    assert 23 < untiled_bytes(Size(81, 768, 1360), torch.bfloat16) / gib < 25
    # 21 frames go through as 13 and 8
    ratio = untiled_bytes(Size(21, 480, 720), torch.bfloat16) / untiled_bytes(Size(17, 480, 720), torch.bfloat16)
    assert 1.4 < ratio < 1.5


def test_a_text_encoder_that_does_not_fit_is_lent_layer_by_layer(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU is at hand: that the decision is right, and that accelerate is asked with the device that was given."""
    lent: list[torch.device] = []
    monkeypatch.setattr("accelerate.cpu_offload", lambda model, device: lent.append(device))
    weights = sum(parameter.numel() * 4 for parameter in TextEncoder(
        tiny("2b"), max_tokens=226, device=CPU, dtype=torch.float32
    ).model.parameters())  # fmt: skip
    cuda = torch.device("cuda")
    said: list[str] = []
    monkeypatch.setattr(encoders, "free_bytes", lambda _: weights + encoders.TEXT_ROOM - 1)
    encoder = TextEncoder(tiny("2b"), max_tokens=226, device=cuda, dtype=torch.float32, tell=said.append)
    assert lent == [cuda]
    assert encoder.batch == encoders.OFFLOADED_TEXT_BATCH
    assert encoder.model.device == CPU
    assert len(said) == 1
    assert "loading its layers one at a time" in said[0]
