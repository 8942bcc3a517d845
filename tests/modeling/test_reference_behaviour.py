"""Twenty things that other CogVideoX trainers get wrong, and the tests that fail if cogtune does too.

``HELD_BY`` says which test holds which; those that stand in no other file are here. Each was seen to fail with the
fault put into the code.
"""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cogtune.commands import train
from cogtune.config.launchers import deepspeed_config
from cogtune.config.resolving import resolve
from cogtune.config.run_config import RunConfig
from cogtune.data.cache.index import Index
from cogtune.data.cache.store import Store
from cogtune.data.sources import read_dataset
from cogtune.encoding import jobs
from cogtune.modeling.adapters import save_lora
from cogtune.modeling.conditioning import conditioning_of, place_image, sample_posterior, scale_image_latents
from cogtune.modeling.encoders import pixels_to_unit
from cogtune.models.checkpoint_configs import read_spec
from cogtune.models.variants import VARIANTS
from cogtune.system.errors import CogtuneError
from cogtune.training.evaluate import evaluate
from cogtune.training.objective import draw_noise
from tests.support.objectives import Fake, batch_of, objective
from tests.support.runs_in_process import evaluations, fill_here, plan_for, set_up_here, train_here

HELD_BY = {
    "image latents of 1.5 are divided by the factor": [
        "test_conditioning::test_the_transformer_is_given_what_the_pipeline_gives_it",
        "test_conditioning::test_image_latents_are_divided_when_the_vae_says_inverted",
        "test_reference_behaviour::test_the_objective_hands_over_what_sampling_would",
    ],
    "1.5 is padded in front, and only where needed": [
        "test_conditioning::test_padding_goes_in_front_and_only_where_needed",
        "test_objective::test_1_5_latents_are_padded_in_front_with_the_first_frame",
    ],
    "rotary positions are the pipeline's at every size": [
        "test_conditioning::test_the_transformer_is_given_what_the_pipeline_gives_it",
        "test_reference_behaviour::test_the_objective_hands_over_what_sampling_would",
    ],
    "ofs is 2 where the config has it": [
        "test_conditioning::test_the_transformer_is_given_what_the_pipeline_gives_it",
        "test_reference_behaviour::test_the_objective_hands_over_what_sampling_would",
    ],
    "image noise has one sigma a sample": [
        "test_objective::test_image_noise_has_the_published_spread_and_one_sigma_a_sample",
    ],
    "noise and target are in fp32": ["test_objective::test_in_bf16_the_first_timestep_still_has_noise_and_loss"],
    "the loss is v-prediction under the checkpoint's schedule": [
        "test_objective::test_noise_target_and_loss_are_the_checkpoints_schedulers",
        "test_objective::test_it_equals_the_x0_error_weighted_by_one_over_one_minus_alpha",
        "test_objective::test_by_default_timesteps_are_the_first_draw_of_each_sample",
    ],
    "the frozen base is in the run's precision": [
        "test_reference_behaviour::test_the_frozen_base_is_in_the_runs_precision_and_what_is_trained_in_fp32",
    ],
    "alpha is stored and applied": [
        "test_adapters::test_plain_diffusers_loads_every_kind_at_its_strength",
        "test_train::test_the_lora_in_plain_diffusers_gives_the_same_frames",
    ],
    "cache keys are of the content": [
        "test_cache::test_two_clips_of_one_name_do_not_collide",
        "test_cache::test_an_edited_clip_is_noticed_and_no_other",
        "test_reference_behaviour::test_keys_follow_the_encoder_that_makes_the_entry",
    ],
    "frames are chosen by time, short clips refused, aspect kept": [
        "test_frames::test_frames_are_chosen_by_time",
        "test_frames::test_a_clip_too_short_says_what_it_needs",
        "test_frames::test_a_disc_stays_round_and_in_the_middle",
    ],
    "a switch set to false is off": ["test_reference_behaviour::test_a_switch_that_is_set_to_false_is_off"],
    "resuming is exact, and from where it was told": [
        "test_loop::test_a_checkpoint_that_is_not_there_is_an_error",
        "test_loop::test_a_resumed_run_is_the_same_run_to_the_bit",
        "test_resume::test_two_processes_go_on_to_the_bit",
        "test_reference_behaviour::test_deepspeed_has_no_schedule_of_its_own",
    ],
    "evaluation is shared out and leaves the run as it was": [
        "test_reference_behaviour::test_evaluating_changes_nothing",
        "test_adapters::test_nothing_is_dropped_in_evaluation",
        "test_reference_behaviour::test_evaluation_is_shared_out_over_the_ranks",
        "test_monitor::test_sample_videos_are_shared_out_over_the_processes",
        "test_monitor::test_sampling_leaves_the_training_as_it_was_to_the_bit",
    ],
    "weights are gathered, and saved whole or not at all": [
        "test_reference_behaviour::test_weights_that_were_not_gathered_are_refused",
        "test_loop::test_a_full_disk_during_a_save_leaves_the_earlier_checkpoint",
        "test_full_disk::test_wherever_the_disk_fills_up_nothing_is_lost",
        "test_resume::test_a_run_killed_at_many_moments_is_the_run_that_was_not",
    ],
    "dropout drops the text": ["test_objective::test_caption_dropout_drops_the_text_and_nothing_else"],
    "blank lines shift nothing": [
        "test_sources::test_blank_lines_inside_pair_nothing_even_when_counts_agree",
    ],
    "epochs are counted over all processes": [
        "test_reference_behaviour::test_epochs_become_steps_by_the_samples_of_all_processes",
    ],
    "a failure has a status": [
        "test_processes::test_a_workers_error_arrives_whole",
        "test_cli::test_an_unreadable_clip_is_told_and_stops_training",
    ],
    "no secret is written": ["test_reference_behaviour::test_no_file_of_a_run_holds_the_token"],
}


@pytest.fixture(autouse=True)
def encode_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "fill_cache", fill_here)


def test_each_of_the_twenty_is_held_by_tests_that_exist() -> None:
    assert len(HELD_BY) == 20
    there = {
        f"{file.stem}::{node.name}"
        for file in Path(__file__).parents[1].rglob("test_*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert {name for names in HELD_BY.values() for name in names} - there == set()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_objective_hands_over_what_sampling_would(name: str, tiny: Callable[[str], Path]) -> None:
    """What the pipelines' recordings hold the pieces to, put together as training puts them."""
    spec, of, model = read_spec(tiny(name)), objective(tiny(name)), Fake()
    batch = batch_of(spec)
    of.losses(model, batch, of.draw(batch), training=False)
    noisy = model.given["hidden_states"]
    expected = conditioning_of(noisy, spec)
    given = model.given["image_rotary_emb"]
    assert (given is None) == (expected.rotary is None) == (name == "2b")
    assert given is None or all(map(torch.equal, given, expected.rotary or ()))
    ofs = model.given["ofs"]
    assert (None if ofs is None else ofs.tolist()) == ([2.0] if name == "1.5-5b-i2v" else None)
    if spec.image_to_video:
        assert of.image_encoder is not None
        assert batch.image is not None
        moments = of.image_encoder.image_moments(pixels_to_unit(batch.image, torch.float32))
        posterior = draw_noise(batch, spec, seed=5, caption_dropout=0.0).image_posterior
        assert posterior is not None
        latents = scale_image_latents(sample_posterior(moments, posterior), spec)
        assert torch.equal(noisy[:, :, 16:], place_image(latents, noisy.shape[1]))


@pytest.mark.parametrize("kind", ["lora", "sft"])
def test_the_frozen_base_is_in_the_runs_precision_and_what_is_trained_in_fp32(
    kind: str, clips: Path, tmp_path: Path
) -> None:
    plan = plan_for(clips, tmp_path / "out", steps=1, precision="bf16", model="tiny:5b", type=kind)
    train_state = set_up_here(plan).train_state
    kinds = {(weight.requires_grad, weight.dtype) for weight in train_state.transformer.parameters()}
    frozen = {(False, torch.bfloat16)} if kind == "lora" else set()
    assert kinds == {(True, torch.float32), *frozen}
    trained = [weight for group in train_state.optimizer.param_groups for weight in group["params"]]
    assert {weight.dtype for weight in trained} == {torch.float32}
    assert len(trained) == sum(weight.requires_grad for weight in train_state.transformer.parameters())


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "limit"])
def test_keys_follow_the_encoder_that_makes_the_entry(
    part: str, clips: Path, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Another VAE makes other latents, another text encoder, tokenizer or length limit other texts; and no more."""
    folder, spec = tiny("2b"), read_spec(tiny("2b"))
    config = RunConfig(data=clips, size="9x64x96", cache_dir=tmp_path / "cache")
    dataset = read_dataset(clips)
    before = jobs.prepare(config, spec, folder, dataset).index
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    if part == "limit":
        spec = replace(spec, max_text_seq_length=64)
    else:
        file = next(
            path for path in sorted((changed / part).iterdir()) if path.suffix in (".safetensors", ".json", ".model")
        )
        file.write_bytes(file.read_bytes() + b" ")
    after = jobs.prepare(config, spec, changed, dataset).index
    same_latents, same_texts = (
        [getattr(row, kind) for row in before.rows] == [getattr(row, kind) for row in after.rows]
        for kind in ("latents", "text")
    )
    assert same_latents == (part != "vae")
    assert same_texts == (part in ("transformer", "vae"))
    assert (before.null_text == after.null_text) == same_texts


def test_a_switch_that_is_set_to_false_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.yaml"
    for text in ("False", "false", "off", '"False"', "no"):
        file.write_text(f"gradient_checkpointing: {text}\n")
        assert resolve(file=file).config.gradient_checkpointing is False
    from cogtune.cli.app import app

    seen: dict[str, Any] = {}
    monkeypatch.setattr(train, "configure", lambda **given: seen.update(given) or exit(0))
    CliRunner().invoke(app, ["train", "--no-gradient-checkpointing", "--dora"])
    assert seen["flags"] == {"gradient_checkpointing": False, "dora": True}
    refused = CliRunner().invoke(app, ["train", "--gradient-checkpointing", "False"])
    assert refused.exit_code == 2


@pytest.mark.parametrize("strategy", ["zero2", "zero2-offload", "zero3", "zero3-offload"])
def test_deepspeed_has_no_schedule_of_its_own(strategy: Any) -> None:
    """Its file names neither optimizer nor scheduler, so those of the run are used as they are."""
    value = deepspeed_config(RunConfig(strategy=strategy, num_processes=4, warmup_steps=100))
    assert value is not None
    assert {"optimizer", "scheduler"} & value.keys() == set()


def test_evaluating_changes_nothing(clips: Path, tmp_path: Path) -> None:
    """Losses and weights are the same to the bit with an evaluation after every step and with none."""
    shared: dict[str, Any] = {
        "steps": 3,
        "lora_dropout": 0.3,
        "caption_dropout": 0.5,
        "precision": "bf16",
        "model": "tiny:5b",
    }
    often = train_here(plan_for(clips, tmp_path / "often", eval_every=1, **shared))
    never = train_here(plan_for(clips, tmp_path / "never", eval_every=0, **shared))
    assert len(evaluations(often)) == 4
    assert [line for line in often if "loss" in line] == never
    one, other = ((tmp_path / name / "checkpoint-3" / "optimizer.pt").read_bytes() for name in ("often", "never"))
    assert one == other


def test_evaluation_is_shared_out_over_the_ranks(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks do half of the forward passes each, and together have the figures of one."""
    plan = plan_for(clips, tmp_path / "out", steps=1, cache_dir=tmp_path / "cache")
    store, samples = Store(tmp_path / "cache"), Index.read(plan.index).rows[:3]
    of = objective(plan.base_model_dir)
    sums: list[torch.Tensor] = []

    class Counted(Fake):
        calls = 0

        def forward(self, **given: Any) -> tuple[torch.Tensor]:
            self.calls += 1
            return super().forward(**given)

    alone = Counted()
    whole = evaluate(alone, of, store, samples)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: sums.append(value.clone()))
    for rank in (0, 1):
        one = Counted()
        evaluate(one, of, store, samples, rank=rank, world_size=2)
        assert one.calls == alone.calls // 2
    total = sums[0] + sums[1]
    assert (total[0] / total[1]).tolist() == pytest.approx(list(whole.by_timestep.values()))


def test_weights_that_were_not_gathered_are_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    from tests.support.adapters import adapted

    transformer = adapted(tiny("2b"))
    state = {name: weight for name, weight in transformer.state_dict().items() if "lora" in name}
    first = next(iter(state))
    with pytest.raises(CogtuneError, match="not gathered") as caught:
        save_lora(tmp_path / "x.safetensors", transformer, {}, {**state, first: torch.empty(0)})
    assert len(caught.value.details) == 1
    assert list(tmp_path.iterdir()) == []


def test_epochs_become_steps_by_the_samples_of_all_processes() -> None:
    for processes, batch, accumulation in ((1, 1, 4), (2, 1, 2), (4, 1, 1), (2, 2, 1)):
        config = RunConfig(
            epochs=3, num_processes=processes, batch_size=batch, gradient_accumulation_steps=accumulation
        )
        assert config.total_steps(70) == 53  # 210 samples, 4 a step
    assert RunConfig(epochs=0.5).total_steps(70) == 35


def test_no_file_of_a_run_holds_the_token(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {name: f"hf_{name}0123456789abcdef" for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    train_here(plan_for(clips, tmp_path / "out", steps=1))
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) >= 8
    assert json.loads((tmp_path / "out" / "launch" / "plan.json").read_text())
    told = [path for path in files for value in secrets.values() if value.encode() in path.read_bytes()]
    assert told == []
