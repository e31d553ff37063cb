"""Options and random-weight students for the tests."""

import functools
import random
from copy import deepcopy
from typing import Any

import torch
from transformers import T5Config, T5ForConditionalGeneration

import data
from qcrd import Discriminator, Models, Options


def make_options(**changes: Any) -> Options:
    return Options(
        **({"batch_size": 4, "lr": 1e-3, "judge_lr": 1e-3, "judge_every": 4, "rounds": 2, "round_steps": 2} | changes)
    )


@functools.cache
def tokenizer() -> Any:
    return data.tiny_tokenizer(random.Random(0))


def small_models(options: Options) -> Models:
    """A T5 of one layer each, random weights, no dropout, and a discriminator of its own encoder's shape."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer()), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)  # fmt: skip
    student = T5ForConditionalGeneration(config)
    encoder = student.get_encoder()
    judge = None
    if options.judge != "none":
        judge = Discriminator(encoder if options.judge == "shared" else deepcopy(encoder), config.d_model)
        judge.encoder.requires_grad_(options.judge != "frozen")
    return Models(student, tokenizer(), judge, options)
