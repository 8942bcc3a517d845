"""``cogtune infer`` against plain diffusers, frame for frame, whatever weights it is given, in little memory too.

The slow tests of :mod:`tests.modeling.test_weights_in_diffusers` do the same with weights that were trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
    DiffusionPipeline,
)
from PIL import Image

from cogtune.commands.infer import making
from cogtune.commands.infer.filling import fill_in
from cogtune.commands.infer.request import InferRequest
from cogtune.config.arrangement import SamplingArrangement
from cogtune.data.video.clips import read_frames, write_video
from cogtune.modeling.adapters import add_lora, save_lora
from cogtune.modeling.encoders import TextEncoder
from cogtune.modeling.video_sampler import VideoSampler
from cogtune.models.checkpoint_configs import published_spec
from cogtune.models.variants import VARIANTS
from cogtune.planning.sampling_memory import GB, SamplingTask, arrangement_for, plan_sampling, sampling_bytes, what_fits
from cogtune.run.checkpoints import FORMAT
from cogtune.system.errors import CogtuneError, UsageError
from tests.support.infer_frames import first_of, render_request

PROMPT = "a red disc"
FRAMES = 9
"""Three latent frames, which 1.5 pads to four."""
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
MODELS = pytest.mark.parametrize("name", VARIANTS)
Video = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 17 frames: a gradient that moves."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    x = np.arange(96)[None, :] + np.zeros((64, 1), int)
    frames = [np.stack([(2 * x + 5 * t) % 256, 255 - 2 * x, x + t], -1).astype(np.uint8) for t in range(17)]
    write_video(path, np.stack(frames), 16.0)
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(PICTURE).save(tmp_path / "first.png")
    return tmp_path / "first.png"


def pipeline_of(kind: type[DiffusionPipeline], folder: Path, scheduler: Any = None) -> Any:
    """The guides' own recipe: diffusers alone, nothing of cogtune's."""
    pipeline = kind.from_pretrained(folder, dtype=torch.float32)
    if scheduler is None:
        shifted = pipeline.scheduler.config.snr_shift_scale != 1.0
        scheduler = CogVideoXDDIMScheduler if shifted else CogVideoXDPMScheduler
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampled_by(pipeline: Any, **inputs: Any) -> Any:
    given = {
        "prompt": PROMPT, "height": 64, "width": 96, "num_inference_steps": 2, "guidance_scale": 6.0,
        "use_dynamic_cfg": isinstance(pipeline.scheduler, CogVideoXDPMScheduler),
        "generator": torch.Generator().manual_seed(42), "output_type": "np",
    }  # fmt: skip
    return pipeline(**given | inputs).frames


def as_bytes(video: Video) -> Video:
    return (video * 255).round().astype(np.uint8)


def plainly(name: str, pipeline: Any) -> Video:
    image = {"image": Image.fromarray(PICTURE)} if name.endswith("i2v") else {}
    return as_bytes(sampled_by(pipeline, num_frames=FRAMES, **image)[0])


def lora_of(folder: Path, path: Path, seed: int = 3, **facts: Any) -> Path:
    """A LoRA that changes the model, at half of its strength as diffusers guesses it."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(folder / "transformer")
    add_lora(transformer, rank=4, alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], seed=seed)
    random = torch.Generator().manual_seed(seed)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)
    save_lora(path, transformer, facts)
    return path


@MODELS
def test_lora_merged_and_full_weights_give_the_frames_of_plain_diffusers(
    name: str, tmp_path: Path, tiny: Callable[[str], Path], picture: Path
) -> None:
    base = tiny(name)
    size = f"{FRAMES}x64x96"
    shared: dict[str, Any] = {"prompts": (PROMPT,), "steps": 2, "precision": "fp32", "size": size}
    shared |= {"images": (picture,)} if name.endswith("i2v") else {}

    lora = lora_of(base, tmp_path / "pytorch_lora_weights.safetensors")
    ours = render_request(InferRequest(model=str(base), loras=(str(lora),), **shared))
    assert ours.shape == (FRAMES, 64, 96, 3)
    pipeline = pipeline_of(CogVideoXImageToVideoPipeline if name.endswith("i2v") else CogVideoXPipeline, base)
    pipeline.load_lora_weights(lora)
    assert np.array_equal(ours, plainly(name, pipeline))

    changed = CogVideoXTransformer3DModel.from_pretrained(base / "transformer")
    with torch.no_grad():
        changed.transformer_blocks[0].attn1.to_v.weight.mul_(-1)
    merged, checkpoint = tmp_path / "merged", tmp_path / "run" / "checkpoint-2"
    merged.mkdir()
    for part in base.iterdir():
        (merged / part.name).symlink_to(part)
    (merged / "transformer").unlink()
    for folder in (merged, checkpoint):
        changed.save_pretrained(folder / "transformer")
    facts = {"base_model": f"tiny:{name}", "model_path": str(base), "size": size, "precision": "fp32"}
    (merged / "merge.json").write_text(json.dumps({"run": facts}))
    (checkpoint / "state.json").write_text(json.dumps({"format": FORMAT, "step": 2, "identity": {}, **facts}))
    pipeline.transformer = changed
    expected = plainly(name, pipeline)
    assert np.abs(expected.astype(int) - ours).max() > 8
    for model in (merged, checkpoint.parent):
        assert np.array_equal(render_request(InferRequest(model=str(model), **shared)), expected), model


@pytest.mark.parametrize("name", ["2b", "5b"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_video_of_a_video_is_that_of_plain_diffusers(
    name: str, strength: float, tiny: Callable[[str], Path], clip: Path
) -> None:
    video = list(map(Image.fromarray, read_frames(clip, range(9))))
    pipeline = pipeline_of(CogVideoXVideoToVideoPipeline, tiny(name))
    expected = as_bytes(sampled_by(pipeline, video=video, num_inference_steps=4, strength=strength)[0])
    shared: dict[str, Any] = {"prompts": (PROMPT,), "steps": 4, "precision": "fp32", "fps": 16}
    ours = render_request(InferRequest(model=f"tiny:{name}", videos=(clip,), strength=strength, **shared))
    assert np.array_equal(ours, expected)


def test_a_video_of_a_video_for_1_5_is_padded_as_the_model_was_trained(tiny: Callable[[str], Path], clip: Path) -> None:
    """diffusers refuses five latent frames for patches of two: here six of its own making go through its pipeline."""
    pipeline = pipeline_of(CogVideoXVideoToVideoPipeline, tiny("1.5-5b"))
    generator = torch.Generator().manual_seed(42)
    video = pipeline.video_processor.preprocess_video(list(map(Image.fromarray, read_frames(clip, range(17)))))
    latents = pipeline.vae.encode(video).latent_dist.sample(generator) * pipeline.vae.config.scaling_factor
    latents = torch.cat([latents[:, :, :1], latents], dim=2).permute(0, 2, 1, 3, 4)
    noise = torch.randn(latents.shape, generator=generator)
    pipeline.scheduler.set_timesteps(4)
    noised = pipeline.scheduler.add_noise(latents.detach(), noise, pipeline.scheduler.timesteps[2:3])
    given = {"latents": noised, "strength": 0.5, "num_inference_steps": 4, "generator": generator}
    made = sampled_by(pipeline, output_type="latent", **given)
    with torch.no_grad():
        expected = pipeline.video_processor.postprocess_video(pipeline.decode_latents(made[:, 1:]), "np")[0]
    shared: dict[str, Any] = {"prompts": (PROMPT,), "steps": 4, "precision": "fp32", "size": "17x64x96"}
    ours = render_request(InferRequest(model="tiny:1.5-5b", videos=(clip,), strength=0.5, **shared))
    assert np.array_equal(ours, as_bytes(expected))


@pytest.mark.parametrize("name", ["5b-i2v", "1.5-5b-i2v"])
def test_an_image_to_video_model_makes_a_video_of_a_video(name: str, tiny: Callable[[str], Path], clip: Path) -> None:
    """From pure noise it is what diffusers makes of the clip's first frame; from little noise it is nearly the clip."""
    shared: dict[str, Any] = {
        "prompts": (PROMPT,), "videos": (clip,), "precision": "fp32", "fps": 16, "frames": FRAMES
    }  # fmt: skip
    ours = render_request(InferRequest(model=f"tiny:{name}", strength=1.0, steps=2, **shared))
    pipeline = pipeline_of(CogVideoXImageToVideoPipeline, tiny(name))
    generator = torch.Generator().manual_seed(42)
    shape = (1, 16, (FRAMES - 1) // 4 + 1, 8, 12)
    torch.randn(shape, generator=generator)  # what the clip's latents are drawn with
    count = shape[2] + shape[2] % 2 if name.startswith("1.5") else shape[2]
    noise = torch.randn((1, count, 16, 8, 12), generator=generator)
    image = Image.fromarray(read_frames(clip, [0])[0])
    expected = sampled_by(pipeline, image=image, num_frames=FRAMES, latents=noise, generator=generator)[0]
    assert np.array_equal(ours, as_bytes(expected))

    near = render_request(InferRequest(model=f"tiny:{name}", strength=0.02, steps=50, **shared)).astype(int)
    video = pipeline.video_processor.preprocess_video(list(map(Image.fromarray, read_frames(clip, range(FRAMES)))))
    with torch.no_grad():
        seen = pipeline.vae.decode(pipeline.vae.encode(video).latent_dist.mode()).sample
    again = as_bytes(pipeline.video_processor.postprocess_video(seen, "np")[0])
    assert np.abs(near - again).mean() < 0.5 * np.abs(ours.astype(int) - again).mean()


def test_several_loras_have_their_weights_and_a_sweep_scales_them(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    one, other = (lora_of(tiny("2b"), tmp_path / f"{seed}.safetensors", seed) for seed in (3, 4))
    pipeline = pipeline_of(CogVideoXPipeline, tiny("2b"))
    pipeline.load_lora_weights(one, adapter_name="one")
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        pipeline.load_lora_weights(other, adapter_name="other")

    def expected(*weights: float) -> Video:
        pipeline.set_adapters(["one", "other"], list(weights))
        return as_bytes(sampled_by(pipeline, num_frames=9)[0])

    loras = (f"{one}:0.8", f"{other}:-0.5")
    shared: dict[str, Any] = {"model": "tiny:2b", "prompts": (PROMPT,), "steps": 2, "precision": "fp32"}
    recipe = fill_in(InferRequest(loras=loras, lora_scales=(1.0, 0.5), **shared))
    sampler = VideoSampler(making.setup_of(recipe), [PROMPT, ""])
    for scale, weights in ((1.0, (0.8, -0.5)), (0.5, (0.4, -0.25)), (1.0, (0.8, -0.5))):
        ours = sampler.sample(making.load_inputs(recipe, recipe.rows[0], 42, scale))
        assert np.array_equal(ours, expected(*weights)), scale


def test_scheduler_and_negative_prompt_are_those_asked_for(tiny: Callable[[str], Path]) -> None:
    shared: dict[str, Any] = {"model": "tiny:2b", "prompts": (PROMPT,), "steps": 2, "precision": "fp32"}
    ours = render_request(InferRequest(scheduler="dpm", negative_prompt="a boat", guidance=3.0, **shared))
    pipeline = pipeline_of(CogVideoXPipeline, tiny("2b"), CogVideoXDPMScheduler)
    expected = sampled_by(pipeline, num_frames=9, negative_prompt="a boat", guidance_scale=3.0)[0]
    assert np.array_equal(ours, as_bytes(expected))


# ------------------------------------------------------------------------------------------------ in little memory


@pytest.mark.parametrize("name", ["5b", "1.5-5b-i2v"])
def test_streamed_weights_give_the_same_frames_to_the_bit(
    name: str, tmp_path: Path, tiny: Callable[[str], Path], picture: Path
) -> None:
    lora = lora_of(tiny(name), tmp_path / "lora.safetensors")
    images = (picture,) if name.endswith("i2v") else ()
    recipe = fill_in(
        InferRequest(
            model=f"tiny:{name}", loras=(str(lora),), prompts=(PROMPT,), images=images, steps=2, lora_scales=(0.5, 1.0)
        )
    )
    rows, both = recipe.rows[0], (0.5, 1.0)

    def videos(arrangement: SamplingArrangement, room: int | None = None) -> list[Video]:
        told: list[str] = []
        setup = making.setup_of(replace(recipe, arrangement=arrangement, room=room))
        sampler = VideoSampler(setup, [PROMPT, ""], told.append)
        assert any("loading its layers one at a time" in line for line in told) == (room is not None)
        return [sampler.sample(making.load_inputs(recipe, rows, 42, scale)) for scale in both]

    plain = videos(SamplingArrangement())
    assert not np.array_equal(plain[0], plain[1])
    blocks = recipe.spec.num_layers
    for arrangement, room in (
        (SamplingArrangement(streamed_blocks=blocks, slots=1), None),
        (SamplingArrangement(streamed_blocks=1), 2**20),
    ):
        assert all(map(np.array_equal, videos(arrangement, room), plain)), arrangement


def test_guidance_one_by_one_and_tiles_change_next_to_nothing(tiny: Callable[[str], Path]) -> None:
    recipe = fill_in(InferRequest(model="tiny:5b", prompts=(PROMPT,), steps=2, precision="fp32"))
    plain = first_of(recipe).astype(int)
    split = first_of(replace(recipe, arrangement=SamplingArrangement(split_guidance=True)))
    assert np.abs(split - plain).max() <= 1
    tiles = first_of(replace(recipe, arrangement=SamplingArrangement(vae_tiles=True)))
    assert tiles.shape == plain.shape


def test_a_base_in_fp8_changes_frames_a_little_wherever_it_is(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    lora = lora_of(tiny("5b"), tmp_path / "lora.safetensors")
    request = InferRequest(model="tiny:5b", loras=(str(lora),), prompts=(PROMPT,), steps=2, precision="fp32")
    plain = first_of(fill_in(request)).astype(int)
    recipe = fill_in(replace(request, base_precision="fp8"))
    quantized = first_of(recipe).astype(int)
    off = np.abs(quantized - plain).mean()
    assert 0 < off < 4, off
    streamed = first_of(replace(recipe, arrangement=SamplingArrangement(streamed_blocks=9)))
    assert np.array_equal(streamed, quantized)
    split = first_of(replace(recipe, arrangement=SamplingArrangement(split_guidance=True)))
    # Scales are a sample's own (test_float8), but products of one sample and of two differ in their last bits, which
    # 8 bits round up or down: less of a change than that of fp8 itself, and how much depends on the processor.
    assert np.abs(split - quantized).mean() < off


def test_a_text_encoder_in_fp8_has_rounded_weights_wherever_it_is(tiny: Callable[[str], Path]) -> None:
    folder = tiny("5b")
    texts = [PROMPT, "a boat on a river"]
    given: dict[str, Any] = {"max_tokens": 226, "device": torch.device("cpu"), "dtype": torch.bfloat16}
    plain = TextEncoder(folder, **given).encode(texts)
    stored = TextEncoder(folder, float8=True, **given)
    assert not stored.in_layers
    embeddings = stored.encode(texts)
    assert not torch.equal(embeddings, plain)
    in_layers = TextEncoder(folder, float8=True, room=2**20, **given)
    assert in_layers.in_layers
    assert torch.equal(in_layers.encode(texts), embeddings)

    rounded = TextEncoder(folder, **given)
    names = ("q.weight", "k.weight", "v.weight", "o.weight", "wi_0.weight", "wi_1.weight")
    wanted = {name for name, _ in rounded.model.named_parameters() if name.endswith(tuple(f".{end}" for end in names))}
    assert len(wanted) == 6 * rounded.model.config.num_layers
    for name, parameter in rounded.model.named_parameters():
        if name in wanted:
            parameter.data = parameter.data.to(torch.float8_e4m3fn).to(torch.bfloat16)
    assert torch.equal(rounded.encode(texts), embeddings)
    held = {name for name, weight in stored.model.named_parameters() if weight.dtype == torch.float8_e4m3fn}
    assert held == wanted


def test_fp8_halves_a_blocks_products(tiny: Callable[[str], Path]) -> None:
    """Of 5b's 5.57 billion weights 4.76 are attention's and the feed-forward layers': 12 squares of 3072 a block."""
    spec = published_spec(VARIANTS["5b"])
    task = SamplingTask(spec, spec.native, "bf16")
    whole, quantized = (sampling_bytes(what, SamplingArrangement()) for what in (task, replace(task, float8=True)))
    assert whole - quantized == 42 * 12 * 3072**2
    streamed = SamplingArrangement(streamed_blocks=42)
    whole, quantized = (sampling_bytes(what, streamed) for what in (task, replace(task, float8=True)))
    assert whole - quantized == 2 * 12 * 3072**2


def test_a_vae_that_is_out_of_memory_goes_on_in_tiles(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKLCogVideoX

    whole, tried = AutoencoderKLCogVideoX._decode, []

    def exhausted(self: Any, *given: Any, **more: Any) -> Any:
        tried.append(self.use_tiling)
        if not self.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(self, *given, **more)

    monkeypatch.setattr(AutoencoderKLCogVideoX, "_decode", exhausted)
    assert render_request(InferRequest(model="tiny:2b", prompts=(PROMPT,), steps=1)).shape == (9, 64, 96, 3)
    assert tried == [False, True]


@MODELS
def test_the_less_memory_the_more_is_given_up_and_never_more_than_asked_for(name: str) -> None:
    spec = published_spec(VARIANTS[name])
    task, before = SamplingTask(spec, spec.native, "bf16", adapters=100_000_000), 10**12
    for budget in (80, 48, 24, 16, 12, 10):
        arrangement, needed, fits = plan_sampling(task, budget * GB)
        assert fits
        assert needed == sampling_bytes(task, arrangement) <= budget * GB
        assert needed <= before
        before = needed
    assert plan_sampling(SamplingTask(spec, spec.native, "bf16"), 80 * GB)[0] == SamplingArrangement()
    assert arrangement.streamed_blocks > 0
    assert arrangement.vae_tiles


def test_a_budget_that_is_not_enough_is_told_with_the_least_that_is() -> None:
    spec = published_spec(VARIANTS["5b"])
    task = SamplingTask(spec, spec.native, "bf16")
    with pytest.raises(UsageError, match="--vram 4GB is too small") as caught:
        arrangement_for(task, 4 * GB)
    least = float(caught.value.hint.split("GB")[0].split()[-1])
    assert arrangement_for(task, int(least * GB)).streamed_blocks == spec.num_layers


def test_out_of_memory_says_what_is_free_and_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full-size 5b on an H200 of which other programs leave 7.7 GB."""
    spec = published_spec(VARIANTS["5b"])
    task = SamplingTask(spec, spec.native, "bf16")
    told = what_fits(task, int(7.9 * GB), tried=SamplingArrangement())
    assert told.startswith("use --vram 7.9GB, an estimated 7.")
    assert "of 42 blocks streamed from the host" in told
    told = what_fits(task, 3 * GB, tried=SamplingArrangement())
    assert told.startswith("use a smaller --size or fewer --frames, or free memory on the GPU")

    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which 1.17 GiB is "
        "free. Including non-PyTorch memory, this process has 6.00 GiB memory in use."
    )

    class Exhausted:
        def __init__(self, *_: Any) -> None:
            raise error

    monkeypatch.setattr(making, "VideoSampler", Exhausted)
    with pytest.raises(CogtuneError, match=r"out of GPU memory while sampling: 7\.7 GB of") as caught:
        making.generate(InferRequest(model="tiny:2b", prompts=("x",), output=tmp_path))
    assert "an estimated" in caught.value.hint
