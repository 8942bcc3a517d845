"""Make nano's tokenizer and text encoder: python -m tools.nano.train_text --parts build/nano

The tokenizer is a SentencePiece model of the world's captions and of words.txt, capitals folded. The encoder is a T5 of
two layers, trained for minutes on a CPU to say two things from its output: each token, also the masked ones (so that
any two words stay apart, unseen ones too), and what the caption is about, in the order of its words. It is frozen while
transformers are trained, as the real one is.
"""

from __future__ import annotations

import argparse
import io
import string
import tempfile
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2
from torch import nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from cogtune.data.nano import world
from cogtune.modeling.nano import TEXT_TOKENS, nano_text_config
from cogtune.modeling.random_weights import write_tokenizer
from cogtune.system.folders import remove_folder
from tools.nano.common import Deadline, best_device, machine, note, say

_CHARACTERS = "abcdefghijklmnopqrstuvwxyz 0123456789 .,;:!?'\"()-/&%+#"
_EXTRA_IDS = 100
_MASKED = 0.15
_PARTS = ("colour", "shape", "motion", "background")


def words() -> list[str]:
    return (Path(__file__).parent / "words.txt").read_text().split()


def captions(seed: int, count: int) -> list[str]:
    return [scene.caption for scene in world.training_scenes(seed, range(count))]


def tokenizer_model(seed: int) -> bytes:
    """Return a unigram model; one thread, since the order of sums changes its bytes."""
    every = words()
    ring = every + every[:6]
    phrases = [" ".join(ring[start : start + 7]) + "." for start in range(len(every))]
    made = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as folding:  # the built-in rules would take 240 kB
        folding.writelines(f"{ord(capital):X}\t{ord(capital.lower()):X}\n" for capital in string.ascii_uppercase)
        folding.flush()
        _train(made, folding.name, [*captions(seed, 1500), *phrases * 2, _CHARACTERS])
    model = sentencepiece_model_pb2.ModelProto.FromString(made.getvalue())
    model.normalizer_spec.normalization_rule_tsv = ""  # else the name of the temporary file stays in it
    return bytes(model.SerializeToString(deterministic=True))


def _train(made: io.BytesIO, folding: str, texts: list[str]) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=made,
        model_type="unigram",
        normalization_rule_tsv=folding,
        vocab_size=1100,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        num_threads=1,
        minloglevel=2,
    )


class Reader(nn.Module):
    """The encoder with the heads that are thrown away after training."""

    def __init__(self, encoder: T5EncoderModel, names: dict[str, list[str]]) -> None:
        super().__init__()
        self.encoder = encoder
        width, vocabulary = encoder.config.d_model, encoder.config.vocab_size
        self.token = nn.Linear(width, vocabulary)
        self.about = nn.ModuleDict({part: nn.Linear(width, len(choices)) for part, choices in names.items()})

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        hidden = self.encoder(tokens)[0]  # no attention mask: the pipelines give none
        mean = hidden.mean(dim=1)
        return self.token(hidden), {part: head(mean) for part, head in self.about.items()}


def disturbed(caption: str, choices: list[str], random: np.random.Generator) -> str:
    """Return the caption with about a third of its words replaced by any others."""
    mixed = [str(random.choice(choices)) if random.random() < 0.35 else word for word in caption.split()]
    return " ".join(mixed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seconds", type=float, default=280.0, help="stop after this long, whatever is done")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    given = parser.parse_args()
    device, deadline = best_device(given.device), Deadline(given.seconds)
    given.parts.mkdir(parents=True, exist_ok=True)
    if (given.parts / "tokenizer").exists():
        remove_folder(given.parts / "tokenizer")
    write_tokenizer(given.parts / "tokenizer", tokenizer_model(given.seed), max_tokens=TEXT_TOKENS)
    tokenizer = AutoTokenizer.from_pretrained(given.parts / "tokenizer")
    vocabulary = -(-len(tokenizer) // 8) * 8
    say(f"{len(tokenizer)} tokens, {_EXTRA_IDS} of them extra ids")

    torch.manual_seed(given.seed)
    random = np.random.default_rng(given.seed)
    names = {
        "colour": list(world.COLOURS),
        "shape": list(world.SHAPES),
        "motion": list(world.MOTIONS),
        "background": list(world.BACKGROUNDS),
    }
    model = Reader(T5EncoderModel(T5Config(**nano_text_config(vocabulary))), names).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.learning_rate, weight_decay=0.0)
    choices, losses = words(), []
    step = 0
    while step < given.steps and not deadline:
        scenes = world.training_scenes(given.seed + 1, range(step * given.batch_size, (step + 1) * given.batch_size))
        half = len(scenes) // 2
        texts = [scene.caption for scene in scenes[:half]]
        texts += [disturbed(scene.caption, choices, random) for scene in scenes[half:]]
        tokens = tokenizer(
            texts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids.to(device)
        masked = (torch.rand(tokens.shape, device=device) < _MASKED) & (tokens > 2)
        extra = len(tokenizer) - _EXTRA_IDS
        said, about = model(torch.where(masked, extra, tokens))
        token_loss = nn.functional.cross_entropy(said[tokens > 0], tokens[tokens > 0])
        about_loss = sum(
            nn.functional.cross_entropy(
                about[part][:half],
                torch.tensor([names[part].index(getattr(s.subject, part)) for s in scenes[:half]], device=device),
            )
            for part in _PARTS
        )
        for group in optimizer.param_groups:
            group["lr"] = given.learning_rate * min(1.0, (step + 1) / 50) * max(0.02, 1 - step / given.steps)
        optimizer.zero_grad()
        (token_loss + 0.5 * about_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0 or step == given.steps:
            assert isinstance(about_loss, torch.Tensor)  # there are parts
            losses.append([step, round(token_loss.item(), 4), round(about_loss.item(), 4)])
            say(f"step {step}: tokens {losses[-1][1]}, about {losses[-1][2]}")
    model.encoder.eval().cpu().half().save_pretrained(given.parts / "text_encoder")
    facts = {"steps": step, "batch_size": given.batch_size, "learning_rate": given.learning_rate, "seed": given.seed}
    facts |= {"world": world.WORLD_VERSION, "losses": losses, **machine(device)}
    note(given.parts, "tokenizer", {"seed": given.seed, "tokens": len(tokenizer)})
    note(given.parts, "text_encoder", facts)


if __name__ == "__main__":
    main()
