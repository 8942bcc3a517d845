"""The loss against diffusers' own scheduler and against its x0 form, and the draws it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from cogtune.models.checkpoint_configs import read_spec
from cogtune.training.objective import TimestepSampling, draw_noise, generator_for, pinned
from tests.support.objectives import Fake, batch_of, objective

PINNED_UNIFORM = [198, 150, 927, 557, 765, 691]
PINNED_LOGIT_NORMAL = [169, 404, 762, 412, 157, 420]


@pytest.mark.parametrize("name", ["2b", "5b"])
def test_noise_target_and_loss_are_the_checkpoints_schedulers(name: str, tiny: Callable[[str], Path]) -> None:
    spec = read_spec(tiny(name))
    batch, model = batch_of(spec), Fake()
    of = objective(tiny(name))
    losses = of.losses(model, batch, of.draw(batch))
    scheduler = CogVideoXDDIMScheduler.from_pretrained(tiny(name), subfolder="scheduler")
    draws = draw_noise(batch, spec, seed=5, caption_dropout=0.0)
    clean = batch.moments[:, :16].permute(0, 2, 1, 3, 4) * spec.scaling_factor
    noisy = scheduler.add_noise(clean, draws.noise, draws.timesteps)
    torch.testing.assert_close(model.given["hidden_states"], noisy, rtol=0, atol=1e-5)
    target = scheduler.get_velocity(clean, draws.noise, draws.timesteps)
    expected = (torch.sin(noisy * 3.0) - target).square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def test_it_equals_the_x0_error_weighted_by_one_over_one_minus_alpha(tiny: Callable[[str], Path]) -> None:
    spec = read_spec(tiny("5b"))
    batch, model, of = batch_of(spec), Fake(), objective(tiny("5b"))
    losses = of.losses(model, batch, of.draw(batch))
    draws = draw_noise(batch, spec, seed=5, caption_dropout=0.0)
    alpha = of.alphas[draws.timesteps].view(-1, 1, 1, 1, 1)
    noisy = model.given["hidden_states"]
    x0 = batch.moments[:, :16].permute(0, 2, 1, 3, 4) * spec.scaling_factor
    predicted = alpha.sqrt() * noisy - (1 - alpha).sqrt() * torch.sin(noisy * 3.0)
    weighted = ((predicted - x0).square() / (1 - alpha)).mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(losses, weighted, rtol=1e-3, atol=1e-4)


def test_in_bf16_the_first_timestep_still_has_noise_and_loss(tiny: Callable[[str], Path]) -> None:
    """In bf16 arithmetic 1 - alpha of the first timesteps is zero: no noise, no loss."""
    of, spec = objective(tiny("5b"), dtype=torch.bfloat16), read_spec(tiny("5b"))
    alpha = float(of.alphas[0])
    assert 1 - float(torch.tensor(alpha).to(torch.bfloat16)) == 0.0
    assert math.sqrt(1 - alpha) > 0.02

    class Zero(Fake):
        def forward(self, **given: Any) -> tuple[torch.Tensor]:
            return (torch.zeros_like(given["hidden_states"]),)

    losses = of.losses(Zero(), batch_of(spec), of.draw(batch_of(spec), [0, 1]))
    draws = draw_noise(batch_of(spec), spec, seed=5, caption_dropout=0.0)
    clean = batch_of(spec).moments[:, :16].permute(0, 2, 1, 3, 4) * spec.scaling_factor
    exact = alpha**0.5 * draws.noise[0] - (1 - alpha) ** 0.5 * clean[0]
    assert float(losses[0]) == pytest.approx(float(exact.square().mean()), rel=1e-5)


def test_draws_belong_to_samples_and_not_to_their_batch(tiny: Callable[[str], Path]) -> None:
    spec = read_spec(tiny("5b-i2v"))
    together = draw_noise(batch_of(spec, 3, first=4), spec, seed=1, caption_dropout=0.5)
    alone = draw_noise(batch_of(spec, 1, first=6), spec, seed=1, caption_dropout=0.5)
    assert torch.equal(together.noise[2], alone.noise[0])
    assert together.timesteps[2] == alone.timesteps[0]
    assert together.dropped[2] == alone.dropped[0]
    assert together.image_noise is not None
    assert alone.image_noise is not None
    assert torch.equal(together.image_noise[2], alone.image_noise[0])
    other = draw_noise(batch_of(spec, 1, first=6), spec, seed=2, caption_dropout=0.5)
    assert not torch.equal(other.noise, alone.noise)


def test_neighbouring_samples_and_seeds_are_independent() -> None:
    draws = torch.stack([torch.randn(64, generator=generator_for(seed, n)) for seed in range(8) for n in range(64)])
    correlations = torch.corrcoef(draws) - torch.eye(512)
    assert float(correlations.abs().max()) < 0.75
    assert float(draws.mean().abs()) < 0.02
    assert float(draws.std()) == pytest.approx(1.0, abs=0.02)


def test_timesteps_are_uniform_over_all_of_them(tiny: Callable[[str], Path]) -> None:
    spec = read_spec(tiny("5b"))
    steps = [int(torch.randint(spec.num_train_timesteps, (), generator=generator_for(42, n))) for n in range(4000)]
    assert min(steps) < 5
    assert max(steps) > 994
    assert [sum(low <= step < low + 250 for step in steps) for low in (0, 250, 500, 750)] == pytest.approx(
        [1000] * 4, abs=120
    )


def test_by_default_timesteps_are_the_first_draw_of_each_sample(tiny: Callable[[str], Path]) -> None:
    """Pinned: another value would make every earlier run another run."""
    drawn = draw_noise(batch_of(read_spec(tiny("5b")), 6), read_spec(tiny("5b")), seed=42, caption_dropout=0.0)
    assert drawn.timesteps.tolist() == PINNED_UNIFORM
    assert drawn.timesteps.tolist() == [int(torch.randint(1000, (), generator=generator_for(42, n))) for n in range(6)]


def drawn_timesteps(sampling: TimestepSampling, count: int = 4000) -> list[int]:
    return [sampling.timestep(generator_for(42, number), 1000) for number in range(count)]


def test_logit_normal_timesteps_have_its_quantiles() -> None:
    assert drawn_timesteps(TimestepSampling(timesteps="logit-normal"), 6) == PINNED_LOGIT_NORMAL
    for mean, deviation in ((0.0, 1.0), (1.2, 0.6)):
        steps = sorted(drawn_timesteps(TimestepSampling(timesteps="logit-normal", mean=mean, deviation=deviation)))
        for share, z in ((0.1587, -1.0), (0.5, 0.0), (0.8413, 1.0)):
            expected = 1000 / (1 + math.exp(-(mean + z * deviation)))
            assert steps[int(share * len(steps))] == pytest.approx(expected, abs=15)


@pytest.mark.parametrize("timesteps", ["uniform", "logit-normal"])
def test_timesteps_stay_in_their_range_and_reach_its_ends(timesteps: Any) -> None:
    steps = drawn_timesteps(TimestepSampling(timesteps=timesteps, bounds=(990, 999)), 2000)
    assert set(steps) == set(range(990, 1000))
    assert drawn_timesteps(TimestepSampling(timesteps=timesteps, bounds=(7, 7)), 3) == [7, 7, 7]
    middle = sum(993 <= step <= 996 for step in steps) / len(steps)
    assert middle == pytest.approx({"uniform": 0.4, "logit-normal": 0.603}[timesteps], abs=0.03)


def test_image_noise_follows_the_option_and_changes_nothing_else(tiny: Callable[[str], Path]) -> None:
    spec = read_spec(tiny("5b-i2v"))
    usual, off, strong = (
        draw_noise(batch_of(spec), spec, seed=3, caption_dropout=0.0, sampling=TimestepSampling(image_noise=noise))
        for noise in ((-3.0, 0.5), None, (0.0, 0.0))
    )
    assert usual.image_noise is not None
    assert off.image_noise is not None
    assert strong.image_noise is not None
    assert float(off.image_noise.abs().max()) == 0.0
    assert float(strong.image_noise.std()) == pytest.approx(1.0, abs=0.02)
    ratio = usual.image_noise / strong.image_noise
    torch.testing.assert_close(ratio[0], ratio[0, :1, :1, :1].expand_as(ratio[0]), rtol=1e-4, atol=0)
    for name in ("noise", "posterior", "timesteps", "dropped", "image_posterior"):
        assert torch.equal(getattr(usual, name), getattr(off, name))


def test_caption_dropout_drops_the_text_and_nothing_else(tiny: Callable[[str], Path]) -> None:
    spec = read_spec(tiny("5b-i2v"))
    kept, dropped = Fake(), Fake()
    batch = batch_of(spec)
    for model, dropout in ((kept, 0.0), (dropped, 1.0)):
        of = objective(tiny("5b-i2v"), dropout=dropout)
        of.losses(model, batch, of.draw(batch))
    assert torch.equal(kept.given["encoder_hidden_states"], batch.text)
    assert torch.equal(dropped.given["encoder_hidden_states"], torch.full((2, 226, 32), -1.0))
    assert torch.equal(kept.given["hidden_states"], dropped.given["hidden_states"])


def test_image_noise_has_the_published_spread_and_one_sigma_a_sample(tiny: Callable[[str], Path]) -> None:
    spec = read_spec(tiny("5b-i2v"))
    draws = draw_noise(batch_of(spec, 200), spec, seed=3, caption_dropout=0.0)
    assert draws.image_noise is not None
    log_sigma = draws.image_noise.std(dim=(1, 2, 3)).log()
    assert float(log_sigma.mean()) == pytest.approx(-3.0, abs=0.12)
    assert float(log_sigma.std()) == pytest.approx(0.5, abs=0.08)


def test_evaluation_neither_drops_captions_nor_noises_images(tiny: Callable[[str], Path]) -> None:
    spec, folder = read_spec(tiny("5b-i2v")), tiny("5b-i2v")
    batch, model = batch_of(spec), Fake()
    of = objective(folder, dropout=1.0)
    of.losses(model, batch, of.draw(batch), training=False)
    assert torch.equal(model.given["encoder_hidden_states"], batch.text)
    clean = model.given["hidden_states"][:, :, 16:]
    of.losses(model, batch, of.draw(batch))
    noised = model.given["hidden_states"][:, :, 16:]
    assert not torch.equal(clean, noised)
    assert torch.equal(clean[:, 1:], torch.zeros_like(clean[:, 1:]))


@pytest.mark.parametrize(("frames", "padded"), [(5, 6), (4, 4)])
def test_1_5_latents_are_padded_in_front_with_the_first_frame(
    frames: int, padded: int, tiny: Callable[[str], Path]
) -> None:
    spec, model = read_spec(tiny("1.5-5b")), Fake()
    of = objective(tiny("1.5-5b"))
    batch = batch_of(spec, frames=frames)
    of.losses(model, batch, of.draw(batch, [0, 0]))
    noise = draw_noise(batch, spec, seed=5, caption_dropout=0.0).noise
    alpha = of.alphas[0]
    clean = (model.given["hidden_states"] - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    assert clean.shape[1] == padded
    expected = batch.moments[:, :16].permute(0, 2, 1, 3, 4) * 0.7
    torch.testing.assert_close(clean[:, padded - frames :], expected, rtol=0, atol=1e-4)
    for extra in range(padded - frames):
        torch.testing.assert_close(clean[:, extra], expected[:, 0], rtol=0, atol=1e-4)


def test_tensors_are_pinned_unless_the_system_refuses(
    monkeypatch: pytest.MonkeyPatch, tiny: Callable[[str], Path]
) -> None:
    spec = read_spec(tiny("2b"))
    draws = draw_noise(batch_of(spec), spec, seed=1, caption_dropout=0.1)

    def refuse(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no pinned memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    assert pinned(draws) is draws
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    copied = pinned(draws)
    assert copied.noise is not draws.noise
    assert torch.equal(copied.noise, draws.noise)
    assert copied.image_noise is None
