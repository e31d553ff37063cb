"""Options and random-weight students for the tests."""

import functools
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)

import data
import qcrd
from qcrd import Discriminator, Options, Student


def make_options(**changes: Any) -> Options:
    """The options of a method, by default qcrd, for a small student and short rounds."""
    small = {
        "batch_size": 4,
        "lr": 1e-3,
        "disc_lr": 1e-3,
        "disc_every": 4,
        "rounds": 2,
        "round_steps": 2,
        "precision": "fp32",  # on a GPU too
    }
    method = changes.get("method", "qcrd")
    return Options(**(qcrd.presets(method, "t5") | small | changes))


class Full:
    """In place of a function: memory runs out in one of its calls, or in all of them."""

    def __init__(self, function: Any, call: int | None, error: Exception | None = None) -> None:
        self.function, self.call, self.calls = function, call, 0
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.call is None or self.calls == self.call:
            raise self.error
        return self.function(*args, **kwargs)


@functools.cache
def tokenizer() -> Any:
    return data.tiny_tokenizer(random.Random(0))


SHAPE = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
}
IDS = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}


def a_student(kind: str = "t5") -> Any:
    """A seq2seq model of one layer each and random weights: t5, flan (gated, untied head), mt5,
    bart or t5gemma."""
    torch.manual_seed(0)
    size = len(tokenizer())
    config: dict[str, Any]
    if kind == "bart":
        shape: dict[str, Any] = {"d_model": 32, "bos_token_id": 1}
        for half in ("encoder", "decoder"):
            shape |= {f"{half}_layers": 1, f"{half}_attention_heads": 2, f"{half}_ffn_dim": 64}
        config = IDS | {"decoder_start_token_id": 1}
        model = BartForConditionalGeneration(BartConfig(vocab_size=size, **shape, **config))
        # generation settings as published BART models have them: none may reach the writing
        how = {"num_beams": 4, "no_repeat_ngram_size": 3, "min_length": 20}
        how |= {"forced_bos_token_id": 5, "early_stopping": True}
        model.generation_config.update(**how)
        return model
    if kind == "t5gemma":
        coder: dict[str, Any] = {
            "vocab_size": size,
            "hidden_size": 32,
            "intermediate_size": 64,
            "head_dim": 16,
        }
        coder |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        coder |= {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
        both = T5GemmaConfig(encoder=coder, decoder=coder, vocab_size=size)
        return T5GemmaForConditionalGeneration(both)
    config = {"vocab_size": size, "dropout_rate": 0.0} | SHAPE | IDS
    if kind == "mt5":
        return MT5ForConditionalGeneration(MT5Config(**config))
    if kind == "flan":
        config |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return T5ForConditionalGeneration(T5Config(**config))


def small_student(options: Options, kind: str = "t5") -> Student:
    """A student of one layer each, random weights, no dropout, as ready as a loaded one."""
    device = "cpu" if options.device == "auto" else options.device  # where sums are exact
    student = Student(a_student(kind).to(device).train(), tokenizer(), options)
    qcrd.try_student(student)
    return student


def small_models(options: Options) -> tuple[Student, Discriminator | None]:
    """A small T5 student, and a discriminator where the options ask for one."""
    student = small_student(options)
    return student, qcrd.make_discriminator(student, options)


def save_student(folder: str | Path, kind: str = "t5", **config: Any) -> str:
    """A folder that --student can name; `config` overwrites what its config.json says."""
    a_student(kind).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if config:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(folder)
