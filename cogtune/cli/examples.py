"""The examples at the end of each command's help."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "dataset validate": (
        "cogtune dataset validate ./data --preset 4090-lora-5b",
        "cogtune dataset validate ./data --report page.html",
        "cogtune dataset validate ./data --quarantine bad.txt",
    ),
    "dataset cache": (
        "cogtune dataset cache ./data --preset 4090-lora-5b",
        "cogtune dataset cache ./data --preset 4090-lora-5b --status",
    ),
    "dataset bench": (
        "cogtune dataset bench --model 5b",
        "cogtune dataset bench --model 5b --size 49x480x720 --clips 40",
    ),
    "train": (
        "cogtune train --preset 4090-lora-5b",
        "cogtune train --preset 4090-lora-5b --steps 2000 --learning-rate 5e-5 --output out/boats",
        "cogtune train --resume latest --output out/boats",
    ),
    "report": ("cogtune report", "cogtune report out/boats"),
    "merge-zero": (
        "cogtune merge-zero out/checkpoint-1000",
        "cogtune merge-zero out/checkpoint-1000 --output merged --dtype bf16",
    ),
    "infer": (
        'cogtune infer --lora out/ --prompt "a steamboat on a wide river"',
        "cogtune infer --lora out/ --prompt prompts.txt --num-videos 4 --lora-scale 0.5,1 --grid --output videos/",
        'cogtune infer --model 5b-i2v --image first.png --prompt "the boat leaves the pier" --vram 8GB',
    ),
    "compare": (
        "cogtune compare out/",
        "cogtune compare out/ other/ style.safetensors --lora-scale 0.5,1,1.5 --num-videos 2",
        'cogtune compare out/checkpoint-500 --prompt "a red fox in snow" --unrelated "a city at night" --steps 30',
    ),
    "lora show": ("cogtune lora show style.safetensors", "cogtune lora show out/ other/adapter --json"),
    "lora convert": (
        "cogtune lora convert out/ --to comfyui --output boats-comfyui.safetensors",
        "cogtune lora convert style.safetensors --lora-alpha 64 --output style-diffusers.safetensors",
        "cogtune lora convert out/ --to peft --output adapter",
    ),
    "lora resize": (
        "cogtune lora resize out/ --rank 32 --output small.safetensors",
        "cogtune lora resize out/ --rank 16 --dtype bf16 --output smaller.safetensors",
    ),
    "lora merge": (
        "cogtune lora merge style.safetensors:0.8 boats/:0.5 --output both.safetensors",
        "cogtune lora merge a.safetensors b.safetensors --rank 64 --output both.safetensors",
    ),
    "lora fuse": (
        "cogtune lora fuse out/ --model 5b --output fused",
        "cogtune lora fuse a.safetensors:0.7 b.safetensors:0.3 --model 5b --output fused --copy-base",
    ),
    "lora extract": (
        "cogtune lora extract out/checkpoint-1000-merged 5b --rank 64 --output full.safetensors",
        "cogtune lora extract tuned 5b --target-modules to_q,to_k,to_v,to_out.0 --output attention.safetensors",
    ),
    "push": (
        "cogtune push out/ user/name",
        "cogtune push out/checkpoint-500 user/name --private",
        "cogtune push out/ user/name --private --every 10",
    ),
    "presets": ("cogtune presets --here", "cogtune presets", "cogtune presets 4090-lora-5b"),
    "plan": ("cogtune plan --preset 4090-lora-5b", "cogtune plan --preset a100-sft-5b-zero2-offload --fit"),
    "bench": (
        "cogtune bench --preset 4090-lora-5b",
        "cogtune bench --preset 4090-lora-5b --compare plain",
    ),
    "import": (
        "cogtune import CogVideo/finetune/train_ddp_t2v.sh --output run.yaml",
        "cogtune import quickstart/scripts/t2v/config.yaml",
        "cogtune import train.sh --leave-out my_flag --json",
    ),
    "doctor": ("cogtune doctor", "cogtune doctor --json"),
    "demo": ("cogtune demo", "cogtune demo my-demo"),
    "random-model": ("cogtune random-model 5b model", "cogtune random-model 2b model --scale full"),
}
"""By command. Tests parse each of them."""


def epilog(command: str) -> str:
    """Return the examples of a command, as the end of its help."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  {line}" for line in EXAMPLES[command])])
