"""Train nano's VAE: python -m tools.nano.train_vae --parts build/nano --seconds 420

Every batch is drawn on the device, so that there is no data to prepare. Half of it is what the world shows, half is
made stranger (other paths, channels exchanged, mirrored, one clip's shape put into another), so that the VAE keeps
things that it was not trained on. It stops in time, saves its state, and goes on from it when it is started again. At
the end latents get the deviation that the models' scaling factor asks for, and weights are written in fp16.
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D

from cogtune.data.nano import world
from cogtune.modeling.nano import new_vae, normalise_latents
from cogtune.models.geometry import Size
from tools.nano.common import Deadline, best_device, folder_hashes, load_state, machine, note, save_state, say

_MEASURED = 20
"""Steps after which the number of steps that fit is first estimated; then again every 100, since the pace varies."""
_EAGER_STEPS = 3
"""Steps before a CUDA graph is recorded, in which kernels are loaded and the optimizer makes its state."""
_HELD_OUT_SEED = 987_654


def foreground(clips: torch.Tensor) -> torch.Tensor:
    """Where a clip ``[B, 3, F, H, W]`` differs from its leftmost column, which is background: ``[B, 1, F, H, W]``."""
    return ((clips - clips[..., :1]).abs().amax(dim=1, keepdim=True) > 0.1).to(clips.dtype)


def restless(scene: world.Scene, random: np.random.Generator) -> world.Scene:
    """Return the scene with another path, whose shape moves by up to ten pixels from frame to frame and changes its
    size: fast motions of the world are rare, and the hardest to keep."""
    time_of_frame = np.linspace(0.0, 1.0, world.SIZE.num_frames)
    waves = [
        np.sin(2 * np.pi * (random.uniform(0.3, 1.3) * time_of_frame + random.uniform())) * random.uniform(0.3, 1.0)
        for _ in range(3)
    ]
    radius = random.uniform(9.5, 14) * (1 + 0.2 * waves[2])
    across, along = world.SIZE.width / 2 - 20, world.SIZE.height / 2 - 14  # foreground() wants the left edge free
    poses = np.stack(
        [world.SIZE.width / 2 + across * waves[0], world.SIZE.height / 2 + along * waves[1], radius], axis=1
    )
    return replace(scene, poses=poses)


def batch_at(step: int, size: int, seed: int, device: torch.device) -> torch.Tensor:
    """Clips ``[B, 3, F, H, W]`` in [-1, 1]: a function of the seed and the step."""
    random = np.random.default_rng([seed, step, 2])
    half = size // 2
    scenes = world.training_scenes(seed, range(step * size, (step + 1) * size))
    scenes[half:] = [restless(scene, random) if random.random() < 0.6 else scene for scene in scenes[half:]]
    clips = world.draw_batch(scenes, device)
    strange = clips[half:]
    strange = strange[:, random.permutation(3).tolist()]
    mirrored = [dim for dim in (2, 3, 4) if random.random() < 0.5]
    strange = strange.flip(mirrored) if mirrored else strange
    strange = strange * float(random.choice([1.0, 1.0, -1.0]))
    strange = strange * float(random.uniform(0.7, 1.0)) + float(random.uniform(-0.15, 0.15))
    mixed = len(strange) // 2
    if mixed:
        there = foreground(clips[:mixed])
        strange = torch.cat([clips[:mixed] * there + strange[:mixed] * (1 - there), strange[mixed:]])
    return torch.cat([clips[:half], strange.clip(-1, 1)])


def cropped(clips: torch.Tensor, crop: Size | None, step: int) -> torch.Tensor:
    """Return the same part of each clip, at random; for trials on a CPU."""
    if crop is None:
        return clips
    random = np.random.default_rng(step)
    height, width = (
        random.integers(0, have - want + 1)
        for have, want in zip(clips.shape[3:], (crop.height, crop.width), strict=True)
    )
    return clips[:, :, : crop.num_frames, height : height + crop.height, width : width + crop.width]


def loss_of(vae: AutoencoderKLCogVideoX, clips: torch.Tensor, kl_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss, and the mean squared error alone. The shape, a twentieth of the frame, counts four times."""
    there = foreground(clips)
    posterior = vae.encode(clips.to(vae.dtype)).latent_dist
    decoded = vae.decode(posterior.sample()).sample.float()
    weight = 1 + 3 * there
    error = decoded - clips
    rebuilt = (weight * (error.abs() + 2 * error.square())).mean()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return rebuilt + kl_weight * kl, error.detach().square().mean()


def modulated(
    norm: CogVideoXSpatialNorm3D,
    f: torch.Tensor,
    zq: torch.Tensor,
    conv_cache: object = None,  # noqa: ARG001 (a 1x1 convolution has none)
) -> tuple[torch.Tensor, dict[str, None]]:
    """Compute what ``CogVideoXSpatialNorm3D.forward`` does, with its 1x1 convolutions before the enlargement of
    ``zq [B, C, F, h, w]`` to the size of ``f``, not after it: the same values for a fraction of the memory traffic."""
    scale, shift = norm.conv_y.conv(zq), norm.conv_b.conv(zq)
    normed = norm.norm_layer(f)
    if f.shape[2] > 1 and f.shape[2] % 2 == 1:  # the first frame stands for itself
        parts = [_modulated(normed[:, :, at], scale[:, :, at], shift[:, :, at]) for at in (slice(0, 1), slice(1, None))]
        return torch.cat(parts, dim=2), {}
    return _modulated(normed, scale, shift), {}


def _modulated(normed: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    small = scale.shape[2:]
    ratios = [large // one for large, one in zip(normed.shape[2:], small, strict=True)]
    view = [part for pair in zip(small, ratios, strict=True) for part in pair]
    one = [part for size in small for part in (size, 1)]
    batch, channels = normed.shape[:2]
    large = normed.reshape(batch, channels, *view)
    moved = torch.addcmul(shift.reshape(batch, channels, *one), large, scale.reshape(batch, channels, *one))
    return moved.reshape(normed.shape)


class Steps:
    """Optimizer steps of a VAE whose weights are kept in fp32.

    On a GPU the forward and the backward pass are in bf16, and the whole step is recorded once as a CUDA graph, since
    its many short kernels would wait for Python to start them.
    """

    def __init__(self, vae: AutoencoderKLCogVideoX, kl_weight: float, shape: tuple[int, ...]) -> None:
        self._vae, self._kl_weight = vae, kl_weight
        device = next(vae.parameters()).device
        self._on_gpu = device.type == "cuda"
        self._working = copy.deepcopy(vae).to(torch.bfloat16) if self._on_gpu else vae
        for module in self._working.modules():
            if isinstance(module, CogVideoXSpatialNorm3D):
                module.forward = functools.partial(modulated, module)
        self.rate = torch.tensor(0.0, device=device)
        self.optimizer = torch.optim.AdamW(
            vae.parameters(),
            lr=self.rate if self._on_gpu else 0.0,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            fused=self._on_gpu,
            capturable=self._on_gpu,
        )
        self.sums = torch.zeros(2, device=device)
        """Of loss and mean squared error, since they were last set to zero."""
        self._clips = torch.zeros(shape, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager = 0

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Go on from the optimizer's state of an earlier call."""
        self.optimizer.load_state_dict(state)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate if self._on_gpu else 0.0

    def take(self, clips: torch.Tensor, rate: float) -> None:
        """Make one step with ``clips [B, 3, F, H, W]``."""
        self.rate.fill_(rate)
        self._clips.copy_(clips)
        if not self._on_gpu:
            self.optimizer.param_groups[0]["lr"] = rate
            self._step()
        elif self._graph is not None:
            self._graph.replay()
        elif self._eager < _EAGER_STEPS:
            self._step_aside()
            self._eager += 1
        else:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._step()
            self._graph.replay()  # recording computes nothing

    def _step_aside(self) -> None:
        """Make a step in another stream, as the steps before a recording have to be."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream().wait_stream(stream)

    def _step(self) -> None:
        weights, working = list(self._vae.parameters()), list(self._working.parameters())
        if self._on_gpu:
            with torch.no_grad():
                torch._foreach_copy_(working, weights)
        for parameter in working:
            parameter.grad = None
        loss, squared = loss_of(self._working, self._clips, self._kl_weight)
        loss.backward()
        if self._on_gpu:
            for weight, parameter in zip(weights, working, strict=True):
                assert parameter.grad is not None  # every weight takes part
                weight.grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        self.optimizer.step()
        self.sums += torch.stack([loss.detach(), squared])


@torch.no_grad()
def quality(vae: AutoencoderKLCogVideoX, scenes: list[world.Scene], device: torch.device) -> list[float]:
    """PSNR in dB of each decoded clip, as 8-bit frames against those that were drawn."""
    values = []
    for scene in scenes:
        clip = world.draw_batch([scene], device)
        decoded = vae.decode(vae.encode(clip.to(vae.dtype)).latent_dist.mode()).sample.float()
        pixels = ((decoded.clip(-1, 1) + 1) * 127.5).round()
        error = ((pixels - ((clip + 1) * 127.5).round()) / 255).square().mean()
        values.append(float(-10 * torch.log10(error.clip(1e-10))))
    return values


def judged(vae: AutoencoderKLCogVideoX, device: torch.device, count: int) -> dict[str, dict[str, float]]:
    """PSNR on known things at places not trained on, on held-out combinations, and on things never seen."""
    random = np.random.default_rng(_HELD_OUT_SEED)
    held = [world.scene_of(subject, random) for subject, _ in world.held_out_prompts()[:count]]
    new = [
        world.scene_of(world.Subject(colour, shape, motion, background), random)
        for colour, shape, motion in (("pink", "heart", "beats"), ("turquoise", "moon", "zigzags"))
        for background in world.backgrounds_for(colour)
    ]
    groups = {"known": world.training_scenes(_HELD_OUT_SEED, range(count)), "held out": held, "new": new[:count]}
    judged = {}
    for name, scenes in groups.items():
        values = quality(vae, scenes, device)
        judged[name] = {"clips": len(values), "mean": round(float(np.mean(values)), 2), "least": round(min(values), 2)}
    return judged


@torch.no_grad()
def deviations(vae: AutoencoderKLCogVideoX, device: torch.device, clips: int) -> torch.Tensor:
    """Return the deviation of each latent channel ``[C]``, over clips of the world."""
    latents = []
    for start in range(0, clips, 8):
        numbers = range(start, min(start + 8, clips))
        drawn = world.draw_batch(world.training_scenes(_HELD_OUT_SEED, numbers), device)
        latents.append(vae.encode(drawn).latent_dist.sample())
    return torch.cat(latents).transpose(0, 1).flatten(1).std(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=420.0, help="of this call; the last 40 go to the figures")
    parser.add_argument("--steps", type=int, help="in all; by default as many as fit into the first call's seconds")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--kl-weight", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge", type=int, default=64, help="clips a group for the figures at the end")
    parser.add_argument("--reserve", type=float, default=40.0, help="seconds kept for them")
    parser.add_argument(
        "--crop", type=Size.parse, help="train on parts of clips, such as 9x32x32; for a trial on a CPU"
    )
    parser.add_argument("--start", type=Path, help="parts whose VAE to start from, in place of random weights")
    parser.add_argument("--device")
    given = parser.parse_args()
    device, deadline = best_device(given.device), Deadline(given.seconds - given.reserve)
    vae = new_vae(given.seed)
    if given.start is not None:
        vae.load_state_dict(
            AutoencoderKLCogVideoX.from_pretrained(given.start / "vae", dtype=torch.float32).state_dict()
        )
    vae.to(device)
    size = given.crop or world.SIZE
    shape = (given.batch_size, 3, size.num_frames, size.height, size.width)
    steps = Steps(vae, given.kl_weight, shape)
    path = given.parts / "vae-state.pt"
    state = load_state(path, device)
    step, total, losses, spent = 0, given.steps, [], 0.0
    fitted = total is None
    sums = steps.sums
    if state is not None:
        vae.load_state_dict(state["model"])
        steps.load_optimizer(state["optimizer"])
        step, total, losses, spent = state["step"], state["total"], state["losses"], state["seconds"]
        fitted = False
        sums.copy_(state["sums"])
        say(f"goes on at step {step} of {total}")
    torch.manual_seed(given.seed + step)
    began = measured = time.monotonic()
    since = step
    while (total is None or step < total) and not deadline:
        rate = given.learning_rate * min(1.0, (step + 1) / 100)
        if total is not None:  # level for the first 40 %, then down to nothing
            rate *= min(1.0, max(0.01, (total - step) / (0.6 * total)))
        clips = batch_at(step, given.batch_size, given.seed, device)
        steps.take(cropped(clips, given.crop, step), rate)
        step += 1
        if fitted and step == _MEASURED // 2:
            measured, since = float(sums[0]) * 0 + time.monotonic(), step  # reading a sum waits for the device
        if fitted and (step == _MEASURED or step % 100 == 0):
            now = float(sums[0]) * 0 + time.monotonic()
            pace = (now - measured) / (step - since)
            total = step + int(max(0.0, deadline.left) / pace * 0.98)
            measured, since = now, step
            say(f"{pace * 1000:.0f} ms a step: {total} steps fit")
        every = 10 if step <= 100 else 100
        if step % every == 0:
            mean, error = (sums / every).tolist()
            sums.zero_()
            losses.append([step, round(mean, 5), round(-10 * float(np.log10(error / 4)), 2)])
            say(f"step {step}: loss {mean:.5f}, {losses[-1][2]:.2f} dB, rate {rate:.2g}")
    spent += time.monotonic() - began
    save_state(
        path,
        {
            "model": vae.state_dict(),
            "optimizer": steps.optimizer.state_dict(),
            "step": step,
            "sums": sums,
            "total": total,
            "losses": losses,
            "seconds": spent,
        },
    )
    say(f"saved at step {step} of {total}")
    finished = new_vae()
    finished.load_state_dict(vae.state_dict())
    finished.to(device).eval()
    normalise_latents(finished, deviations(finished, device, given.judge))
    finished.half().cpu().save_pretrained(given.parts / "vae")
    figures = judged(finished.float().to(device), device, given.judge)
    say(f"PSNR in dB: {figures}")
    facts = {
        "done": step == total,
        "steps": step,
        "batch_size": given.batch_size,
        "learning_rate": given.learning_rate,
        "kl_weight": given.kl_weight,
        "seed": given.seed,
        "world": world.WORLD_VERSION,
        "seconds": round(spent, 1),
        "losses": losses,
        "psnr": figures,
        "started_from": {} if given.start is None else folder_hashes(given.start / "vae"),
        **machine(device),
    }
    note(given.parts, "vae", facts)


if __name__ == "__main__":
    main()
