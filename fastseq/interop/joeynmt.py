"""JoeyNMT's recurrent models: RecurrentEncoder and RecurrentDecoder."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..modules import Bridge, Decoder, Seq2Seq
from .assemble import assembled, shared_map
from .weights import Options, Stack, Weights, equal, read_stack

__all__ = ["from_joeynmt"]

NAME = "JoeyNMT"
UNSUPPORTED = {"encoder.layers.": "transformer encoder", "decoder.layers.": "transformer decoder"}
SUPPORTED = {
    "encoder.type": ("recurrent",),
    "decoder.type": ("recurrent",),
    "decoder.activation": ("tanh",),
    "decoder.init_hidden": ("bridge", "last", "zero", "zeros"),
}


def from_joeynmt(
    state_dict: Mapping[str, Tensor],
    *,
    opt: Any = None,
    bos_id: int = 2,
    eos_id: int = 3,
    pad_id: int = 1,
) -> Seq2Seq:
    """The Seq2Seq of a JoeyNMT checkpoint with recurrent encoder and decoder, LSTM or GRU.

    state_dict: checkpoint["model_state"], or `model.state_dict()`. opt: the section "model" of its configuration, or a
    mapping with "init_hidden", which keys do not show where it is "last" or "zero"; also "scale" of the embeddings,
    which is multiplied into them. Ids: JoeyNMT's own defaults, `special_symbols` in its configuration.

    Sizes, layers, directions, cell, input feeding, attention (luong, bahdanau), bridge and tied weights follow from the
    keys. The model is in eval mode, without dropout; its parameters are copies. Sources are padded on the right and
    come with src_lengths, in any order. JoeyNMT's beam search ranks by ((5 + L) / 6)^alpha: length_norm="wu",
    length_penalty=alpha; and it never gives bos, pad, or eos first. Luong et al. 2015; Bahdanau et al. 2014, A.1.2.

    Raises InputError naming key or option for missing, unknown and misshapen keys and for transformers; TypeError for
    what is no state_dict.
    """
    weights, options = Weights(NAME, state_dict, "model_state"), Options(NAME, opt)
    weights.refuse(UNSUPPORTED)
    options.refuse_others(SUPPORTED)
    source = weights.take("src_embed.lut.weight", None, None)
    target = weights.take("trg_embed.lut.weight", None, None)
    encoder = read_stack(weights, "encoder.rnn.{kind}_l{layer}", source.shape[1], "layers.{layer}.{kind}_l0")
    readout = weights.take("decoder.att_vector_layer.bias", None)
    feed = _is_fed(weights, len(readout), target.shape[1])
    decoder = read_stack(weights, "decoder.rnn.{kind}_l{layer}", target.shape[1], "{kind}_l{layer}", feed)
    hidden, features = decoder.hidden_size, encoder.hidden_size * encoder.dirs
    found = decoder.tensors | {
        "readout.bias": readout,
        "readout.weight": weights.take("decoder.att_vector_layer.weight", hidden, hidden + features),
        "attention.weight_memory": weights.take("decoder.attention.key_layer.weight", hidden, features),
    }
    score = _score(weights, hidden, found)
    bridge = _bridge(weights, options, encoder, hidden, found)
    output = weights.take("decoder.output_layer.weight", None, hidden)
    weights.finish()
    source, target = _scaled(options, source, target, output)

    def make() -> Decoder:
        return Decoder.joeynmt(
            target.shape[1], hidden, decoder.num_layers, cell=decoder.cell, memory_size=features, bridge=bridge,
            attention=score, feed="output" if feed else None,
        )  # fmt: skip

    ids = {"bos_id": bos_id, "eos_id": eos_id, "pad_id": pad_id}
    return assembled(encoder, make, found, source, target, (output, None), ids)


def _score(weights: Weights, hidden: int, found: dict[str, Tensor]) -> str:
    """bahdanau is additive, luong general; the query's side of the former goes to `found`."""
    if "decoder.attention.query_layer.weight" not in weights:
        return "general"
    found["attention.weight_query"] = weights.take("decoder.attention.query_layer.weight", hidden, hidden)
    found["attention.v"] = weights.take("decoder.attention.energy_layer.weight", 1, hidden)[0]
    return "additive"


def _is_fed(weights: Weights, hidden: int, embedded: int) -> bool:
    """Input feeding, by the features that the decoder's first layer reads."""
    name = "decoder.rnn.weight_ih_l0"
    reads = weights.peek(name).shape[-1]
    if reads not in (embedded, embedded + hidden):
        raise InputError(
            f"{name!r} of {NAME} reads {reads} features; expected {embedded}, or {embedded + hidden} with input feeding"
        )
    return reads != embedded


def _bridge(weights: Weights, options: Options, encoder: Stack, hidden: int, found: dict[str, Tensor]) -> Bridge:
    """What all layers start from; the parameters of "bridge" go to `found`."""
    init, features = options.get("decoder.init_hidden"), encoder.hidden_size * encoder.dirs
    mapped = "decoder.bridge_layer.weight" in weights
    if mapped != (init == "bridge") and (mapped or init == "bridge") and init is not None:
        has = "has" if mapped else "has no"
        raise InputError(f"init_hidden={init!r}, but {NAME}'s state_dict {has} 'decoder.bridge_layer.weight'")
    if mapped:
        one = shared_map(weights, "decoder.bridge_layer.{}", hidden, features)
        found |= {f"bridge.h.0.{kind}": t for kind, t in one.items()}
        return Bridge("top", map="shared", act="tanh", cell="same")
    fits = hidden in (features, features / encoder.dirs)
    if init is None and fits:
        raise InputError(
            "init_hidden is 'last' or 'zero', and no key shows which; pass opt={'init_hidden': ...}, as the model's"
            " configuration has it under decoder"
        )
    if init == "last" and not fits:
        raise InputError(f"init_hidden='last' of an encoder with {features} features; the decoder has {hidden}")
    return Bridge("top_forward", cell="same") if init == "last" else Bridge("zero")


def _scaled(options: Options, source: Tensor, target: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """The embeddings times the root of their size, where the configuration scales them."""
    scales = [bool(options.get(f"{side}.embeddings.scale", False)) for side in ("encoder", "decoder")]
    if equal(source, target):  # tied_embeddings: the source's module serves both
        scales[1] = scales[0]
    if scales[1] and equal(target, output):
        raise InputError("scale=True of embeddings that are the output's weight (tied_softmax) is not supported")
    return tuple(t * t.shape[1] ** 0.5 if scale else t for t, scale in zip((source, target), scales, strict=True))  # type: ignore[return-value]
