"""OpenNMT-py's recurrent models, of versions 1 to 3: RNNEncoder, InputFeedRNNDecoder or StdRNNDecoder."""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..modules import Bridge, Decoder, Seq2Seq
from .assemble import assembled, need_layers, shared_map
from .weights import Options, Stack, Weights, read_stack

__all__ = ["from_opennmt"]

NAME = "OpenNMT-py"
EMBEDDING = "embeddings.make_embedding.emb_luts.0.weight"
UNSUPPORTED = {
    "decoder.copy_attn": "copy_attn",
    "generator.linear_copy": "copy_attn",
    "decoder.attn.linear_cover": "coverage_attn",
    "decoder.context_gate": "context_gate",
    "encoder.rnn.rnn_lst": "rnn_type SRU",
    "decoder.rnn.rnn_lst": "rnn_type SRU",
    "encoder.transformer": "encoder_type transformer",
    "decoder.transformer_layers": "decoder_type transformer",
    "encoder.embeddings.make_embedding.emb_luts.1": "source features",
    "encoder.embeddings.make_embedding.pe": "position_encoding",
    "decoder.embeddings.make_embedding.pe": "position_encoding",
}
SUPPORTED = {  # of what keys do not show
    "global_attention_function": ("softmax",),
    "generator_function": ("softmax",),
    "copy_attn": (False,),
    "coverage_attn": (False,),
    "context_gate": (None,),
    "rnn_type": ("LSTM", "GRU"),
    "encoder_type": ("rnn", "brnn"),
    "decoder_type": ("rnn",),
}


def from_opennmt(
    state_dict: Mapping[str, Tensor],
    *,
    generator: Mapping[str, Tensor] | None = None,
    opt: Any = None,
    bos_id: int = 2,
    eos_id: int = 3,
    pad_id: int = 1,
) -> Seq2Seq:
    """The Seq2Seq of an OpenNMT-py checkpoint with recurrent encoder ("rnn", "brnn") and decoder, LSTM or GRU.

    state_dict: checkpoint["model"]. generator: checkpoint["generator"], which versions store apart; None where
    state_dict has its keys, as `model.state_dict()` has. opt: checkpoint["opt"], to refuse what keys do not show (other
    functions than softmax); None takes softmax for granted. Ids: OpenNMT-py's own defaults.

    Sizes, layers, directions, cell, input feeding, score (dot, general, mlp, or none), bridge and tied weights follow
    from the keys. The model is in eval mode, without dropout, its parameters are copies. Sources are padded on the
    right and come with src_lengths, in any order. A bridge of two directions is one matrix with OpenNMT-py's twice on
    its diagonal; training on, the rest of it learns too. Versions 1 and 2 cut the bridge's input across the batch where
    there are several layers, so that a row's result depends on its neighbours; ours is what they give for one row
    alone, as version 3 does for all, and a warning says so. Luong et al. 2015, eq. 5 to 8; Bahdanau et al. 2014, A.1.2.

    Raises InputError naming key or option for missing, unknown and misshapen keys and for coverage, copy attention,
    context gates, sparsemax, SRU, features and transformers; TypeError for what is no state_dict.
    """
    weights = Weights(NAME, state_dict, "model")
    weights.refuse(UNSUPPORTED)
    told = Options(NAME, opt)
    told.refuse_others(SUPPORTED)
    source = weights.take(f"encoder.{EMBEDDING}", None, None)
    target = weights.take(f"decoder.{EMBEDDING}", None, None)
    feed = "decoder.rnn.layers.0.weight_hh" in weights
    encoder, decoder = _stacks(weights, source.shape[1], target.shape[1], feed)
    score, attention = _attention(weights, decoder.hidden_size)
    told.agree({"rnn_type": encoder.cell.upper(), "global_attention": score or "none", "input_feed": int(feed)})
    bridge = _bridge(weights, encoder, decoder)
    output, old = _generator(weights, generator, decoder.hidden_size)
    weights.finish()
    if old and bridge and decoder.num_layers > 1:
        warnings.warn(
            f"versions 1 and 2 of {NAME} mix the rows of a batch in the bridge of several layers; this model computes"
            " what they do for a batch of one row",
            stacklevel=2,
        )
    options: dict[str, Any] = {"attention": score, "feed": "output" if feed else None}
    if bridge:
        options["bridge"] = Bridge(map="joint", act="relu")
    ids = {"bos_id": bos_id, "eos_id": eos_id, "pad_id": pad_id}
    make = partial(_decoder, target.shape[1], decoder, options)
    return assembled(encoder, make, decoder.tensors | attention | bridge, source, target, output, ids)


def _stacks(weights: Weights, source: int, target: int, feed: bool) -> tuple[Stack, Stack]:
    """The layers of encoder and decoder, whose embeddings have so many features; with feeding, cells."""
    form = "decoder.rnn.layers.{layer}.{kind}" if feed else "decoder.rnn.{kind}_l{layer}"
    encoder = read_stack(weights, "encoder.rnn.{kind}_l{layer}", source, "layers.{layer}.{kind}_l0")
    decoder = read_stack(weights, form, target, "{kind}_l{layer}", feed)
    need_layers(NAME, encoder, decoder)
    hidden, features = decoder.hidden_size, encoder.hidden_size * encoder.dirs
    if features != hidden:
        raise InputError(f"{NAME}'s encoder has {features} features, its decoder {hidden}; they are one size there")
    return encoder, decoder


def _decoder(input_size: int, stack: Stack, options: dict[str, Any]) -> Decoder:
    sizes = {"cell": stack.cell, "memory_size": stack.hidden_size}
    if options["attention"] is None:
        nothing: dict[str, Any] = {"readout": ("state",), "combine": None}
        return Decoder(input_size, stack.hidden_size, stack.num_layers, **sizes, **nothing, **options)  # type: ignore
    return Decoder.opennmt(input_size, stack.hidden_size, stack.num_layers, **sizes, **options)


def _attention(weights: Weights, hidden: int) -> tuple[str | None, dict[str, Tensor]]:
    """(score, its parameters and the readout's) of GlobalAttention; the mlp's readout has a bias and no tanh.

    general: s . W_in^T . m is a product with W_in^T m, so the key is projected.
    """
    form = "decoder.attn.{}"
    if form.format("linear_out.weight") not in weights:
        return None, {}
    found = {"readout.weight": weights.take(form.format("linear_out.weight"), hidden, 2 * hidden)}
    if form.format("v.weight") in weights:
        query = shared_map(weights, "decoder.attn.linear_query.{}", hidden, hidden)
        found["readout.bias"] = weights.take(form.format("linear_out.bias"), hidden)
        found["attention.v"] = weights.take(form.format("v.weight"), 1, hidden)[0]
        found["attention.weight_memory"] = weights.take(form.format("linear_context.weight"), hidden, hidden)
        found |= {"attention.weight_query": query["weight"], "attention.bias": query["bias"]}
        return "additive", found
    if form.format("linear_in.weight") in weights:
        found["attention.weight_memory"] = weights.take(form.format("linear_in.weight"), hidden, hidden).T
        return "general", found
    return "dot", found


def _bridge(weights: Weights, encoder: Stack, decoder: Stack) -> dict[str, Tensor]:
    """The encoder's bridge as a map over all layers' features; none, where there is none.

    It maps so many features as all layers have in one direction; of two directions, each half of all by itself.
    """
    if "encoder.bridge.0.weight" not in weights:
        return {}
    found, size = {}, encoder.num_layers * encoder.hidden_size
    for index, letter in enumerate("hc" if decoder.cell == "lstm" else "h"):
        one = shared_map(weights, f"encoder.bridge.{index}.{{}}", size, size)
        found[f"bridge.{letter}.0.weight"] = torch.block_diag(*[one["weight"]] * encoder.dirs)
        found[f"bridge.{letter}.0.bias"] = one["bias"].repeat(encoder.dirs)
    return found


def _generator(
    weights: Weights, generator: Mapping[str, Tensor] | None, hidden: int
) -> tuple[tuple[Tensor, Tensor], bool]:
    """The output layer, and whether an old version's: keys "0.weight" of versions 1 and 2, "weight" of version 3."""
    own = Weights(f"{NAME}'s generator", {} if generator is None else generator, "generator")
    own.refuse({"linear_copy": "copy_attn"})
    places = [(own, ""), (own, "0."), (weights, "generator."), (weights, "generator.0.")]
    for where, prefix in places:
        if f"{prefix}weight" in where:
            weight = where.take(f"{prefix}weight", None, hidden)
            bias = where.take(f"{prefix}bias", len(weight))
            own.finish()
            return (weight, bias), prefix.endswith("0.")
    given = "None" if generator is None else "a mapping without 'weight' or '0.weight'"
    raise InputError(f"generator is {given}, but {NAME} stores the output layer apart; pass checkpoint['generator']")
