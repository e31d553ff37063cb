"""Options and random-weight students for the tests."""

import functools
import random
from copy import deepcopy
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
from qcrd import Discriminator, Models, Options


def make_options(**changes: Any) -> Options:
    small = {
        "batch_size": 4,
        "lr": 1e-3,
        "judge_lr": 1e-3,
        "judge_every": 4,
        "rounds": 2,
        "round_steps": 2,
    }
    return qcrd.fill_in(Options(**(small | changes)))


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
    """A seq2seq model of one layer each and random weights: t5, flan (gated, untied head), mt5, bart or t5gemma."""
    torch.manual_seed(0)
    size = len(tokenizer())
    if kind == "bart":
        # generation settings as published BART models have them: none of them may reach the student's writing
        model = BartForConditionalGeneration(BartConfig(
            vocab_size=size, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, bos_token_id=1,
            **(IDS | {"decoder_start_token_id": 1})))  # fmt: skip
        how = {"num_beams": 4, "no_repeat_ngram_size": 3, "min_length": 20, "forced_bos_token_id": 5, "early_stopping": True}  # fmt: skip
        model.generation_config.update(**how)
        return model
    if kind == "t5gemma":
        half = {"vocab_size": size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "bos_token_id": 1}  # fmt: skip
        half |= {"eos_token_id": 1, "pad_token_id": 0}
        return T5GemmaForConditionalGeneration(
            T5GemmaConfig(encoder=half, decoder=half, vocab_size=size)
        )
    config: Any = {"vocab_size": size, "dropout_rate": 0.0} | SHAPE | IDS
    if kind == "mt5":
        return MT5ForConditionalGeneration(MT5Config(**config))
    if kind == "flan":
        config |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return T5ForConditionalGeneration(T5Config(**config))


def small_models(options: Options) -> Models:
    """A T5 of one layer each, random weights, no dropout, and a discriminator of its own encoder's shape."""
    student = a_student()
    encoder = student.get_encoder()
    judge = None
    if options.judge != "none":
        judge = Discriminator(
            encoder if options.judge == "shared" else deepcopy(encoder), SHAPE["d_model"]
        )
    return Models(student, tokenizer(), judge, options)
