"""fairseq's "lstm" models: LSTMEncoder and LSTMDecoder."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..modules import Bridge, Decoder, Seq2Seq
from .assemble import assembled, need_layers, shared_map
from .weights import Options, Weights, read_stack

__all__ = ["from_fairseq"]

NAME = "fairseq"
UNSUPPORTED = {
    "decoder.adaptive_softmax": "adaptive softmax",
    "encoder.layers": "transformer or convolutional encoder",
    "encoder.convolutions": "convolutional encoder",
}


def from_fairseq(
    state_dict: Mapping[str, Tensor],
    *,
    opt: Any = None,
    bos_id: int = 2,
    eos_id: int = 2,
    pad_id: int = 1,
) -> Seq2Seq:
    """The Seq2Seq of a fairseq checkpoint of architecture "lstm" (also lstm_wiseman_iwslt_de_en and the like).

    state_dict: checkpoint["model"]. opt: checkpoint["args"], or ["cfg"]["model"], to refuse what keys do not show
    (residuals); None takes it that there are none, as `LSTMModel.build_model` does. Ids: those of a fairseq Dictionary,
    whose decoder begins with eos, so bos_id is eos_id.

    Sizes, layers, directions, the maps of an encoder of another size, attention (or none) and tied weights follow from
    the keys. additional_fc and the output layer, two linear maps one after the other, become one, W_out W_fc.
    The model is in eval mode, without dropout; its parameters are copies. fairseq's batches are padded on the left and
    its encoder turns them: `fastseq.interop.right_padded(src, pad_id)` gives (src, src_lengths), in any order of rows.
    Luong et al. 2015, eq. 5 to 8.

    Raises InputError naming key or option for missing, unknown and misshapen keys and for adaptive softmax, residuals
    and other encoders; TypeError for what is no state_dict.
    """
    weights = Weights(NAME, state_dict, "model")
    weights.refuse(UNSUPPORTED)
    Options(NAME, opt).refuse_others({"residuals": (False,)})
    source = weights.take("encoder.embed_tokens.weight", None, None)
    target = weights.take("decoder.embed_tokens.weight", None, None)
    encoder = read_stack(weights, "encoder.lstm.{kind}_l{layer}", source.shape[1], "layers.{layer}.{kind}_l0")
    decoder = read_stack(weights, "decoder.layers.{layer}.{kind}", target.shape[1], "{kind}_l{layer}", feed=True)
    need_layers(NAME, encoder, decoder)
    hidden, features = decoder.hidden_size, encoder.hidden_size * encoder.dirs
    found = decoder.tensors
    if features != hidden:
        for letter, name in (("h", "hidden"), ("c", "cell")):
            one = shared_map(weights, f"decoder.encoder_{name}_proj.{{}}", hidden, features)
            found |= {f"bridge.{letter}.0.{kind}": t for kind, t in one.items()}
    attends = "decoder.attention.input_proj.weight" in weights
    if attends:  # (W q) . m is q . (W^T m): the key is projected
        found["attention.weight_memory"] = weights.take("decoder.attention.input_proj.weight", features, hidden).T
        found["readout.weight"] = weights.take("decoder.attention.output_proj.weight", hidden, hidden + features)
    output = _output(weights, hidden, target)
    weights.finish()

    def make() -> Decoder:
        none: dict[str, Any] = {"attention": None, "readout": ("state",), "combine": None}
        return Decoder.fairseq(
            target.shape[1], hidden, decoder.num_layers, memory_size=features, **({} if attends else none),
            bridge=Bridge(map="copy" if features == hidden else "shared"),
        )  # fmt: skip

    ids = {"bos_id": bos_id, "eos_id": eos_id, "pad_id": pad_id}
    return assembled(encoder, make, found, source, target, output, ids)


def _output(weights: Weights, hidden: int, target: Tensor) -> tuple[Tensor, Tensor | None]:
    """The output layer, or the target's embedding in its place, behind additional_fc where there is one."""
    shares = "decoder.fc_out.weight" not in weights
    weight = target if shares else weights.take("decoder.fc_out.weight", None, None)
    bias = None if shares else weights.take("decoder.fc_out.bias", len(weight))
    if "decoder.additional_fc.weight" not in weights:
        if weight.shape[1] != hidden:
            name = "decoder.embed_tokens.weight" if shares else "decoder.fc_out.weight"
            raise InputError(f"{name!r} of {NAME} has shape {tuple(weight.shape)}; expected (any, {hidden}): it is fed"
                             " the decoder's state")  # fmt: skip
        return weight, bias
    extra = shared_map(weights, "decoder.additional_fc.{}", weight.shape[1], hidden)
    moved = weight @ extra["bias"]
    return weight @ extra["weight"], moved if bias is None else bias + moved
