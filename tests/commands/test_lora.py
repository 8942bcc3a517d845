"""``cogtune lora``: files in every program's own format, converted there and back to the bit, resized, fused."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogtune.commands import lora as commands
from cogtune.commands.lora import weighted
from cogtune.modeling.adapters import add_lora, save_lora
from cogtune.modeling.lora_files import Lora, Pair, read_lora
from cogtune.modeling.lora_files.editing import blend, matrices, resize
from cogtune.modeling.lora_files.writing import write_lora
from cogtune.models.lora_formats import LORA_FORMATS, LoraFormatName
from cogtune.run.lora_paths import find_lora
from cogtune.system.errors import CogtuneError, UsageError
from tests.support.adapters import answer
from tests.support.in_process import run
from tests.support.lora_files import (
    ALPHA,
    RANK,
    TARGETS,
    Tensors,
    Writer,
    bare,
    base,
    by_diffusers,
    by_finetrainers,
    by_peft,
    diffsynth,
    dotted,
    effect,
    kohya,
    moved,
    renamed,
    torch_saved,
    with_its_metadata,
    written,
)

Tiny = Callable[[str], Path]
EVERY = [*TARGETS, "text_proj", "time_embedding.linear_1"]


def comfyui(layer: str, part: str) -> str:
    """As ComfyUI's own model calls its layers."""
    layer = re.sub(r"^transformer_blocks\.", "blocks.", layer)
    return dotted("diffusion_model.")(re.sub(r"^(time|ofs)_embedding\.", r"\1_embedding_", layer), part)


KINDS: dict[str, tuple[Writer, LoraFormatName]] = {
    "diffusers, CogVideo's scripts, CogKit": (by_diffusers, "diffusers"),
    "diffusers with metadata": (with_its_metadata, "diffusers"),
    "cogtune": (
        lambda to, ours: (save_lora(to / "x.safetensors", ours, {"base_model": "5b", "rank": 4, "alpha": 3.0}), to)[1],
        "diffusers",
    ),
    "finetrainers": (by_finetrainers, "finetrainers"),
    "PEFT's folder": (lambda to, ours: by_peft(to, to.parent / "base"), "peft"),
    "PEFT's folder, .bin": (
        lambda to, ours: (
            torch_saved(to, renamed(bare(ours), dotted("base_model.model.")), "adapter_model.bin"),
            (to / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA})),
            to,
        )[2],
        "peft",
    ),
    "kohya, musubi-tuner": (
        lambda to, ours: written(to, renamed(bare(ours), kohya("lora_unet_"), alpha=ALPHA)),
        "kohya",
    ),
    "kohya, bf16, without alpha": (
        lambda to, ours: written(
            to, {name: value.bfloat16() for name, value in renamed(bare(ours), kohya("lora_unet_")).items()}
        ),
        "kohya",
    ),
    "OneTrainer": (
        lambda to, ours: written(to, renamed(bare(ours), kohya("lora_transformer_"), alpha=ALPHA)),
        "onetrainer",
    ),
    "VideoX-Fun": (
        lambda to, ours: written(to, renamed(bare(ours), kohya("lora_unet__"), alpha=ALPHA)),
        "videox-fun",
    ),
    "VideoX-Fun, .pt": (
        lambda to, ours: torch_saved(to, renamed(bare(ours), kohya("lora_unet__"), alpha=ALPHA)),
        "videox-fun",
    ),
    "ComfyUI": (lambda to, ours: written(to, renamed(bare(ours), comfyui, alpha=0.1)), "comfyui"),
    "DiffSynth-Studio": (lambda to, ours: written(to, renamed(bare(ours), diffsynth)), "diffsynth"),
}
"""LoRA files, each in its program's own format, and what ``--to`` calls that."""

SILENT = {"diffusers, CogVideo's scripts, CogKit", "kohya, bf16, without alpha", "DiffSynth-Studio"}
ALPHAS = {name: 0.1 if name == "ComfyUI" else ALPHA for name in KINDS}
VIA: tuple[LoraFormatName, ...] = ("diffusers", "peft", "kohya", "comfyui")


@pytest.fixture
def ours(tiny: Tiny, tmp_path: Path) -> CogVideoXTransformer3DModel:
    """A tiny model with an adapter of rank 4 and alpha 3, a convolution and embeddings among its layers."""
    (tmp_path / "base").symlink_to(tiny("2b"))
    transformer = base(tiny("2b"))
    add_lora(transformer, rank=RANK, alpha=ALPHA, target_modules=TARGETS, seed=1)
    return moved(transformer).eval()


def tensors_in(path: Path) -> Tensors:
    path = find_lora(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    found: Tensors = torch.load(path, weights_only=True)
    return found


def target(folder: Path, lora_format: LoraFormatName) -> Path:
    return folder / (lora_format if LORA_FORMATS[lora_format].alpha == "folder" else f"{lora_format}.safetensors")


def same(one: Lora, other: Lora) -> None:
    """See that two LoRAs are the same to the bit, whatever dimensions of 1 a format adds to magnitudes."""
    assert one.pairs.keys() == other.pairs.keys()
    for name, pair in one.pairs.items():
        theirs = other.pairs[name]
        assert pair.down.dtype == theirs.down.dtype
        assert torch.equal(pair.down, theirs.down)
        assert torch.equal(pair.up, theirs.up)
        assert other.scale_of(name) == (
            pytest.approx(one.scale_of(name), rel=1e-15) if one.rslora else one.scale_of(name)
        )
        assert (pair.alpha is None) == (theirs.alpha is None)
        if pair.magnitude is not None:
            assert theirs.magnitude is not None
            assert torch.equal(pair.magnitude, theirs.magnitude)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_to_other_formats_and_back_to_the_bit(
    kind: str, ours: CogVideoXTransformer3DModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, own = KINDS[kind]
    file = write(tmp_path / "given", ours)
    before, lora = tensors_in(file), read_lora(find_lora(file))
    for via in VIA:
        folder = tmp_path / f"via-{via}"
        ran = run(capsys, "lora", "convert", file, "--to", via, "--output", target(folder, via))
        assert ("does not record the alpha; assuming the rank, 4" in ran.err) == (kind in SILENT)
        same(lora, read_lora(find_lora(target(folder, via))))
        run(capsys, "lora", "convert", target(folder, via), "--to", own, "--output", target(folder / "back", own))
        back = tensors_in(target(folder / "back", own))
        assert back.keys() == before.keys()
        for name, value in before.items():
            assert back[name].dtype == value.dtype
            assert torch.equal(back[name], value)
    assert read_lora(find_lora(target(tmp_path / "via-kohya" / "back", own))).facts.get("base_model") == (
        "5b" if kind == "cogtune" else None
    )


@pytest.mark.parametrize("kind", KINDS)
def test_show_says_of_every_kind_what_it_is(
    kind: str, ours: CogVideoXTransformer3DModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = KINDS[kind][0](tmp_path / "given", ours)
    (told,) = json.loads(run(capsys, "lora", "show", file, "--json").out)
    assert told["ranks"] == [RANK]
    assert told["strength_known"] == (kind not in SILENT)
    assert told["alphas"] == [None] if kind in SILENT else told["alphas"] == [pytest.approx(ALPHAS[kind])]
    assert told["targets"]["to_q"] == 2
    assert told["targets"]["patch_embed.proj"] == 1
    assert (told["layers"], told["fits"]) == (len(read_lora(find_lora(file)).pairs), [])
    told = run(capsys, "lora", "show", file).out
    assert ("not in the file" in told) == (kind in SILENT)


@pytest.mark.parametrize("kind", ["kohya, musubi-tuner", "ComfyUI", "VideoX-Fun, .pt"])
def test_plain_diffusers_and_peft_load_what_is_converted(
    kind: str, ours: CogVideoXTransformer3DModel, tiny: Tiny, tmp_path: Path
) -> None:
    file = KINDS[kind][0](tmp_path / "given", ours)
    wanted = effect(read_lora(find_lora(file)), tiny("2b"))
    commands.convert(file, tmp_path / "x.safetensors", "diffusers")
    transformer = base(tiny("2b"))
    transformer.load_lora_adapter(tmp_path, weight_name="x.safetensors")
    assert torch.equal(answer(transformer.eval()), wanted)
    commands.convert(file, tmp_path / "adapter", "peft")
    theirs = PeftModel.from_pretrained(base(tiny("2b")), tmp_path / "adapter")
    assert torch.equal(answer(theirs.base_model.model.eval()), wanted)
    assert not torch.equal(wanted, answer(base(tiny("2b"))))


def test_comfyui_finds_every_key_in_its_own_model(
    ours: CogVideoXTransformer3DModel, tiny: Tiny, tmp_path: Path
) -> None:
    """Its loader knows ``diffusion_model.`` and the name of a weight, and drops what it does not know."""
    transformer = base(tiny("2b"))
    add_lora(transformer, rank=2, alpha=1, target_modules=EVERY, seed=1)
    save_lora(tmp_path / "x.safetensors", moved(transformer), {})
    commands.convert(tmp_path / "x.safetensors", tmp_path / "c.safetensors", "comfyui")
    core = {
        "diffusion_model." + name.replace("transformer_blocks.", "blocks.").replace("_embedding.", "_embedding_")
        for name in base(tiny("2b")).state_dict()
    }
    for key in load_file(tmp_path / "c.safetensors"):
        layer = re.sub(r"\.(lora_A\.weight|lora_B\.weight|alpha)$", "", key)
        assert layer != key
        assert f"{layer}.weight" in core


@pytest.mark.parametrize("lora_format", LORA_FORMATS)
@pytest.mark.parametrize("rslora", [False, True])
def test_dora_and_rank_stabilised_loras_go_through_every_format(
    lora_format: LoraFormatName, rslora: bool, tiny: Tiny, tmp_path: Path
) -> None:
    transformer = base(tiny("2b"))
    add_lora(transformer, rank=3, alpha=0.7, target_modules=["to_q"], seed=1, dora=True, rslora=rslora)
    save_lora(tmp_path / "x.safetensors", moved(transformer), {})
    lora = read_lora(tmp_path / "x.safetensors")
    if lora_format == "diffsynth":
        with pytest.raises(CogtuneError, match="does not support"):
            write_lora(lora, target(tmp_path, lora_format), lora_format)
        return
    write_lora(lora, target(tmp_path, lora_format), lora_format)
    back = read_lora(find_lora(target(tmp_path, lora_format)))
    assert back.dora
    same(lora, back)


def test_a_format_without_alpha_gets_the_strength_in_its_numbers(
    ours: CogVideoXTransformer3DModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = KINDS["kohya, musubi-tuner"][0](tmp_path / "given", ours)
    ran = run(capsys, "lora", "convert", file, "--to", "diffsynth", "--output", tmp_path / "x.safetensors")
    assert "B is multiplied by the strength" in ran.err
    lora, back = read_lora(file), read_lora(tmp_path / "x.safetensors")
    for name, pair in lora.pairs.items():
        assert back.scale_of(name) == 1
        torch.testing.assert_close(back.pairs[name].up, pair.up * (ALPHA / RANK))


def test_layers_of_different_rank_and_alpha_go_there_and_back(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(7)
    pairs = {
        f"transformer_blocks.{n % 3}.attn1.to_{kind}": Pair(
            torch.randn(n, 64, generator=random),
            torch.randn(64, n, generator=random),
            None if n == 2 else 0.1 * n,
        )
        for n, kind in enumerate("qkvqkv", 1)
    }
    lora = Lora(path=tmp_path, source_format="x", pairs=pairs, facts={})
    for lora_format in VIA:
        write_lora(lora, target(tmp_path, lora_format), lora_format)
        same(lora, read_lora(find_lora(target(tmp_path, lora_format))))


def test_a_headers_own_words_survive(ours: CogVideoXTransformer3DModel, tmp_path: Path) -> None:
    words = {"ss_network_alpha": str(ALPHA), "ss_tag_frequency": '{"a": 1}', "modelspec.title": "boats"}
    file = written(tmp_path / "given", renamed(bare(ours), kohya("lora_unet_")), words)
    commands.convert(file, tmp_path / "x.safetensors", "diffusers")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        header = opened.metadata()
    assert header["modelspec.title"] == "boats"
    assert header["ss_tag_frequency"] == '{"a": 1}'
    assert "ss_network_alpha" not in header
    assert read_lora(tmp_path / "x.safetensors").alphas == [ALPHA]


# -------------------------------------------------------------------------------------------------------- strength


def test_a_strength_that_is_not_known_can_be_set(
    ours: CogVideoXTransformer3DModel, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = by_diffusers(tmp_path / "given", ours)
    run(capsys, "lora", "convert", file, "--lora-alpha", ALPHA, "--output", tmp_path / "x.safetensors")
    assert torch.equal(effect(read_lora(tmp_path / "x.safetensors"), tiny("2b")), answer(ours))
    again = run(
        capsys,
        *("lora", "convert", tmp_path / "x.safetensors", "--lora-alpha", 2, "--output", "y.safetensors"),
        status=2,
    )
    assert "already records an alpha of 3" in again.err
    for wrong in ("0", "-1", "nan", "inf"):
        told = run(capsys, "lora", "convert", file, "--lora-alpha", wrong, "--output", "y.safetensors", status=2).err
        assert "must be greater than 0" in told


# ---------------------------------------------------------------------------------------------------------- resize


def change(lora: Lora, name: str) -> torch.Tensor:
    up, down = matrices(lora.pairs[name])
    return lora.scale_of(name) * up @ down


def test_resize_finds_the_nearest_and_says_how_far_it_is(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = two[0]
    ran = run(capsys, "lora", "resize", file, "--rank", 2, "--output", tmp_path / "small.safetensors")
    lora, small = read_lora(find_lora(file)), read_lora(tmp_path / "small.safetensors")
    assert (small.ranks, small.alphas, small.facts["prompt"]) == ([2], [ALPHA / 2], "a")
    lost = whole = 0.0
    for name in lora.pairs:
        values = torch.linalg.svdvals(change(lora, name))
        difference = float((change(lora, name) - change(small, name)).square().sum())
        assert difference == pytest.approx(float(values[2:].square().sum()), rel=1e-4)  # Eckart and Young
        lost, whole = lost + difference, whole + float(values.square().sum())
    assert f"off by {(lost / whole) ** 0.5:.2%} of the LoRA's change" in ran.out
    told = run(capsys, "lora", "resize", file, "--rank", 4, "--output", tmp_path / "y.safetensors", status=2).err
    assert "whose rank is 4" in told


def test_resize_loses_nothing_of_what_has_a_low_rank(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(3)
    down, up = torch.randn(2, 64, generator=random), torch.randn(64, 2, generator=random)
    mixed = torch.randn(8, 2, generator=random)
    name = "transformer_blocks.0.attn1.to_q"
    pair = Pair(mixed @ down, up @ torch.linalg.pinv(mixed), None)
    made = resize(Lora(path=tmp_path, source_format="x", pairs={name: pair}, facts={}), 2)
    assert made.error < 1e-6
    assert made.lora.without_alpha == [name]
    torch.testing.assert_close(change(made.lora, name), (up @ down).double(), rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- blend


@pytest.fixture
def two(tiny: Tiny, tmp_path: Path) -> tuple[Path, Path]:
    """Two LoRAs of other ranks, alphas and layers."""
    for name, rank, alpha, targets in (("a", 4, 3.0, ["to_q", "patch_embed.proj"]), ("b", 2, 5.0, ["to_q", "to_k"])):
        transformer = base(tiny("2b"))
        add_lora(transformer, rank=rank, alpha=alpha, target_modules=targets, seed=rank)
        save_lora(tmp_path / f"{name}.safetensors", moved(transformer), {"base_model": "2b", "prompt": name})
    return tmp_path / "a.safetensors", tmp_path / "b.safetensors"


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_blend_is_the_weighted_sum(
    two: tuple[Path, Path], tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run(capsys, "lora", "merge", f"{two[0]}:0.8", f"{two[1]}:-0.5", "--output", tmp_path / "both.safetensors")
    assert "rank 6, 5 layers, off by 0.00% of the sum" in ran.out
    first, second, both = (read_lora(path) for path in (*two, tmp_path / "both.safetensors"))
    assert both.facts["base_model"] == "2b"
    assert "prompt" not in both.facts
    for name in both.pairs:
        wanted = sum(
            weight * change(lora, name) for lora, weight in ((first, 0.8), (second, -0.5)) if name in lora.pairs
        )
        torch.testing.assert_close(change(both, name), wanted, rtol=1e-5, atol=1e-7)
    transformer = base(tiny("2b"))
    for number, path in enumerate(two):
        transformer.load_lora_adapter(path.parent, weight_name=path.name, adapter_name=str(number))
    transformer.set_adapters(["0", "1"], [0.8, -0.5])
    torch.testing.assert_close(effect(both, tiny("2b")), answer(transformer.eval()), rtol=1e-3, atol=1e-4)


def test_a_blend_of_equal_strengths_keeps_every_bit(two: tuple[Path, Path]) -> None:
    lora = read_lora(two[0])
    made = blend([(lora, 0.3), (lora, 0.3)], two[0]).lora
    for name, pair in lora.pairs.items():
        assert torch.equal(made.pairs[name].up, torch.cat([pair.up, pair.up], dim=1))
        assert torch.equal(made.pairs[name].down, torch.cat([pair.down, pair.down]))
        assert made.scale_of(name) == pytest.approx(0.3 * 3 / 4)


def test_a_blend_of_a_lower_rank_says_its_error(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run(capsys, "lora", "merge", *two, "--rank", 3, "--dtype", "bf16", "--output", tmp_path / "x.safetensors")
    small = read_lora(tmp_path / "x.safetensors")
    loras = [read_lora(path) for path in two]
    lost = whole = 0.0
    for name, pair in small.pairs.items():
        assert pair.down.dtype == torch.bfloat16
        wanted = torch.stack([change(lora, name) for lora in loras if name in lora.pairs]).sum(0)
        lost += float((wanted - change(small, name)).square().sum())
        whole += float(wanted.square().sum())
    assert f"off by {(lost / whole) ** 0.5:.2%} of the sum" in ran.out
    assert max(small.ranks) == 3


def test_what_cannot_be_blended_is_refused(two: tuple[Path, Path], tiny: Tiny, tmp_path: Path) -> None:
    lora = read_lora(two[0])
    with pytest.raises(UsageError, match="weight of 0"):
        blend([(lora, 0.0)], two[0])
    name, pair = next(iter(lora.pairs.items()))
    dora = replace(lora, pairs={name: replace(pair, magnitude=torch.ones(pair.up.shape[0]))})
    with pytest.raises(CogtuneError, match="magnitudes do not add up"):
        blend([(dora, 1.0)], two[0])
    wide = replace(lora, pairs={name: replace(pair, up=torch.ones(7, pair.rank))})
    with pytest.raises(CogtuneError, match="for different models"):
        blend([(lora, 1.0), (wide, 1.0)], two[0])
    with pytest.raises(UsageError, match="FILE:WEIGHT"):
        weighted("x.safetensors:much")
    (tmp_path / "odd:1").touch()
    assert weighted(str(tmp_path / "odd:1")) == (tmp_path / "odd:1", 1.0)
    assert weighted("a:b:-2e-1") == (Path("a:b"), -0.2)


# ------------------------------------------------------------------------------------------------ fuse and extract


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_fused_folder_is_what_plain_diffusers_fuses(
    two: tuple[Path, Path], tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "fused"
    words = ("lora", "fuse", f"{two[0]}:0.8", f"{two[1]}:0.5", "--model", tiny("2b"), "--output", output)
    assert "5 of 64 tensors changed" in run(capsys, *words).out
    pipeline = CogVideoXPipeline.from_pretrained(output, dtype=torch.float32)
    other = CogVideoXPipeline.from_pretrained(tiny("2b"), dtype=torch.float32)
    for number, path in enumerate(two):
        other.load_lora_weights(path.parent, weight_name=path.name, adapter_name=str(number))
    other.set_adapters(["0", "1"], [0.8, 0.5])
    torch.testing.assert_close(
        answer(pipeline.transformer.eval()), answer(other.transformer.eval()), rtol=1e-4, atol=1e-5
    )
    run(capsys, *words)  # an earlier merge may be replaced
    (output / "mine.txt").touch()
    assert "contains files that the earlier merge did not write" in run(capsys, *words, status=2).err


@pytest.mark.parametrize("targets", [["to_q", "ff.net.2"]])
def test_a_dora_is_fused_as_peft_merges_it(targets: list[str], tiny: Tiny, tmp_path: Path) -> None:
    transformer = base(tiny("2b"))
    add_lora(transformer, rank=3, alpha=2.0, target_modules=targets, seed=1, dora=True)
    save_lora(tmp_path / "dora.safetensors", moved(transformer), {})
    made = commands.fuse([(tmp_path / "dora.safetensors", 1.0)], str(tiny("2b")), tmp_path / "fused")
    assert made.missing == ()
    fused = CogVideoXTransformer3DModel.from_pretrained(made.weights).eval()
    torch.testing.assert_close(answer(fused), answer(transformer.eval()), rtol=1e-4, atol=1e-4)


def test_a_lora_that_was_fused_is_extracted_again(
    two: tuple[Path, Path], tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.fuse([(two[0], 1.0)], str(tiny("2b")), tmp_path / "fused")
    words = ("lora", "extract", tmp_path / "fused", tiny("2b"), "--output", tmp_path / "x.safetensors")
    ran = run(capsys, *words, "--rank", 4)
    lora, back = read_lora(two[0]), read_lora(tmp_path / "x.safetensors")
    assert lora.pairs.keys() == back.pairs.keys()
    for name in lora.pairs:
        torch.testing.assert_close(change(back, name), change(lora, name), rtol=1e-3, atol=1e-5)
    assert "leaves out 0.0" in ran.out
    assert "0.00% lies where it has no adapter" in ran.out
    worse = run(capsys, *words, "--rank", 1, "--target-modules", "to_q", "--force").out
    left = float(re.findall(r"leaves out ([\d.]+)%", worse)[0])
    whole = sum(float(change(lora, name).square().sum()) for name in lora.pairs)
    held = sum(float(torch.linalg.svdvals(change(lora, name))[0]) ** 2 for name in lora.pairs if name.endswith("to_q"))
    assert left == pytest.approx(100 * (1 - held / whole) ** 0.5, abs=0.02)


def test_large_matrices_are_decomposed_by_random_projections(tmp_path: Path) -> None:
    from cogtune.merge.extract import _pair

    random = torch.Generator().manual_seed(1)
    low = torch.randn(300, 5, generator=random) @ torch.randn(5, 400, generator=random)
    noise = 0.01 * torch.randn(300, 400, generator=random)
    pair, lost = _pair(low + noise, 5, torch.float32)
    best = float(torch.linalg.svdvals((low + noise).double())[5:].square().sum())
    assert lost == pytest.approx(best, rel=1e-3)
    assert (pair.rank, pair.alpha) == (5, 5.0)


def test_what_has_no_difference_or_another_shape_is_refused(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("lora", "extract", tiny("2b"))
    assert "do not differ" in run(capsys, *words, tiny("2b"), "--output", "x.safetensors", status=1).err
    assert (
        "have different architectures" in run(capsys, *words, tiny("5b-i2v"), "--output", "x.safetensors", status=1).err
    )
    told = run(capsys, *words, tiny("2b"), "--target-modules", "to_x", "--output", "x.safetensors", status=2).err
    assert "no layer's name ends in to_x" in told
    assert not list(tmp_path.glob("x*"))


# --------------------------------------------------------------------------------------------------------- refused


def test_outputs_are_never_overwritten_or_of_another_kind(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("lora", "convert", two[0], "--output")
    before = two[1].read_bytes()
    assert "already exists" in run(capsys, *words, two[1], status=2).err
    assert two[1].read_bytes() == before
    assert "must end in .safetensors" in run(capsys, *words, tmp_path / "x.pt", status=2).err
    assert "is a folder" in run(capsys, *words, tmp_path / "x.safetensors", "--to", "peft", status=2).err
    run(capsys, *words, two[1], "--force")
    assert read_lora(two[1]).ranks == [4]


def test_show_tells_all_that_cannot_be_read(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.safetensors").touch()
    ran = run(capsys, "lora", "show", two[0], tmp_path / "empty.safetensors", tmp_path / "no", status=1)
    assert "cannot read 2 files" in ran.err
    assert "is empty" in ran.err
    assert "no such file" in ran.err


def test_values_that_a_format_cannot_hold_are_refused(tmp_path: Path) -> None:
    save_file(
        {f"proj_out.lora_{part}.weight": torch.full(shape, 1e3) for part, shape in (("A", (2, 4)), ("B", (4, 2)))},
        tmp_path / "x.safetensors",
    )
    twice = [(tmp_path / "x.safetensors", weight) for weight in (1e6, 1)]
    with pytest.raises(CogtuneError, match="too large for their number format"):
        commands.merge(twice, tmp_path / "y.safetensors", dtype="fp16")
    assert not (tmp_path / "y.safetensors").exists()


def test_fuse_and_show_name_the_model_that_a_lora_fits(tiny: Tiny, tmp_path: Path, two: tuple[Path, Path]) -> None:
    with pytest.raises(CogtuneError, match="does not fit"):
        commands.fuse([(two[0], 1.0)], str(tiny("1.5-5b")), tmp_path / "out")
    name = "transformer.transformer_blocks.29.attn1.to_q.lora_"
    tensors: dict[str, Any] = {f"{name}A.weight": torch.ones(2, 1920), f"{name}B.weight": torch.ones(1920, 2)}
    save_file(tensors, tmp_path / "real.safetensors")
    (told,) = commands.show([tmp_path / "real.safetensors"])
    assert told["fits"] == ["2b"]


def test_a_folder_with_anything_but_an_adapter_is_never_replaced(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's own folder as --output, say: its checkpoints would be deleted."""
    run_folder = tmp_path / "out"
    checkpoint = run_folder / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    transformer = base(tiny("2b"))
    add_lora(transformer, rank=RANK, alpha=ALPHA, target_modules=TARGETS, seed=1)
    save_lora(run_folder / "pytorch_lora_weights.safetensors", moved(transformer), {})
    words = ("lora", "convert", run_folder, "--to", "peft", "--force", "--output")
    told = run(capsys, *words, run_folder, status=2).err
    assert "contains checkpoint-5, which is no part of an adapter" in " ".join(told.split())
    assert checkpoint.is_dir()
    run(capsys, *words, tmp_path / "adapter")
    run(capsys, *words, tmp_path / "adapter")  # an adapter may be


@pytest.mark.parametrize("place", ["vae/config.json", "tokenizer/added_tokens.json"])
@pytest.mark.parametrize("kind", ["link", "device", "pipe"])
def test_what_links_bring_into_a_base_is_not_copied(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, place: str
) -> None:
    """A copy of a private file would be published by `cogtune push` as the model's own."""
    private, model = tmp_path / "private.json", tmp_path / "model"
    private.write_text('{"auth": "secret"}')
    shutil.copytree(tiny("2b"), model)
    (model / place).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(model / place)
    else:
        (model / place).symlink_to(private if kind == "link" else "/dev/zero")
    transformer = base(tiny("2b"))
    add_lora(transformer, rank=RANK, alpha=ALPHA, target_modules=TARGETS, seed=1)
    save_lora(tmp_path / "x.safetensors", moved(transformer), {})
    words = ("lora", "fuse", tmp_path / "x.safetensors", "--model", model, "--copy-base", "--output", tmp_path / "new")
    told = run(capsys, *words, status=1).err
    assert str(model / place) in "".join(told.split()) or place in told
    assert not (tmp_path / "new").exists()


def test_a_base_in_the_hubs_cache_is_copied(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its files are links to blobs beside the snapshots."""
    model, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    shutil.copytree(tiny("2b"), model)
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    transformer = base(tiny("2b"))
    add_lora(transformer, rank=RANK, alpha=ALPHA, target_modules=TARGETS, seed=1)
    save_lora(tmp_path / "x.safetensors", moved(transformer), {})
    words = ("lora", "fuse", tmp_path / "x.safetensors", "--model", model, "--copy-base", "--output", tmp_path / "new")
    run(capsys, *words)
    assert not any(path.is_symlink() for path in (tmp_path / "new").rglob("*"))
