"""Make the built-in student tiny, T5 of 2 + 2 layers: its tokenizer, and its pretraining.

    python tests/make_tiny.py [FOLDER]        # by default tests/tiny

It is pretrained on stories that are told, each with an account of its person's things in words:
"Ben had 12 cards, 6 less are 6, 3 more are 9." Words of them are masked, and later replaced, and
tiny writes what belongs there. Nothing is asked and no equation is written: questions, labels, and
explanations in the toy's form are new to tiny when its training begins.
The 14,000 steps took about 25 minutes on one thread of an AMD EPYC.
"""

import random
import re
import string
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import data


class Stage(NamedTuple):
    """A part of the pretraining, with its own stories."""

    seed: str
    steps: int
    warmup: int  # steps to the highest rate
    fall: int  # steps after which the rate would be 0
    lr: float
    most_events: int  # of a told story
    replaced: float  # the fraction of texts with replaced words; in the others words are masked


STAGES = [
    Stage("tiny", 10_000, 280, 14_000, 3e-3, 5, 0.0),
    Stage("cont", 4_000, 100, 4_000, 1.5e-3, 7, 0.4),
]
BATCH = 32
SENTINELS = 20
# Besides the words of the toy: a few more, so that its explanations can be told in other ways.
WORDS = "predict: explain: So the answer is because there are has"
SHAPE: Any = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # with T5's own pad_token_id 0 and eos_token_id 1


def told_story(rng: random.Random, most_events: int) -> tuple[str, str]:
    """A story, and an account of what its person had in turn."""
    story = data.random_story(rng, most_events)
    start = f"{story.person} had {story.start} {story.thing}"
    told = [start, *map(str, story.events)]
    account = [start]
    for step in data.follow(story.start, story.changes()):
        account.append(f"{step.b} {'more' if step.op == '+' else 'less'} are {step.c}")
    return ". ".join(told) + ".", ", ".join(account) + "."


def make_tokenizer(rng: random.Random) -> transformers.T5Tokenizer:
    """A T5 tokenizer to which each word and number of stories, questions and explanations is one
    token, and so is each other character."""
    texts = [WORDS, *map(str, range(data.LARGEST + 1))]
    for _ in range(1000):
        story = data.random_story(rng, STAGES[0].most_events)
        texts += [
            story.input(),
            *told_story(rng, STAGES[0].most_events),
            data.think(rng, story, 0.4),
        ]
    words = sorted(set(re.findall(r"\w+|[()+=-]", " ".join(texts))))
    signs = [sign for sign in string.printable if not sign.isspace()]
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in words), *signs]
    # T5Tokenizer looks for the split of the highest total score: with -1 a piece that is the one of
    # fewest pieces
    vocabulary = [(piece, -1.0) for piece in pieces]
    return transformers.T5Tokenizer(vocab=vocabulary, extra_ids=SENTINELS)


Ids = list[int]


def masked(rng: random.Random, story: Ids, account: Ids, sentinels: Ids) -> tuple[Ids, Ids]:
    """A text with masked spans as tiny reads it, and what it writes: the spans, as T5's
    pretraining has it (arXiv 1910.10683, 3.1.4).

    A quarter of the texts lose spans of three tokens on average, a third of all, where T5 masks
    15%: few words of stories so plain can be guessed. The others lose their end from somewhere in
    the account on, as in UL2 (arXiv 2205.05131): what is to be written there can be known.
    """
    ids, source, target, i, used = story + account, [], [], 0, 0
    end = len(story) + rng.randrange(len(account)) if rng.random() < 3 / 4 else 0
    while i < len(ids):
        if end:
            span = len(ids) - i if i == end else 0
        else:
            span = rng.randint(1, 5) if rng.random() < 1 / 7 and used < len(sentinels) else 0
        if span:
            source.append(sentinels[used])
            target += [sentinels[used], *ids[i : i + span]]
            used, i = used + 1, i + span
        else:
            source.append(ids[i])
            i += 1
    return source, target


def replaced(
    rng: random.Random, story: Ids, account: Ids, sentinels: Ids, numbers: set[int], signs: set[int]
) -> tuple[Ids, Ids]:
    """A text in whose account a word or two are others of their kind, as BERT's pretraining has
    them too (arXiv 1810.04805), and what tiny writes: the right words between their neighbours.

    So the encoder learns to compare, which a discriminator needs. In a quarter nothing is wrong.
    numbers are the ids of numbers, signs those of more and less.
    """
    ids, target = list(account), []
    places = [i for i, word in enumerate(ids) if word in numbers | signs]
    told = [word for word in story + account if word in numbers]
    for number, i in enumerate(sorted(rng.sample(places, rng.choice([1, 1, 2])))):
        if ids[i] in signs:
            (ids[i],) = signs - {ids[i]}
        else:
            ids[i] = rng.choice([word for word in told if word != ids[i]])
        target += [sentinels[number], *account[max(0, i - 1) : i + 2]]
    if rng.random() < 1 / 4:
        return story + account, sentinels[:1]
    return story + ids, target


def batches(
    rng: random.Random, tokenizer: transformers.T5Tokenizer, stage: Stage
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of texts of like length, so that little is padding."""
    token_ids: Any = tokenizer.convert_tokens_to_ids
    sentinels = token_ids([f"<extra_id_{i}>" for i in range(SENTINELS)])
    numbers = {*token_ids([f"▁{number}" for number in range(data.LARGEST + 1)])}
    signs = {*token_ids(["▁more", "▁less"])}
    while True:
        told = [told_story(rng, stage.most_events) for _ in range(32 * BATCH)]
        stories, accounts = zip(*told, strict=True)
        read = partial(tokenizer, add_special_tokens=False)
        ids = [read(list(of)).input_ids for of in (stories, accounts)]
        pairs = []
        for text in zip(*ids, strict=True):
            if stage.replaced and rng.random() < stage.replaced:
                source, target = replaced(rng, *text, sentinels, numbers, signs)
            else:
                source, target = masked(rng, *text, sentinels)
            pairs.append(([*source, 1], [*target, 1]))
        pairs.sort(key=lambda pair: (len(pair[0]) + len(pair[1])) // 8)
        for first in rng.sample(range(0, len(pairs), BATCH), 32):
            source, target = zip(*pairs[first : first + BATCH], strict=True)
            inputs = pad_sequence([torch.tensor(ids) for ids in source], True, 0)
            labels = pad_sequence([torch.tensor(ids) for ids in target], True, -100)
            yield {"input_ids": inputs, "attention_mask": (inputs != 0).long(), "labels": labels}


def pretrain(
    model: Any, tokenizer: transformers.T5Tokenizer, stage: Stage, rng: random.Random
) -> None:
    """AdamW, whose rate rises, and then falls linearly."""
    optimizer = torch.optim.AdamW(model.parameters(), stage.lr, weight_decay=0.0)
    numbered = zip(range(stage.steps), batches(rng, tokenizer, stage))
    bar = tqdm(numbered, total=stage.steps, mininterval=5)
    for step, batch in bar:
        rise, fall = min(1, (step + 1) / stage.warmup), 1 - step / stage.fall
        optimizer.param_groups[0]["lr"] = stage.lr * rise * fall
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 500 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("tiny")
    torch.set_num_threads(1)  # rounding, and so tiny, does not depend on the number of cores
    torch.manual_seed(0)
    began = time.monotonic()
    rngs = [random.Random(stage.seed) for stage in STAGES]
    tokenizer = make_tokenizer(rngs[0])
    config = transformers.T5Config(vocab_size=len(tokenizer), **SHAPE)
    config._attn_implementation = "eager"  # faster than others for matrices so small
    model = transformers.T5ForConditionalGeneration(config)
    for stage, rng in zip(STAGES, rngs, strict=True):
        pretrain(model, tokenizer, stage, rng)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{(time.monotonic() - began) / 60:.0f} minutes: {folder}")


if __name__ == "__main__":
    main()
