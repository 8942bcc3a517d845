"""LoRA files as other programs write them: all have the same effect, or are refused with what would be left out."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import save_file

from cogtune.modeling.adapters import add_lora, save_lora
from cogtune.modeling.lora_files import (
    Lora,
    add_all,
    add_to,
    check_applied,
    check_fits,
    fitting_models,
    read_lora,
    scale_all,
    start_from,
)
from cogtune.modeling.lora_files.names import layer_name, parse_name, source_format_of
from cogtune.models import layers
from cogtune.models.checkpoint_configs import published_spec, read_spec
from cogtune.models.lora_formats import LORA_FORMATS
from cogtune.models.variants import VARIANTS
from cogtune.run.lora_paths import find_lora
from cogtune.system.errors import CogtuneError, UsageError
from tests.support.adapters import answer
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


@pytest.fixture
def ours(tiny: Callable[[str], Path]) -> CogVideoXTransformer3DModel:
    """A tiny model with an adapter of rank 4 and alpha 3."""
    transformer = base(tiny("2b"))
    add_lora(transformer, rank=RANK, alpha=ALPHA, target_modules=TARGETS, seed=1)
    return moved(transformer).eval()


SILENT: dict[str, Writer] = {
    "diffusers, CogVideo's scripts, CogKit": by_diffusers,
    "no prefix": lambda to, ours: written(to, bare(ours)),
    "PEFT's raw state": lambda to, ours: written(to, renamed(bare(ours), dotted("base_model.model.", "default."))),
    "DiffSynth-Studio": lambda to, ours: written(to, renamed(bare(ours), diffsynth)),
    "DiffSynth-Studio, of the whole pipeline": lambda to, ours: written(
        to, renamed(bare(ours), lambda layer, part: f"pipe.dit.{diffsynth(layer, part)}")
    ),
    "ComfyUI": lambda to, ours: written(to, renamed(bare(ours), dotted("diffusion_model."))),
    "of a compiled model under DDP": lambda to, ours: written(
        to, renamed(bare(ours), dotted("module._orig_mod.transformer."))
    ),
    "torch.save": lambda to, ours: torch_saved(to, renamed(bare(ours), dotted("transformer."))),
    "torch.save, wrapped": lambda to, ours: torch_saved(to, {"step": 5, "state_dict": bare(ours)}, "x.ckpt"),
    "VideoX-Fun, underscores throughout": lambda to, ours: written(
        to, renamed(bare(ours), lambda layer, part: kohya("lora_unet__")(layer, part).replace(".", "_"))
    ),
}
"""Files that do not say alpha."""

TOLD: dict[str, Writer] = {
    "cogtune": lambda to, ours: (save_lora(to / "x.safetensors", ours, {}), to / "x.safetensors")[1],
    "diffusers with metadata": with_its_metadata,
    "diffusers with alpha tensors": lambda to, ours: written(
        to, renamed(bare(ours), dotted("transformer."), alpha=ALPHA)
    ),
    "finetrainers": by_finetrainers,
    "kohya, musubi-tuner": lambda to, ours: written(to, renamed(bare(ours), kohya("lora_unet_"), alpha=ALPHA)),
    "OneTrainer": lambda to, ours: written(to, renamed(bare(ours), kohya("lora_transformer_"), alpha=ALPHA)),
    "VideoX-Fun": lambda to, ours: written(to, renamed(bare(ours), kohya("lora_unet__"), alpha=ALPHA)),
    "VideoX-Fun, .pt": lambda to, ours: torch_saved(to, renamed(bare(ours), kohya("lora_unet__"), alpha=ALPHA)),
    "ComfyUI": lambda to, ours: written(to, renamed(bare(ours), dotted("diffusion_model."), alpha=ALPHA)),
    "kohya, alpha in the header alone": lambda to, ours: written(
        to, renamed(bare(ours), kohya("lora_unet_")), {"ss_network_alpha": str(ALPHA), "ss_network_dim": str(RANK)}
    ),
    "alpha as a plain number": lambda to, ours: torch_saved(
        to,
        {
            name: value.item() if name.endswith("alpha") else value
            for name, value in renamed(bare(ours), kohya("lora_unet_"), alpha=ALPHA).items()
        },
    ),
}
"""Files that do."""


def of(path: Path, model: Path) -> Lora:
    return check_fits(read_lora(find_lora(path)), read_spec(model), "2b")


@pytest.mark.parametrize("program", TOLD)
def test_a_file_has_the_effect_it_was_trained_for(
    program: str, ours: CogVideoXTransformer3DModel, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    lora = of(TOLD[program](tmp_path, ours), tiny("2b"))
    assert lora.without_alpha == []
    assert (lora.ranks, lora.alphas) == ([RANK], [ALPHA])
    assert set(lora.pairs) == set(layers.targeted(read_spec(tiny("2b")), TARGETS))
    assert torch.equal(effect(lora, tiny("2b")), answer(ours))
    assert float((answer(ours) - answer(base(tiny("2b")))).abs().mean()) > 0.01


@pytest.mark.parametrize("program", SILENT)
def test_a_file_without_alpha_says_so_and_takes_the_one_that_is_given(
    program: str, ours: CogVideoXTransformer3DModel, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    lora = of(SILENT[program](tmp_path, ours), tiny("2b"))
    assert set(lora.without_alpha) == set(layers.targeted(read_spec(tiny("2b")), TARGETS))
    assert lora.scale_of("transformer_blocks.0.attn1.to_q") == 1.0
    assert not torch.equal(effect(lora, tiny("2b")), answer(ours))
    assert torch.equal(effect(lora.with_alpha(ALPHA), tiny("2b")), answer(ours))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_peft_adapters_folder_is_read_with_its_settings(
    safe: bool, ours: CogVideoXTransformer3DModel, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    if not safe:
        torch_saved(tmp_path, renamed(bare(ours), dotted("base_model.model.")), "adapter_model.bin")
        settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    else:
        by_peft(tmp_path, tiny("2b"))
        assert (tmp_path / "adapter_model.safetensors").is_file()
    lora = of(tmp_path, tiny("2b"))
    assert lora.alphas == [ALPHA]
    assert torch.equal(effect(lora, tiny("2b")), answer(ours))


def test_a_scale_multiplies_the_strength_in_every_format(
    ours: CogVideoXTransformer3DModel, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    wanted = effect(of(SILENT["no prefix"](tmp_path / "a", ours), tiny("2b")).with_alpha(ALPHA / 2), tiny("2b"))
    for number, write in enumerate(TOLD.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert torch.equal(effect(of(write(folder, ours), tiny("2b")), tiny("2b"), scale=0.5), wanted)


def test_layers_of_different_rank_and_alpha_are_applied_each_at_its_own(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    transformer = base(tiny("2b"))
    names = [f"transformer_blocks.{block}.attn1.to_{kind}" for block in (0, 1) for kind in "qkv"] + ["proj_out"]
    random = torch.Generator().manual_seed(7)
    tensors, shapes = {}, layers.weight_shapes(read_spec(tiny("2b")))
    for number, name in enumerate(names, 1):
        outputs, inputs = shapes[name]
        down, up = torch.randn(number, inputs, generator=random), torch.randn(outputs, number, generator=random)
        tensors[kohya("lora_unet_")(name, "down")], tensors[kohya("lora_unet_")(name, "up")] = down, up
        tensors[kohya("lora_unet_")(name, "alpha")] = torch.tensor(0.1 * number * number)
        transformer.get_submodule(name).weight.data += up @ down * (0.1 * number)
    lora = of(written(tmp_path, tensors), tiny("2b"))
    assert sorted(lora.ranks) == [1, 2, 3, 4, 5, 6, 7]
    torch.testing.assert_close(effect(lora, tiny("2b")), answer(transformer), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("naming", ["PEFT", "LyCORIS"])
@pytest.mark.parametrize("rslora", [False, True])
def test_doras_magnitudes_are_applied(naming: str, rslora: bool, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    transformer = base(tiny("2b"))
    add_lora(transformer, rank=RANK, alpha=ALPHA, target_modules=["to_q"], seed=1, dora=True, rslora=rslora)
    moved(transformer).eval()
    if naming == "PEFT":
        save_lora(path := tmp_path / "x.safetensors", transformer, {})
    else:
        weights = bare(transformer)
        magnitudes = {name: weights.pop(name) for name in list(weights) if "magnitude" in name}
        scale = ALPHA * (2 if rslora else 1)  # root of the rank: alpha / rank has to be alpha / √rank
        tensors = renamed(weights, kohya("lora_unet_"), alpha=scale)
        for name, value in magnitudes.items():
            tensors[f"lora_unet_{name.removesuffix('.lora_magnitude_vector').replace('.', '_')}.dora_scale"] = value[
                :, None
            ]
        path = written(tmp_path, tensors)
    lora = of(path, tiny("2b"))
    assert lora.dora
    assert torch.equal(effect(lora, tiny("2b")), answer(transformer))


@pytest.mark.parametrize("dora", [False, True])
def test_loras_are_switched_on_and_off_in_one_model(dora: bool, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    loras = []
    for name, targets, kind in (("one", ["to_q"], {"dora": dora}), ("other", ["to_q", "to_out.0"], {})):
        transformer = base(tiny("2b"))
        add_lora(transformer, rank=RANK, alpha=ALPHA, target_modules=targets, seed=1, **kind)
        save_lora(tmp_path / f"{name}.safetensors", moved(transformer), {})
        loras.append(of(tmp_path / f"{name}.safetensors", tiny("2b")))
    one, other = loras
    model = base(tiny("2b"))
    alone = answer(model)
    add_all(model, {"one": (one, 1.0), "other": (other, 1.0)})
    model.eval()
    both = answer(model)
    expected: tuple[tuple[dict[str, float], torch.Tensor], ...] = (
        ({}, alone),  # DoRA's magnitudes are off as well, which a strength of 0 would not do
        ({"one": 1.0}, effect(one, tiny("2b"))),
        ({"other": 2.0}, effect(other, tiny("2b"), scale=2.0)),
        ({}, alone),
        ({"one": 1.0, "other": 1.0}, both),
    )
    for scales, wanted in expected:
        scale_all(model, scales)
        assert torch.equal(answer(model), wanted), scales


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float64])
def test_a_file_of_another_number_format_is_applied_as_it_is_stored(
    stored: torch.dtype, ours: CogVideoXTransformer3DModel, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    tensors = renamed({name: value.to(stored) for name, value in bare(ours).items()}, kohya("lora_unet_"), alpha=ALPHA)
    for name, value in ours.named_parameters():
        if "lora_" in name:
            value.data = value.data.to(stored).float()
    assert torch.equal(effect(of(written(tmp_path, tensors), tiny("2b")), tiny("2b")), answer(ours))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_sits_in_a_half_precision_model_is_the_file_rounded(
    dtype: torch.dtype, ours: CogVideoXTransformer3DModel, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    lora = of(TOLD["kohya, musubi-tuner"](tmp_path, ours), tiny("2b"))
    dora = replace(
        lora,
        pairs={
            name: replace(pair, magnitude=torch.rand(pair.up.shape[0]))
            for name, pair in lora.pairs.items()
            if name != "patch_embed.proj"
        },
    )
    for one in (lora, dora):
        transformer = base(tiny("2b"), dtype=dtype)
        add_to(transformer, one, scale=0.3)
        check_applied(transformer, one, scale=0.3)
        with pytest.raises(CogtuneError, match="strength"):
            check_applied(transformer, one)


# ------------------------------------------------------------------------------------------------------- refused


def damaged(change: Callable[[Tensors], Any], naming: str = "transformer.") -> Writer:
    """Writes the adapter after a change to its tensors."""

    def write(folder: Path, ours: CogVideoXTransformer3DModel) -> Path:
        tensors = renamed(bare(ours), dotted(naming), alpha=ALPHA)
        change(tensors)
        return written(folder, tensors)

    return write


QUERY = "transformer.transformer_blocks.0.attn1.to_q"
DOWN, UP = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"

REFUSED: dict[str, tuple[Writer, str]] = {
    "a part of a layer that CogVideoX lacks": (
        damaged(lambda tensors: tensors.update({"transformer.blocks.0.cross.q.lora_A.weight": torch.ones(4, 8)})),
        r"1 of its \d+ tensors belong to no CogVideoX layer that a LoRA can change: transformer.blocks.0.cross.q",
    ),
    "a text encoder's": (
        damaged(lambda tensors: tensors.update({"lora_te_encoder_block_0_q.lora_down.weight": torch.ones(4, 8)})),
        "also adapts a text encoder",
    ),
    "LoKr": (
        damaged(lambda tensors: tensors.update({f"{QUERY}.lokr_w1": torch.ones(4, 8)})),
        "contains LoKr tensors, which are not supported",
    ),
    "LoHa alone": (
        lambda to, ours: written(to, {f"{QUERY}.hada_w1_a": torch.ones(4, 8), f"{QUERY}.alpha": torch.ones(())}),
        "contains LoHa tensors",
    ),
    "a bias": (
        damaged(lambda tensors: tensors.update({f"{QUERY}.lora_B.bias": torch.ones(256)})),
        "lora_B.bias",
    ),
    "a half": (damaged(lambda tensors: tensors.pop(UP)), "1 layers have an incomplete adapter"),
    "two ranks": (
        damaged(lambda tensors: tensors.update({UP: torch.ones(256, 5)})),
        "have different ranks: transformer_blocks.0.attn1.to_q .4x256 and 256x5.",
    ),
    "twice": (
        damaged(lambda tensors: tensors.update({DOWN.removeprefix("transformer."): torch.ones(4, 256)})),
        "two tensors are for the same part of one layer",
    ),
    "not a number": (
        damaged(lambda tensors: tensors.update({DOWN: torch.full((4, 256), torch.nan)})),
        f"1 tensors have values that are not finite: {DOWN}",
    ),
    "quantised": (
        damaged(lambda tensors: tensors.update({DOWN: torch.ones(4, 256, dtype=torch.int8)})),
        "number format that is not supported: .*int8",
    ),
    "not gathered": (
        damaged(lambda tensors: tensors.update({DOWN: torch.ones(0)})),
        "1 tensors are empty; they were not gathered",
    ),
    "no alpha": (
        damaged(lambda tensors: tensors.update({f"{QUERY}.alpha": torch.zeros(())})),
        "alpha is 0, not a positive number",
    ),
    "magnitudes of inputs": (
        damaged(lambda tensors: tensors.update({f"{QUERY}.dora_scale": torch.ones(1, 256)})),
        "dora_scale has shape 1x256",
    ),
    "two adapters": (
        lambda to, ours: written(
            to,
            {
                **renamed(bare(ours), dotted("", "one.")),
                "transformer_blocks.0.attn1.to_k.lora_A.two.weight": torch.ones(4, 256),
                "transformer_blocks.0.attn1.to_k.lora_B.two.weight": torch.ones(256, 4),
            },
        ),
        "several adapters: one, two",
    ),
    "whole weights": (
        lambda to, ours: written(to, {"transformer_blocks.0.attn1.to_q.weight": torch.ones(4, 4)}),
        "contains no LoRA for CogVideoX.*\n.*as --model",
    ),
    "nothing": (lambda to, ours: written(to, {}), "contains no LoRA"),
    "an optimizer's state": (lambda to, ours: torch_saved(to, {"step": 3, "state": {0: 1.0}}), "contains no LoRA"),
    "code": (lambda to, ours: torch_saved(to, {"a": Path}), "could execute code"),
    "LoHa by PEFT": (
        lambda to, ours: (
            torch_saved(to, bare(ours), "adapter_model.bin"),
            (to / "adapter_config.json").write_text('{"peft_type": "LOHA"}'),
            to,
        )[2],
        "is a LOHA adapter",
    ),
    "an alpha of nothing": (
        lambda to, ours: written(to, bare(ours), {"lora_config": '{"lora_alpha": 0}'}),
        "the alpha in its settings is 0, not a positive number",
    ),
    "a pattern of nonsense": (
        lambda to, ours: written(
            to, bare(ours), {"lora_config": '{"lora_alpha": 2, "alpha_pattern": {"(": 1, "to_q": "x"}}'}
        ),
        "the alpha in its settings is 'x'",
    ),
    "the base's own weights": (
        lambda to, ours: written(
            to, bare(ours) | {"transformer_blocks.0.attn1.to_q.base_layer.weight": torch.ones(4, 4)}
        ),
        "save only the adapter",
    ),
    "a DoRA of some layers": (
        lambda to, ours: written(
            to, bare(ours) | {"transformer_blocks.0.attn1.to_q.lora_magnitude_vector": torch.ones(256)}
        ),
        r"it is a DoRA, but \d+ of its \d+ layers have no magnitude",
    ),
    "new words": (
        lambda to, ours: written(to, bare(ours) | {"bundle_emb.style.t5": torch.ones(2, 8)}),
        "adapted embeddings tensors",
    ),
    "PiSSA": (
        lambda to, ours: written(to, bare(ours), {"lora_config": '{"init_lora_weights": "pissa_niter_4"}'}),
        "init_lora_weights 'pissa_niter_4': it belongs to a base whose own weights were changed",
    ),
    "QALoRA": (
        lambda to, ours: written(to, bare(ours), {"lora_config": '{"use_qalora": true, "arrow_config": null}'}),
        "settings say use_qalora, which is not applied",
    ),
    "modules_to_save": (
        lambda to, ours: written(
            to,
            renamed(bare(ours), dotted("base_model.model.")) | {"base_model.model.proj_out.weight": torch.ones(4, 4)},
        ),
        r"1 of its \d+ tensors belong to no CogVideoX layer.*\n.*whole layers \(PEFT's modules_to_save\)",
    ),
    "SAT": (
        lambda to, ours: torch_saved(
            to, {"module": {"model.diffusion_model.transformer.layers.0.attention.dense.matrix_A.0": torch.ones(4, 8)}}
        ),
        r"is a checkpoint of CogVideo's SAT, with a LoRA.*\n.*tools/export_sat_lora_weight\.py",
    ),
    "SAT's LoRA": (
        lambda to, ours: torch_saved(
            to,
            {
                "module": {
                    f"model.diffusion_model.mixins.lora.layers.0.attention.query_key_value.matrix_{side}.0": values
                    for side, values in (("A", torch.ones(4, 8)), ("B", torch.ones(8, 4)))
                }
            },
        ),
        r"is a checkpoint of CogVideo's SAT, with a LoRA.*\n.*tools/export_sat_lora_weight\.py",
    ),
    "quantised weights": (
        lambda to, ours: written(to, {name: (value * 100).to(torch.int8) for name, value in bare(ours).items()}),
        r"number format that is not supported: .*int8.*\n.*save it again in fp32",
    ),
    "a training that diverged": (
        lambda to, ours: written(to, {name: value * torch.nan for name, value in bare(ours).items()}),
        r"not finite.*\n.*its training diverged",
    ),
    "DoRA without magnitudes": (
        lambda to, ours: written(to, bare(ours), {"lora_config": '{"use_dora": true}'}),
        "its settings say DoRA, but it has no magnitudes",
    ),
}


@pytest.mark.parametrize("others", [False, True])
def test_settings_beside_a_file_of_another_name_are_its_own_where_it_is_alone(
    others: bool, ours: CogVideoXTransformer3DModel, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = by_peft(tmp_path / "peft", tiny("2b"))
    named = (folder / "adapter_model.safetensors").rename(folder / "my style.safetensors")
    if others:
        save_file({"x": torch.ones(1)}, folder / "other.safetensors")
    lora = read_lora(named)
    assert lora.without_alpha == (list(lora.pairs) if others else [])
    assert set(lora.alphas) == {RANK if others else ALPHA}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_left_out_is_refused_by_name(
    case: str, ours: CogVideoXTransformer3DModel, tmp_path: Path
) -> None:
    write, told = REFUSED[case]
    path = write(tmp_path, ours)
    with pytest.raises(CogtuneError) as caught:
        read_lora(find_lora(path))
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint
    assert re.search(told, str(caught.value), re.DOTALL), caught.value


_HEADER = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.safetensors", b"", "is empty"),
        (
            "a.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n",
            "is a Git LFS pointer",
        ),
        ("a.safetensors", b"<!DOCTYPE html><html>", "is a web page"),
        ("a.safetensors", b"\x10\0\0\0\0\0\0\0{", "is not a LoRA file"),
        ("a.pt", b"PK\x03\x04 and no more", "cannot read"),
        ("a.pt", b"\x80\x02 nor this", "cannot read|more than weights"),
        ("a.bin", b"nothing known", "is not a LoRA file"),
        ("a.gguf", b"GGUF\x03\0\0\0" + bytes(100), "is a GGUF file"),
        (
            "a.safetensors",
            len(_HEADER).to_bytes(8, "little") + _HEADER + b"\0" * 8,
            "a.safetensors is incomplete",
        ),
    ],
)
def test_what_is_no_file_of_weights_is_told_for_what_it_is(
    name: str, content: bytes, told: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CogtuneError, match=told):
        read_lora(tmp_path / name)


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_a_file_that_was_damaged_anywhere_is_told_in_words(
    form: str, ours: CogVideoXTransformer3DModel, tmp_path: Path
) -> None:
    """Cut short, and with bytes changed in what describes the tensors."""
    tensors = renamed(bare(ours), kohya("lora_unet_"), alpha=ALPHA)
    if form == "safetensors":
        path = written(tmp_path, tensors)
    else:
        torch.save(tensors, path := tmp_path / "x.pt", _use_new_zipfile_serialization=form == "zip")
    whole, random = path.read_bytes(), Random(5)
    failures: set[tuple[str, str]] = set()
    for attempt in range(300):
        data = bytearray(whole)
        if attempt % 2:
            data = data[: random.randrange(len(whole))]
        else:
            for _ in range(3):
                place = random.randrange(4000)
                data[place if attempt % 4 else -place - 1] = random.randrange(256)
        path.write_bytes(data)
        try:
            read_lora(path)
        except CogtuneError as error:
            failures.add((error.message, error.hint))
    assert len(failures) > 1
    for message, hint in failures:
        assert str(path) in message
        assert hint
        assert "space" not in message


def test_a_safetensors_file_of_another_name_is_read(
    ours: CogVideoXTransformer3DModel, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    written(tmp_path, bare(ours)).rename(tmp_path / "lora.bin")
    assert of(tmp_path / "lora.bin", tiny("2b")).ranks == [RANK]


def test_layers_that_the_base_lacks_are_refused(
    ours: CogVideoXTransformer3DModel, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    more = {
        f"transformer_blocks.{block}.attn1.to_q.lora_{matrix}.weight": torch.ones(shape)
        for block in (40, 41)
        for matrix, shape in (("A", (4, 256)), ("B", (256, 4)))
    }
    path = written(tmp_path, bare(ours) | more)
    with pytest.raises(CogtuneError, match="does not fit 2b") as caught:
        of(path, tiny("2b"))
    (detail,) = caught.value.details
    assert re.fullmatch(
        r"2 of its \d+ layers do not exist in the base: transformer_blocks.40.attn1.to_q, "
        r"transformer_blocks.41.attn1.to_q",
        detail,
    )


def published_lora(name: str, folder: Path) -> Path:
    width = layers.layers(published_spec(VARIANTS[name]))["transformer_blocks.0.attn1.to_q"][0]
    down, up = torch.ones(1, width, dtype=torch.float16), torch.ones(width, 1, dtype=torch.float16)
    return written(folder, {f"{QUERY}.lora_A.weight": down, f"{QUERY}.lora_B.weight": up})


def test_a_lora_of_another_width_is_refused_with_both_shapes_and_what_it_fits(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    assert fitting_models(read_lora(published_lora("2b", tmp_path / "2b"))) == ["2b"]
    path = published_lora("5b", tmp_path / "5b")
    with pytest.raises(CogtuneError, match="does not fit 2b") as caught:
        of(path, tiny("2b"))
    assert caught.value.details == (
        "1 of its 1 layers have another size in the base: transformer_blocks.0.attn1.to_q: 3072x3072 in the LoRA, "
        "256x256 in the base",
    )
    assert "it fits 5b, 5b-i2v, 1.5-5b, 1.5-5b-i2v" in caught.value.hint


# --------------------------------------------------------------------------------------- a look afterwards


@pytest.mark.parametrize("fault", ["a layer less", "another strength", "other values", "switched off"])
def test_what_a_library_did_not_take_over_is_noticed(
    fault: str,
    ours: CogVideoXTransformer3DModel,
    tiny: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lora = of(TOLD["diffusers with alpha tensors"](tmp_path, ours), tiny("2b"))
    load = CogVideoXTransformer3DModel.load_lora_adapter

    def careless(self: CogVideoXTransformer3DModel, weights: Mapping[str, torch.Tensor], **more: Any) -> None:
        left = {name: value for name, value in weights.items() if fault != "a layer less" or "proj_out" not in name}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as the program runs
            load(self, left, **more)
        layer = self.get_submodule("transformer_blocks.1.attn1.to_q")
        if fault == "another strength":
            layer.scaling["lora"] *= 2
        if fault == "other values":
            layer.lora_A["lora"].weight.data[0, 0] += 1

    def without(self: CogVideoXTransformer3DModel, *_: object) -> None:
        self.disable_lora()

    monkeypatch.setattr(CogVideoXTransformer3DModel, "load_lora_adapter", careless)
    if fault in ("another strength", "switched off"):
        monkeypatch.setattr(
            CogVideoXTransformer3DModel, "set_adapters", without if fault == "switched off" else lambda *_: None
        )
    with pytest.raises(CogtuneError, match="was not applied correctly"):
        add_to(base(tiny("2b")), lora)


def test_an_adapter_of_other_layers_or_rank_cannot_start_from_a_file(
    ours: CogVideoXTransformer3DModel, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    lora = of(TOLD["diffusers with alpha tensors"](tmp_path, ours), tiny("2b"))
    same = base(tiny("2b"))
    add_lora(same, rank=RANK, alpha=ALPHA, target_modules=TARGETS, seed=9)
    start_from(same, lora)
    assert torch.equal(answer(same.eval()), answer(ours))
    for rank, targets in ((RANK, TARGETS[:2]), (RANK + 1, TARGETS)):
        other = base(tiny("2b"))
        add_lora(other, rank=rank, alpha=ALPHA, target_modules=targets, seed=9)
        with pytest.raises(CogtuneError, match="was not applied correctly"):
            start_from(other, lora)


# --------------------------------------------------------------------------------------------- names and folders


@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_of_layers_is_that_of_the_model(name: str, tiny: Callable[[str], Path]) -> None:
    modules = base(tiny(name)).named_modules()
    shapes = {name: tuple(module.weight.shape) for name, module in modules if hasattr(module, "weight")}
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    assert layers.weight_shapes(read_spec(tiny(name))) == matrices


def test_every_layer_is_understood_under_every_name() -> None:
    for row in VARIANTS.values():
        for name in layers.layers(published_spec(row)):
            for written_name in (name, f"transformer.{name}", f"lora_unet__{name.replace('.', '_')}"):
                assert layer_name(written_name) == name
            for rename in (kohya("lora_unet_"), dotted("diffusion_model."), diffsynth, dotted("base_model.model.")):
                named = [parse_name(rename(name, part)) for part in ("down", "up", "alpha")]
                assert [one and (one.layer, one.part) for one in named] == [
                    (name, "down"),
                    (name, "up"),
                    (name, "alpha"),
                ]


LAYER = "transformer_blocks.0.attn1.to_q"

SCHEMES = {
    "lora_transformer_transformer_blocks_0_attn1_to_q.lora_down.weight": "OneTrainer",
    "lycoris_transformer_blocks_0_attn1_to_q.lora_up.weight": "LyCORIS",
    "pipe.dit.blocks.0.attn1.to_q.lora_A.default.weight": "DiffSynth-Studio",
    "model.base_model.model.transformer_blocks.0.attn1.to_q.lora_A.default.weight": "PEFT",
    "_forward_module.base_model.model.transformer_blocks.0.attn1.to_q.lora_A.default.weight": "PEFT",
    "transformer.transformer_blocks.0.attn1.processor.to_q_lora.down.weight": "diffusers before 0.22",
    "transformer_blocks.0.attn1.to_q.lora_A.weight": "diffusers' layer names",
    "pipeline.transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": "an unknown program",
}


@pytest.mark.parametrize("key", SCHEMES)
def test_the_scheme_of_names_is_known_by_its_program(key: str) -> None:
    named = parse_name(key)
    assert named is not None
    assert named.layer == LAYER
    assert source_format_of([key]) == SCHEMES[key]


def test_what_is_written_for_a_program_is_known_as_its() -> None:
    for name, lora_format in LORA_FORMATS.items():
        program = source_format_of([lora_format.key(LAYER, "down")])
        same = {"finetrainers": "diffusers", "diffsynth": "diffsynth-studio"}.get(name, name)
        assert same in program.lower()


@pytest.mark.parametrize(
    "key",
    [
        "transformer.transformer_blocks.0.attn2.to_q.lora_A.weight",
        "text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
        "transformer.transformer_blocks.0.attn1.to_q.weight",
        "transformer.transformer_blocks.x.attn1.to_q.lora_A.weight",
        "lora_te_transformer_blocks_0_attn1_to_q.lora_down.weight",
    ],
)
def test_what_is_no_part_of_an_adapter_of_cogvideox_is_not_taken_for_one(key: str) -> None:
    assert parse_name(key) is None


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_what_pytorch_puts_into_names_is_left_out(wrapper: str) -> None:
    for key in (
        f"{wrapper}.transformer_blocks.3.attn1.to_out.0.lora_A.weight",
        f"module.{wrapper}.transformer_blocks.3.{wrapper}.attn1.to_out.0.lora_A.default.weight",
    ):
        named = parse_name(key)
        assert named is not None
        assert (named.layer, named.part) == ("transformer_blocks.3.attn1.to_out.0", "down")


@pytest.mark.parametrize("prefix", ["", "transformer.", "unet."])
@pytest.mark.parametrize(("written_as", "layer"), [("to_q", "to_q"), ("to_v", "to_v"), ("to_out", "to_out.0")])
def test_names_of_attention_processors_are_understood(prefix: str, written_as: str, layer: str) -> None:
    for part in ("down", "up"):
        named = parse_name(f"{prefix}transformer_blocks.3.attn1.processor.{written_as}_lora.{part}.weight")
        assert named is not None
        assert (named.layer, named.part) == (f"transformer_blocks.3.attn1.{layer}", part)


def test_an_archive_is_no_damaged_file(ours: CogVideoXTransformer3DModel, tmp_path: Path) -> None:
    path = written(tmp_path / "a", bare(ours))
    with zipfile.ZipFile(tmp_path / "b.safetensors", "w") as archive:
        archive.write(path, path.name)
    with pytest.raises(CogtuneError, match=r"is a zip archive with lora\.safetensors in it") as caught:
        read_lora(tmp_path / "b.safetensors")
    assert caught.value.hint == "unpack it first"


def test_a_folder_without_a_lora_names_those_below_it(ours: CogVideoXTransformer3DModel, tmp_path: Path) -> None:
    for step in (500, 1000):
        by_diffusers(tmp_path / f"checkpoint-{step}", ours)
    with pytest.raises(UsageError, match="it is unclear which LoRA file to use") as caught:
        find_lora(tmp_path)
    assert [Path(line).parent.name for line in caught.value.details] == ["checkpoint-1000", "checkpoint-500"]
    assert find_lora(tmp_path / "checkpoint-500").is_file()
    (tmp_path / "both").mkdir()
    for name in "ab":
        written(tmp_path, bare(ours)).rename(tmp_path / "both" / f"{name}.safetensors")
    with pytest.raises(UsageError, match="it is unclear which LoRA file to use") as caught:
        find_lora(tmp_path / "both")
    assert [Path(line).name for line in caught.value.details] == ["a.safetensors", "b.safetensors"]
    (tmp_path / "both" / "a.safetensors").unlink()
    assert find_lora(tmp_path / "both").name == "b.safetensors"
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.bin"):  # what accelerate saves beside weights
        (tmp_path / "both" / name).touch()
    assert find_lora(tmp_path / "both").name == "b.safetensors"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").touch()
    with pytest.raises(UsageError, match="is a complete model") as caught:
        find_lora(tmp_path / "model")
    with pytest.raises(UsageError, match=r"no such file or folder: .*gone"):
        find_lora(tmp_path / "gone")


def test_a_header_of_any_length_is_read(ours: CogVideoXTransformer3DModel, tmp_path: Path) -> None:
    """A safetensors file begins with its header's length, and a pickle with the byte 0x80."""
    for padding in range(0, 600, 8):
        path = written(tmp_path, bare(ours), {"ss_network_alpha": "3", "padding": "x" * padding})
        if path.read_bytes()[:1] == b"\x80":
            break
    else:
        pytest.fail("no header was of such a length")
    assert read_lora(path).alphas == [ALPHA]
