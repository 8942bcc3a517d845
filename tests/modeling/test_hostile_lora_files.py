"""LoRA files of somebody who means harm: refused by name, in little time and memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cogtune.commands.infer.filling import _facts_of_merge
from cogtune.commands.infer.request import Problems, _in_file
from cogtune.data.prompts import _listed
from cogtune.modeling.lora_files import read_lora
from cogtune.run.folder import MERGE_NAME
from cogtune.system.errors import CogtuneError
from tests.support.payload import Payload

QUERY = "transformer.transformer_blocks.0.attn1.to_q"
DOWN, UP, ALPHA = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight", f"{QUERY}.alpha"
GOOD = {DOWN: torch.ones(4, 8), UP: torch.ones(8, 4)}
DEEP = "[" * 100_000 + "]" * 100_000
ADAPTER = "lora_adapter_metadata"


def settings(**values: Any) -> dict[str, str]:
    return {ADAPTER: json.dumps({f"transformer.{key}": value for key, value in values.items()})}


HEADERS = {
    "facts nested deeply": {"cogtune": DEEP},
    "an adapter nested deeply": {ADAPTER: DEEP},
    "a configuration nested deeply": {"lora_config": '{"a":' * 100_000 + "1" + "}" * 100_000},
    "no object": {ADAPTER: "[1]"},
    "no JSON": {ADAPTER: '{"transformer.lora_alpha": 4'},
    "half a character": {"cogtune": '{"base_model": "\\ud800"}'},
    "a number without end": settings(lora_alpha=10**400),
    "an alpha that no float holds": {"cogtune": '{"alpha": 1' + "0" * 400 + "}"},
    "an alpha that is no number": {"cogtune": '{"alpha": NaN}'},
    "a negative alpha": {"cogtune": '{"alpha": -3}'},
    "an alpha of nothing": {"cogtune": '{"alpha": 0}'},
    "an infinite alpha": {"cogtune": '{"alpha": Infinity}'},
    "a true alpha": settings(lora_alpha=True),
    "an alpha below what fp32 holds": settings(lora_alpha=1e-320),
    "kohya's alpha beyond fp32": {"ss_network_alpha": "1e300"},
    "a pattern that never ends": settings(lora_alpha=4, alpha_pattern={"([a-z0-9_.]+)+X": 3}),
    "a pattern that takes long": settings(lora_alpha=4, alpha_pattern={".*.*.*.*.*.*.*.*X": 3}),
    "ten thousand patterns": settings(lora_alpha=4, alpha_pattern=dict.fromkeys(map(str, range(10**4)), 3)),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(GOOD, path, HEADERS[case])
    with pytest.raises(CogtuneError, match=r"x.safetensors") as caught:
        read_lora(path)
    assert caught.value.hint


def test_a_pattern_of_peft_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(GOOD, path, settings(lora_alpha=4, alpha_pattern={r"transformer_blocks\.\d+\.attn1\.to_(q|k)": 3}))
    assert read_lora(path).alphas == [3.0]


def saved(value: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(value, path)


def compressed(path: Path) -> None:
    """A file whose zeros take a thousandth of their room."""
    plain = path.with_name("plain")
    torch.save({**GOOD, DOWN: torch.zeros(4, 1 << 18)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))


def pickled(data: bytes) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name, content in (("data.pkl", data), ("byteorder", b"little"), ("version", b"3\n")):
                file.writestr(f"archive/{name}", content)

    return write


CYCLE: dict[str, Any] = {}
CYCLE["state_dict"] = CYCLE
ONE = torch.ones(1)

FILES: dict[str, Callable[[Path], object]] = {
    "one number a trillion times": saved({DOWN: ONE.expand(1 << 20, 1 << 20), UP: ONE.expand(8, 1 << 20)}),
    "one number a thousand times": saved({DOWN: ONE.expand(4, 8), UP: torch.ones(8, 4)}),
    "sparse": saved({**GOOD, DOWN: torch.ones(4, 8).to_sparse()}),
    "compressed rows": lambda path: torch.save({**GOOD, DOWN: torch.ones(4, 8).to_sparse_csr()}, path),
    "without values": saved({**GOOD, DOWN: torch.empty(4, 8, device="meta")}),
    "nested": lambda path: torch.save({**GOOD, DOWN: torch.nested.nested_tensor([torch.ones(4, 8)])}, path),
    "two numbers in a byte": saved({**GOOD, DOWN: torch.zeros(4, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}),
    "complex": saved({**GOOD, DOWN: torch.ones(4, 8, dtype=torch.complex64)}),
    "a complex alpha": saved({**GOOD, ALPHA: torch.tensor(1j)}),
    "an alpha that no float holds": saved({**GOOD, ALPHA: 10**400}),
    "a dict in itself": saved(CYCLE),
    "a name of a million characters": saved({**GOOD, "model." * 200_000 + "x.lora_A.weight": torch.ones(4, 8)}),
    "a block of 5,000 digits": saved({**GOOD, DOWN.replace("s.0.", f"s.{'9' * 400}."): torch.ones(4, 8)}),
    "compressed": compressed,
    "two million lists": pickled(b"\x80\x02" + b"]" * 2_000_000 + b"a" * 1_999_999 + b"."),
}


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", FILES)
def test_a_file_of_torch_save_that_is_more_than_it_seems_is_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    FILES[case](path)
    with pytest.raises(CogtuneError, match=r"x\.pt"):
        read_lora(path)


def test_a_payload_does_not_run(tmp_path: Path) -> None:
    path, ran = tmp_path / "x.pt", tmp_path / "ran"
    pickled(pickle.dumps(Payload(ran), 2))(path)
    with pytest.raises(CogtuneError, match="could execute code"):
        read_lora(path)
    shutil.copy(path, tmp_path / "x.safetensors")
    with pytest.raises(CogtuneError):
        read_lora(tmp_path / "x.safetensors")
    assert not ran.exists()


FACTS = {
    "size": ([1], 5, "x", "0x0x0", "\u00b2x64x96", {"a": 1}, "9" * 5000 + "x64x96"),
    "fps": ("x", [1], -1, 0, True, 1e-300, 1e300),
    "precision": ("evil", 5, ["bf16"]),
    "prompt": (["x"], 5, {"a": 1}, True),
    "base_model": (["tiny:2b"], 5, "\0"),
    "model_path": (["x"], 5, "\0"),
    "id_token": (["x"], 5),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in FACTS.items() for value in values])
def test_facts_of_a_run_that_no_run_writes_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(GOOD, path, {"cogtune": json.dumps({"base_model": "5b", key: value})})
    with pytest.raises(CogtuneError, match=rf"x.safetensors: {key}"):
        read_lora(path)


@pytest.mark.parametrize("record", [[1], "x", {"size": 5}, {"fps": "x"}, {"prompt": [1]}])
def test_the_record_of_a_merge_is_checked(record: Any, tmp_path: Path) -> None:
    path = tmp_path / MERGE_NAME
    path.write_text(json.dumps({"run": record}))
    with pytest.raises(CogtuneError, match=MERGE_NAME):
        _facts_of_merge(path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_list_of_prompts_is_a_file(kind: str, tmp_path: Path, home: Path) -> None:
    path = tmp_path / "prompts.txt"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CogtuneError, match=r"--prompt: .*prompts\.txt"):
        _in_file(path, Problems(), "--prompt")
    problems: list[str] = []
    assert _listed(str(path), "validation_prompts", problems) == []
    assert "prompts.txt" in problems[0]
