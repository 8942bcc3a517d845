"""A LoRA training step of a text-to-video model written out with diffusers, PEFT and torch alone, for comparison.

Nothing of cogtune's is used but the random numbers: the noise and timestep that belong to a sample of a run.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file

from cogtune.data.batches import Batch
from cogtune.data.cache.index import Index
from cogtune.modeling.devices import DTYPES
from cogtune.run.plan import Plan
from cogtune.training.objective import draw_noise


def plain_losses(plan: Plan, device: torch.device) -> list[float]:
    """The loss of each optimizer step of ``plan``, a LoRA on one clip."""
    config, dtype = plan.config, DTYPES[plan.config.precision]
    row = Index.read(plan.index).rows[0]
    entry = {kind: next((config.cache_dir or Path()).glob(f"{kind}/*/{key}.safetensors")) for kind, key in (
        ("latents", row.latents), ("text", row.text))}  # fmt: skip
    moments = load_file(entry["latents"])["data"].unsqueeze(0)
    text = load_file(entry["text"])["data"].unsqueeze(0).to(device, dtype)

    transformer = CogVideoXTransformer3DModel.from_pretrained(plan.base_model_dir / "transformer", dtype=dtype)
    transformer.requires_grad_(False)
    torch.manual_seed(config.seed)
    transformer.add_adapter(
        LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    trainable = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.float()
    transformer.to(device).train()
    transformer.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(
        trainable,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    scheduler = CogVideoXDDIMScheduler.from_pretrained(plan.base_model_dir / "scheduler")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    vae = load_vae_factor(plan.base_model_dir)

    losses = []
    for step in range(plan.total_steps):
        draws = draw_noise(
            Batch(moments, text, None, (row.id,), (step,)), plan.spec, seed=config.seed, caption_dropout=0.0
        )
        mean, logvar = moments.float().chunk(2, dim=1)
        deviation = torch.exp(0.5 * logvar.clamp(-30, 20))
        latents = (mean.permute(0, 2, 1, 3, 4) + deviation.permute(0, 2, 1, 3, 4) * draws.posterior).to(device) * vae
        patch = transformer.config.patch_size_t
        if patch is not None:
            latents = torch.cat([latents[:, :1]] * (-latents.shape[1] % patch) + [latents], dim=1)
        noise, timesteps = draws.noise.to(device), draws.timesteps.to(device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps)
        rotary = None
        if transformer.config.use_rotary_positional_embeddings:
            stand_in = SimpleNamespace(vae_scale_factor_spatial=8, transformer=transformer)
            rotary = CogVideoXPipeline._prepare_rotary_positional_embeddings(
                stand_in, plan.size.height, plan.size.width, noisy.shape[1], device
            )
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            predicted = transformer(noisy.to(dtype), text, timesteps, image_rotary_emb=rotary, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(predicted.float(), target)
        losses.append(loss.item())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trainable, config.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return losses


def load_vae_factor(checkpoint: Path) -> float:
    """The scaling factor that the VAE's config gives."""
    from diffusers import AutoencoderKLCogVideoX

    return float(AutoencoderKLCogVideoX.load_config(checkpoint / "vae")["scaling_factor"])
