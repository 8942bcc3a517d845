"""Encoding captions to T5 embeddings and clips to VAE moments, exactly as the pipelines do."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.hooks import apply_layerwise_casting
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from cogtune.config.choices import Switch
from cogtune.modeling.devices import free_bytes
from cogtune.models.geometry import Size
from cogtune.models.locate import loading

TEXT_BATCH = 8
"""Captions per batch: T5-XXL takes 7 ms per caption in such batches on an H200, and 17 ms one at a time."""

OFFLOADED_TEXT_BATCH = 64
"""Captions per batch if every layer is copied to the GPU for each batch."""

TEXT_ROOM = 1 << 30
"""Bytes that a batch of captions needs in addition to the text encoder's weights."""

_NATIVE = 480 * 720
_UNTILED_BYTES = 7.7 * 2**30
"""What the VAE's encoder takes for 9 frames of 480x720 in 16 bits (measured: 8.1 GiB with the weights)."""

BOUND = 1.1
"""How much of :func:`untiled_bytes` PyTorch may hold while a clip is encoded in one piece.

Left alone it holds 9.7 GiB to use 7.2 of them; held to this it takes 0.52 s a clip in place of 0.44 (H200, compiled).
"""

COMPILE_SECONDS = 45.0
"""What compiling the encoder for one size may cost: 34 s on an H200, and some doubt."""

SAVED_SECONDS = 0.43
"""What compiling saves a clip of 49x480x720 on an H200: 0.95 s become 0.52."""


def pixels_to_unit(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale uint8 pixels to [-1, 1], as diffusers' ``VideoProcessor`` does."""
    return (2.0 * (frames.to(torch.float32) / 255.0) - 1.0).to(dtype)


def worth_compiling(clips: int, size: Size) -> bool:
    """Return whether compiling pays off for ``clips`` clips of one size: from 105 clips of 49x480x720 on."""
    share = size.num_frames * size.height * size.width / (49 * _NATIVE)
    return clips * SAVED_SECONDS * share > COMPILE_SECONDS


def untiled_bytes(size: Size, dtype: torch.dtype) -> int:
    """Return about how much memory the VAE takes to encode a clip in one piece.

    It works through 8 frames at a time, and what is left over goes with the first 8 (``_encode`` in diffusers).
    """
    together = min(size.num_frames, 8 + size.num_frames % 8)
    frame = size.height * size.width
    clip = 3 * size.num_frames * frame * (1 + dtype.itemsize)
    return int(_UNTILED_BYTES * (frame / _NATIVE) * (together / 9) * (dtype.itemsize / 2)) + clip


class TextEncoder:
    """The checkpoint's T5 encoder and tokenizer on ``device``.

    Where the weights do not fit on the GPU they stay in the host's memory, and each layer goes there when it is due.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        max_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        float8: bool = False,
        room: int | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Load them.

        Args:
            float8: whether to store the weights of attention and of the feed-forward layer's inputs as e4m3, which
                halves them; products are in ``dtype``.
            room: bytes of the device's memory that may be used; what is free when None.
            tell: told what was decided.
        """
        folder = checkpoint / "text_encoder"
        with loading(checkpoint / "tokenizer"):
            self.tokenizer = AutoTokenizer.from_pretrained(checkpoint / "tokenizer")
        with loading(folder):
            weights = _weight_bytes(folder, dtype, float8=float8)
        free = free_bytes(device) if room is None else room
        fits = weights + TEXT_ROOM <= free or (device.type == "cpu" and room is None)
        home = device if fits else torch.device("cpu")
        with loading(folder):
            start = torch.device("cpu") if float8 else home
            self.model = T5EncoderModel.from_pretrained(folder, dtype=dtype, device_map={"": str(start)}).eval()
        if float8:
            _store_as_float8(self.model, dtype, stored=fits)
            self.model.to(home)
        self.device = device
        self.in_layers = not fits
        self.batch = TEXT_BATCH if fits else OFFLOADED_TEXT_BATCH
        self.max_tokens = max_tokens
        if not fits:
            from accelerate import cpu_offload

            tell(
                f"the text encoder takes {weights / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are free on the "
                "GPU; "
                "loading its layers one at a time, which is slower"
            )
            cpu_offload(self.model, device)

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Encode captions to ``[B, L, D]`` on the CPU, truncated at ``max_tokens`` as the pipelines do."""
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        ).input_ids
        embeddings: Tensor = self.model(tokens.to(self.device))[0]
        return embeddings.cpu()


_FLOAT8 = re.compile(r"\.(SelfAttention\.[qkvo]|DenseReluDense\.wi(_[01])?)$")
"""Layers of T5 that are stored in 8 bits. The feed-forward layer's output is not: its inputs have outliers, for which
transformers keeps it in higher precision."""


def _store_as_float8(model: T5EncoderModel, dtype: torch.dtype, *, stored: bool) -> None:
    """Round weights of a text encoder to e4m3, and unless ``stored`` back to ``dtype``: the numbers are the same."""
    for name, module in model.named_modules():
        if not _FLOAT8.search(name):
            continue
        if stored:
            apply_layerwise_casting(module, storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
        else:
            module.weight.data = module.weight.data.to(torch.float8_e4m3fn).to(dtype)


def _weight_bytes(folder: Path, dtype: torch.dtype, *, float8: bool = False) -> int:
    """Return the bytes of a component's weights in ``dtype``; T5 keeps one matrix per layer in fp32 with fp16.

    Args:
        float8: whether those that can be are stored in 8 bits.
    """
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a mapping)
                wide = dtype == torch.float16 and name.endswith(".wo.weight")
                narrow = float8 and _FLOAT8.search(name.removesuffix(".weight"))
                count = 1
                for length in weights.get_slice(name).get_shape():
                    count *= length
                total += count * (4 if wide else 1 if narrow else dtype.itemsize)
    return total


@dataclass(frozen=True)
class Encoding:
    """A clip that is being encoded; on a GPU this runs while the next clip is prepared."""

    moments: Tensor
    began: torch.cuda.Event | None
    ended: torch.cuda.Event | None
    seconds: float

    def result(self) -> tuple[Tensor, float]:
        """Wait for the moments ``[2C, F, h, w]`` on the CPU; return them and the seconds of device time."""
        if self.began is None or self.ended is None:
            return self.moments, self.seconds
        self.ended.synchronize()
        return self.moments.clone(), self.began.elapsed_time(self.ended) / 1000  # pinned memory is for the next clip


class VideoEncoder:
    """The checkpoint's VAE on ``device``.

    Args:
        tiling: encode in overlapping tiles, which takes less memory and more time; ``auto`` where a clip would not fit.
        compiled_sizes: sizes for which the encoder is compiled, unless they are tiled.
        tell: called with a message about each decision.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        tiling: Switch = "auto",
        compiled_sizes: frozenset[Size] = frozenset(),
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        with loading(checkpoint / "vae"):
            vae = AutoencoderKLCogVideoX.from_pretrained(checkpoint / "vae", dtype=dtype)
        vae.decoder = torch.nn.Identity()  # never needed here
        self.vae = vae.to(device).eval()
        self.device, self.tiling, self.tell = device, tiling, tell
        self.compiled_sizes = compiled_sizes
        self._plain = vae.encoder
        self._compiled: Any = torch.compile(vae.encoder, dynamic=False) if compiled_sizes else None
        self._tiled: dict[Size, bool] = {}
        self._bounded = device.type == "cuda"

    def moments(self, frames: Tensor) -> Tensor:
        """Encode a clip ``[F, 3, H, W]`` uint8 to moments ``[2C, F, h, w]`` on the CPU (mean, then log-variance)."""
        return self.start(frames).result()[0]

    @torch.no_grad()
    def image_moments(self, images: Tensor) -> Tensor:
        """Encode images ``[B, 3, H, W]`` in [-1, 1] to moments ``[B, 2C, 1, h, w]`` on the VAE's device."""
        parameters: Tensor = self.vae.encode(images.to(self.vae.dtype).unsqueeze(2)).latent_dist.parameters
        return parameters

    def start(self, frames: Tensor) -> Encoding:
        """Have a clip ``[F, 3, H, W]`` uint8 encoded; does not wait for a GPU to be done."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            moments = self._moments(frames)
            return Encoding(moments, None, None, time.perf_counter() - start)
        pixels = frames.pin_memory().to(self.device, non_blocking=True)
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        moments = self._moments(pixels)
        here = torch.empty(moments.shape, dtype=moments.dtype, pin_memory=True)
        here.copy_(moments, non_blocking=True)
        ended.record()
        return Encoding(here, began, ended, 0.0)

    @torch.no_grad()
    def _moments(self, pixels: Tensor) -> Tensor:
        frames, _, height, width = pixels.shape
        size = Size(frames, height, width)
        video = self._video(pixels)
        while True:
            try:
                return self._encode(video, size)
            except torch.OutOfMemoryError:
                if not self._can_make_room(size):
                    raise
            torch.cuda.empty_cache()

    def _can_make_room(self, size: Size) -> bool:
        """Return whether another way is left after running out of memory: without the bound, then in tiles."""
        if self._bounded:
            self._bounded = False
            return True
        if self.tiling != "auto" or self._is_tiled(size):
            return False
        self.tell(f"{size} does not fit on the GPU in one piece; encoding it in tiles")
        self._tiled[size] = True
        return True

    def _encode(self, video: Tensor, size: Size) -> Tensor:
        self.vae.use_tiling = self._is_tiled(size)
        if self.device.type == "cuda":
            bound = BOUND * untiled_bytes(size, self.vae.dtype) if self._bounded else float("inf")
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, bound / total), self.device.index or 0)
        if self._compiled is not None and size in self.compiled_sizes and not self.vae.use_tiling:
            try:
                return self._run(video, self._compiled)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers fail in many ways; encoding works without
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.tell(f"compiling the VAE failed; continuing without: {reason}")
                self._compiled = None
        return self._run(video, self._plain)

    def _run(self, video: Tensor, encoder: Any) -> Tensor:
        self.vae.encoder = encoder
        parameters: Tensor = self.vae.encode(video).latent_dist.parameters
        return parameters[0]

    def _video(self, pixels: Tensor) -> Tensor:
        """Convert a clip to ``[1, 3, F, H, W]`` in the VAE's precision, a few frames at a time to limit fp32 memory."""
        frames, _, height, width = pixels.shape
        video = torch.empty((1, 3, frames, height, width), dtype=self.vae.dtype, device=self.device)
        for start in range(0, frames, 8):
            part = pixels[start : start + 8].to(self.device)
            video[0, :, start : start + 8] = pixels_to_unit(part, video.dtype).transpose(0, 1)
        return video

    def _is_tiled(self, size: Size) -> bool:
        if size not in self._tiled:
            needed, free = untiled_bytes(size, self.vae.dtype), free_bytes(self.device)
            self._tiled[size] = self.tiling == "on" or (self.tiling == "auto" and needed > free)
            if self.tiling == "auto" and self._tiled[size]:
                self.tell(
                    f"encoding {size} in tiles: in one piece it takes about {needed / 2**30:.1f} GiB, "
                    f"but only {free / 2**30:.1f} GiB are free"
                )
        return self._tiled[size]
