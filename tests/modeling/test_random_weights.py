"""Pipelines with random weights: shaped like the published ones, whole on disk, and able to learn."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DiffusionPipeline
from peft import LoraConfig
from PIL import Image
from safetensors import safe_open
from transformers import AutoTokenizer, T5Tokenizer

from cogtune.modeling import random_weights
from cogtune.modeling.conditioning import (
    conditioning_of,
    pad_front,
    place_image,
    predict,
    scale_image_latents,
    scale_video_latents,
)
from cogtune.modeling.random_weights import build_text_encoder, build_transformer, build_vae, write_pipeline
from cogtune.models import tiny_models
from cogtune.models.checkpoint_configs import read_spec
from cogtune.models.geometry import Size
from cogtune.models.random_configs import scheduler_config, text_encoder_config, transformer_config, vae_config
from cogtune.models.tiny_models import tiny_model
from cogtune.models.variants import VARIANTS
from cogtune.system.digests import digest_file
from cogtune.system.errors import CogtuneError, UsageError
from tests.support.forked_workers import start_process
from tests.support.sampling import sampled
from tests.support.waiting import wait_until

META = torch.device("meta")
CPU = torch.device("cpu")
TINY_MB = 20
EVERY = pytest.mark.parametrize("name", VARIANTS)

PARAMETERS = {
    "2b": 1_693_783_872,
    "5b": 5_570_283_072,
    "5b-i2v": 5_570_479_680,
    "1.5-5b": 5_570_676_352,
    "1.5-5b-i2v": 5_571_594_880,
}
IN_CHANNELS = {"2b": 16, "5b": 16, "5b-i2v": 32, "1.5-5b": 16, "1.5-5b-i2v": 32}
SCALING = {"2b": 1.15258426, "5b": 0.7, "5b-i2v": 0.7, "1.5-5b": 0.7, "1.5-5b-i2v": 0.7}


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def files_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): digest_file(path) for path in folder.rglob("*") if path.is_file()}


def moving_disc(size: Size) -> torch.Tensor:
    """A disc that crosses a shaded background, ``[1, 3, F, H, W]`` in [-1, 1]."""
    y, x = torch.meshgrid(torch.arange(size.height), torch.arange(size.width), indexing="ij")
    frames = []
    for index in range(size.num_frames):
        left = 20 + 60 * index / size.num_frames
        disc = ((y - 32) ** 2 + (x - left) ** 2 < 14**2).float()
        ground = torch.stack([x / size.width, y / size.height, torch.full(x.shape, 0.3)])
        frames.append(ground * (1 - disc) + torch.tensor([0.9, 0.2, 0.1]).view(3, 1, 1) * disc)
    return torch.stack(frames, dim=1)[None] * 2 - 1


@EVERY
def test_a_full_transformer_is_the_published_one(name: str) -> None:
    variant = VARIANTS[name]
    model = build_transformer(variant, "full", device=META, dtype=torch.bfloat16)
    assert count(model) == PARAMETERS[name]
    tensors = [*model.parameters(), *model.buffers()]
    assert {(tensor.dtype, tensor.device.type) for tensor in tensors} == {(torch.bfloat16, "meta")}

    layers, width = (30, 1920) if name == "2b" else (42, 3072)
    blocks = model.transformer_blocks
    assert len(blocks) == layers
    for block in (blocks[0], blocks[-1]):
        assert [part for part, _ in block.named_children()] == ["norm1", "attn1", "norm2", "ff"]
        assert block.attn1.to_q.weight.shape == block.attn1.to_out[0].weight.shape == (width, width)
        assert block.attn1.to_q.bias is not None
        assert block.attn1.heads == width // 64
        assert block.attn1.norm_q.weight.shape == (64,)
        assert block.ff.net[0].proj.weight.shape == (4 * width, width)
        assert block.norm1.linear.weight.shape == (6 * width, 512)

    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    temporal = name.startswith("1.5")
    patch = state["patch_embed.proj.weight"]
    assert patch == ((width, 8 * IN_CHANNELS[name]) if temporal else (width, IN_CHANNELS[name], 2, 2))
    assert state["proj_out.weight"] == (16 * (8 if temporal else 4), width)
    assert state["patch_embed.text_proj.weight"] == (width, 4096)
    assert state["time_embedding.linear_1.weight"] == (512, width)
    # Learned positions are saved; sin-cos ones are computed, rotary ones are no part of the model.
    assert ("patch_embed.pos_embedding" in state) is (name == "5b-i2v")
    assert hasattr(model.patch_embed, "pos_embedding") is (name in ("2b", "5b-i2v"))
    if name == "5b-i2v":
        assert state["patch_embed.pos_embedding"] == (1, 226 + 13 * 30 * 45, 3072)
    assert state.get("ofs_embedding.linear_1.weight") == ((512, 512) if name == "1.5-5b-i2v" else None)


def test_the_full_vae_and_text_encoder_are_the_published_ones() -> None:
    variant = VARIANTS["5b"]
    vae = build_vae(variant, "full", device=META, dtype=torch.bfloat16)
    assert count(vae) == 215_583_907
    assert vae.encoder.conv_out.conv.weight.shape[0] == 2 * 16
    assert [block.resnets[0].conv1.conv.weight.shape[0] for block in vae.encoder.down_blocks] == [128, 256, 256, 512]

    encoder = build_text_encoder(variant, "full", device=META, dtype=torch.bfloat16)
    assert count(encoder) == 4_762_310_656
    assert encoder.shared.weight.shape == (32128, 4096)
    assert len(encoder.encoder.block) == 24
    feed_forward = encoder.encoder.block[-1].layer[1].DenseReluDense
    assert feed_forward.wi_0.weight.shape == feed_forward.wi_1.weight.shape == (10240, 4096)


def test_full_configs_say_what_the_published_ones_say() -> None:
    assert transformer_config(VARIANTS["1.5-5b-i2v"], "full") == {
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": 64,
        "dropout": 0.0,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 32,
        "max_text_seq_length": 226,
        "norm_elementwise_affine": True,
        "norm_eps": 1e-05,
        "num_attention_heads": 48,
        "num_layers": 42,
        "ofs_embed_dim": 512,
        "out_channels": 16,
        "patch_bias": False,
        "patch_size": 2,
        "patch_size_t": 2,
        "sample_frames": 81,
        "sample_height": 300,
        "sample_width": 300,
        "spatial_interpolation_scale": 1.875,
        "temporal_compression_ratio": 4,
        "temporal_interpolation_scale": 1.0,
        "text_embed_dim": 4096,
        "time_embed_dim": 512,
        "timestep_activation_fn": "silu",
        "use_learned_positional_embeddings": False,
        "use_rotary_positional_embeddings": True,
    }
    for name, variant in VARIANTS.items():
        config = transformer_config(variant, "full")
        assert config["in_channels"] == IN_CHANNELS[name]
        assert config["use_rotary_positional_embeddings"] is (name != "2b")
        assert config["patch_size_t"] == (2 if name.startswith("1.5") else None)
        vae = vae_config(variant, "full")
        assert (vae["scaling_factor"], vae["invert_scale_latents"]) == (SCALING[name], name.startswith("1.5"))
        assert scheduler_config(variant, "full")["snr_shift_scale"] == (3.0 if name == "2b" else 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [build_transformer, build_vae, build_text_encoder])
def test_weights_are_random_and_torch_is_left_as_it_was(build: Callable[..., Any], dtype: torch.dtype) -> None:
    torch.manual_seed(123)
    before, variant = torch.get_rng_state(), VARIANTS["5b-i2v"]
    one, same, other = (build(variant, "tiny", device="cpu", dtype=dtype, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(0).device == CPU
    assert not one.training
    for (key, value), copy, changed in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert value.dtype == dtype
        assert value.requires_grad
        assert torch.equal(value, copy), key
        if value.dim() > 1:
            assert 1e-3 < value.float().std() < 3, key
            assert not torch.equal(value, changed), key


def test_the_default_dtype_comes_back_after_a_failure() -> None:
    with pytest.raises(ZeroDivisionError), random_weights._seeded_init(CPU, torch.float16, 0):
        raise ZeroDivisionError
    assert torch.get_default_dtype() == torch.float32


@EVERY
def test_a_tiny_pipeline_agrees_with_its_variant(name: str, tiny: Callable[[str], Path]) -> None:
    folder, variant = tiny(name), VARIANTS[name]
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < TINY_MB * 1e6
    assert sorted(files_of(folder)) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/added_tokens.json",
        "tokenizer/special_tokens_map.json",
        "tokenizer/spiece.model",
        "tokenizer/tokenizer_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    spec = read_spec(folder)
    assert spec.variant.name == name
    assert spec.native == (Size(17, 64, 96) if name.startswith("1.5") else Size(9, 64, 96))
    assert spec.size_problems(spec.native) == []
    assert spec.size_advice(spec.native) == []
    assert spec.image_to_video is variant.image_to_video
    assert spec.patch_size_t == variant.patch_size_t
    assert spec.rotary is variant.rotary
    assert spec.learned_positions is variant.learned_positions
    assert (spec.ofs_embed_dim is None) is (variant.ofs_embed_dim is None)
    assert spec.max_text_seq_length == 226
    assert spec.scaling_factor == variant.vae_scaling_factor
    assert spec.invert_scale_latents is variant.invert_scale_latents
    assert spec.snr_shift_scale == variant.snr_shift_scale
    assert spec.num_train_timesteps == 1000


@EVERY
def test_a_tiny_pipeline_generates_at_its_native_size(name: str, tiny: Callable[[str], Path]) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny(name))
    pipeline.set_progress_bar_config(disable=True)
    kind = "CogVideoXImageToVideoPipeline" if name.endswith("i2v") else "CogVideoXPipeline"
    assert type(pipeline).__name__ == kind
    assert isinstance(pipeline.scheduler, CogVideoXDDIMScheduler)
    native = read_spec(tiny(name)).native
    image = {"image": Image.new("RGB", (native.width, native.height), "red")} if name.endswith("i2v") else {}

    def frames(prompt: str) -> Any:
        random = torch.Generator().manual_seed(0)
        size = {"num_frames": native.num_frames, "height": native.height, "width": native.width}
        made = pipeline(prompt=prompt, num_inference_steps=2, generator=random, output_type="np", **size, **image)
        return made.frames[0]

    video = frames("a red disc rolls to the left")
    assert video.shape == (native.num_frames, native.height, native.width, 3)
    assert np.isfinite(video).all()
    assert 0.05 < video.std() < 0.5
    assert np.abs(video[0] - video[-1]).mean() > 0.005  # it moves
    assert np.abs(video - frames("snow falls on a quiet street")).max() > 1e-4  # the prompt counts


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    variant = VARIANTS["1.5-5b-i2v"]
    one, same, other = (
        files_of(write_pipeline(variant, tmp_path / label, seed=seed))
        for label, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert one == same
    assert {path for path in one if one[path] != other[path]} == {path for path in one if path.endswith("safetensors")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other", "same"]


@pytest.mark.parametrize(("name", "dtype"), [("2b", "F16"), ("5b-i2v", "BF16")])
def test_full_weights_are_in_the_precision_of_training(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for config in (transformer_config, vae_config, text_encoder_config):
        monkeypatch.setattr(random_weights, config.__name__, lambda row, _scale, config=config: config(row, "tiny"))
    folder = write_pipeline(VARIANTS[name], tmp_path / "full", scale="full")
    seen = set()
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            seen |= {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118 - not a mapping
    assert seen == {dtype}


def test_a_folder_that_cannot_be_written_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CogtuneError, match="cannot write"):
        write_pipeline(VARIANTS["2b"], tmp_path / "file" / "folder")


def test_the_tokenizer_is_one_of_t5(tiny: Callable[[str], Path]) -> None:
    folder = tiny("2b") / "tokenizer"
    rows = json.loads((tiny("2b") / "text_encoder" / "config.json").read_text())["vocab_size"]
    for tokenizer in (T5Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)):
        assert isinstance(tokenizer, T5Tokenizer)
        assert [tokenizer.convert_tokens_to_ids(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
        assert tokenizer.model_max_length == 226
        assert len(tokenizer) <= rows
        # The sentinels come last, counted down, as in the published vocabulary
        assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == len(tokenizer) - 1
        assert tokenizer.convert_tokens_to_ids("<extra_id_99>") == len(tokenizer) - 100

        batch = tokenizer(
            ["a red disc rolls to the left.", "", "Ελλάδα 東京 🚢 \0\ufffd\t\n é" * 300],
            padding="max_length",
            max_length=226,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        assert batch.shape == (3, 226)
        assert batch.max() < rows
        words = ["▁a", "▁red", "▁disc", "▁rolls", "▁to", "▁the", "▁left", ".", "</s>"]
        assert tokenizer.convert_ids_to_tokens(batch[0])[: len(words)] == words
        assert batch[0][len(words) :].eq(0).all()
        assert batch[1].tolist() == [1] + [0] * 225
        assert batch[2][-1] == 1  # cut, and still ended
        assert 2 in batch[2]
        assert tokenizer.decode(batch[0], skip_special_tokens=True) == "a red disc rolls to the left."


def test_every_printable_ascii_letter_and_digit_has_a_piece(tiny: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("2b") / "tokenizer")
    assert (
        2 not in tokenizer('The QUICK Zebra jumps over 0123456789 (x-y/z) & says: "no"; isn\'t it? 50% + #1!').input_ids
    )


def test_the_vae_spreads_its_latents_as_a_trained_one(tiny: Callable[[str], Path]) -> None:
    for name in ("2b", "5b"):
        vae = build_vae(VARIANTS[name], "tiny", device="cpu", dtype=torch.float32)
        with torch.inference_mode():
            posterior = vae.encode(moving_disc(Size(9, 64, 96))).latent_dist
            latents = posterior.mean * vae.config.scaling_factor
            frames = vae.decode(posterior.mean).sample
        assert latents.shape == (1, 16, 3, 8, 12)
        assert 0.7 < latents.std() < 1.4
        assert latents.std(dim=(0, 2, 3, 4)).min() > 0.3  # each channel says something
        assert (posterior.std * vae.config.scaling_factor).max() < 0.2
        assert frames.shape == (1, 3, 9, 64, 96)
        assert 0.2 < frames.std() < 1.0


def overfit(folder: Path, *, steps: int, learning_rate: float) -> tuple[float, float]:
    """The loss at fixed noise and timesteps before and after training a LoRA of rank 8 on one clip."""
    spec = read_spec(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    transformer, alphas = pipeline.transformer, pipeline.scheduler.alphas_cumprod.float()
    clip = moving_disc(spec.native)
    with torch.no_grad():
        clean, first = (
            pipeline.vae.encode(pixels).latent_dist.mean.permute(0, 2, 1, 3, 4) for pixels in (clip, clip[:, :, :1])
        )
    clean = pad_front(scale_video_latents(clean, spec), spec)
    image = place_image(scale_image_latents(first, spec), clean.shape[1]) if spec.image_to_video else None
    text = torch.randn(1, 226, 32, generator=torch.Generator().manual_seed(0))
    conditioning = conditioning_of(clean, spec)

    def loss(step: int, random: torch.Generator) -> torch.Tensor:
        noise = torch.randn(clean.shape, generator=random)
        signal, spread = alphas[step].sqrt(), (1 - alphas[step]).sqrt()
        noisy, target = signal * clean + spread * noise, signal * noise - spread * clean
        away = predict(transformer, noisy, text, torch.tensor([step]), image, conditioning) - target
        return torch.mean(away.square())

    def evaluate() -> float:
        with torch.no_grad():
            steps = range(50, 1000, 100)
            return sum(float(loss(step, torch.Generator().manual_seed(step))) for step in steps) / len(steps)

    transformer.requires_grad_(False)
    torch.manual_seed(0)
    transformer.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    adapter = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=learning_rate)
    before, random = evaluate(), torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(int(torch.randint(1000, (), generator=random)), random).backward()
        optimizer.step()
    return before, evaluate()


@pytest.mark.parametrize("name", ["2b", "1.5-5b-i2v"])
def test_a_lora_learns_in_twenty_steps(name: str, tiny: Callable[[str], Path]) -> None:
    before, after = overfit(tiny(name), steps=20, learning_rate=1e-3)
    print(f"{name}: {before:.3f} -> {after:.3f}")
    assert after < 0.8 * before


@pytest.mark.parametrize("name", sampled(VARIANTS, "2b"))
def test_a_lora_halves_the_loss_in_300_steps(name: str, tiny: Callable[[str], Path]) -> None:
    before, after = overfit(tiny(name), steps=300, learning_rate=1e-3)
    print(f"{name}: {before:.3f} -> {after:.3f}")
    assert after < 0.5 * before


def test_a_tiny_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COGTUNE_HOME", str(tmp_path))
    folder = tiny_model("2B")
    assert folder.parent == tmp_path / "tiny"
    assert folder.name.startswith("2b-")
    before = (folder / "model_index.json").stat().st_mtime_ns
    monkeypatch.setattr(random_weights, "write_pipeline", None)
    assert tiny_model("2b") == folder
    assert (folder / "model_index.json").stat().st_mtime_ns == before
    monkeypatch.setattr(tiny_models, "_FORMAT", -1)
    with pytest.raises(TypeError):  # another format: another folder, to be written
        tiny_model("2b")
    with pytest.raises(UsageError, match="did you mean '5b-i2v'"):
        tiny_model("5b-i2w")
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == [folder.name]


def test_without_a_setting_the_cache_is_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COGTUNE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert tiny_model("2b").parent == tmp_path / ".cache" / "cogtune" / "tiny"


def test_the_slower_of_two_takes_what_the_faster_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COGTUNE_HOME", str(tmp_path))

    def overtaken(row: Any, folder: Path) -> Path:
        winner = tmp_path / "tiny" / folder.name
        winner.mkdir()
        (winner / "of the winner").touch()
        return write_pipeline(row, folder)

    monkeypatch.setattr(random_weights, "write_pipeline", overtaken)
    folder = tiny_model("2b")
    assert [path.name for path in folder.iterdir()] == ["of the winner"]
    assert list((tmp_path / "tiny").iterdir()) == [folder]


def ask(folder: Path, number: int) -> None:
    (folder / f"ready{number}").touch()
    wait_until(lambda: len(list(folder.glob("ready*"))) == 2)
    (folder / f"path{number}").write_text(str(tiny_model("5b")))


@pytest.mark.slow
def test_two_processes_may_ask_at_once(tmp_path: Path) -> None:
    home = {"COGTUNE_HOME": str(tmp_path / "home")}
    both = [start_process(ask, tmp_path, number, log=tmp_path / "log", variables=home) for number in range(2)]
    for process in both:
        process.join(600)
    assert [process.exitcode for process in both] == [0, 0], (tmp_path / "log").read_text()
    paths = {path.read_text() for path in tmp_path.glob("path*")}
    assert len(paths) == 1
    folder = Path(paths.pop())
    assert list((tmp_path / "home" / "tiny").iterdir()) == [folder]
    # What a process of its own wrote is what this one writes.
    assert files_of(folder) == files_of(write_pipeline(VARIANTS["5b"], tmp_path / "again"))


@pytest.mark.gpu
@EVERY
def test_full_size_is_made_on_a_gpu_within_a_minute(name: str) -> None:
    variant, device = VARIANTS[name], torch.device("cuda")
    dtype = torch.float16 if name == "2b" else torch.bfloat16
    torch.cuda.manual_seed(5)
    before, started = torch.cuda.get_rng_state(), time.perf_counter()
    transformer = build_transformer(variant, "full", device=device, dtype=dtype)
    encoder = build_text_encoder(variant, "full", device=device, dtype=dtype)
    vae = build_vae(variant, "full", device=device, dtype=dtype)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"{name}: {seconds:.1f} s, {peak:.1f} GiB")
    assert seconds < 60
    assert peak < 22  # nothing was ever there in fp32
    assert torch.equal(torch.cuda.get_rng_state(), before)

    spec_channels = IN_CHANNELS[name]
    with torch.inference_mode():
        text = encoder(torch.arange(226, device=device)[None])[0]
        latents = torch.randn(1, 2, spec_channels, 60, 90, device=device, dtype=dtype)
        video = torch.rand(1, 3, 9, 128, 192, device=device, dtype=dtype)
        moments = vae.encode(video).latent_dist
        decoded = vae.decode(moments.mean).sample
        rotary = None
        if variant.rotary:
            tokens = 30 * 45 * (1 if variant.patch_size_t else 2)
            rotary = (torch.ones(tokens, 64, device=device), torch.zeros(tokens, 64, device=device))
        ofs = torch.full((1,), 2.0, device=device, dtype=dtype) if variant.ofs_embed_dim else None
        steps = torch.tensor([500], device=device)
        output = transformer(latents, text, steps, ofs=ofs, image_rotary_emb=rotary, return_dict=False)[0]
    for result in (text, output, moments.mean, decoded):
        assert torch.isfinite(result).all()
        assert result.float().std() > 1e-3
