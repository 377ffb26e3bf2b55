"""fastseq.Seq2Seq: an encoder, a decoder and a vocabulary: its loss, its searches, its file."""

import inspect
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..backends.decoder_call import DecoderCall
from ..checks import checked_lengths
from ..config import described, part
from ..errors import InputError, with_article
from ..functional import Lengths
from ..generation import GenerateOutput, LogitsProcessor
from ..generation.native import refuses, refuses_native, run_native
from ..generation.request import Request
from ..generation.search import repeated, run_search
from ..losses import cross_entropy, linear_cross_entropy, need_smoothing
from ..ops.decoder_search import Vocabulary
from ..ops.linear import linear
from ..saving import load, save
from ..seq2seq_checks import check_ids, check_kind, check_range, check_source, rows_of
from ..spec import DecoderState, Keys, Memory, one_of
from .decoder import Decoder
from .encoder import Encoder
from .modes import not_scriptable

__all__ = ["Seq2Seq", "Seq2SeqOutput"]


class Seq2SeqOutput(NamedTuple):
    """What a teacher-forced pass gives: logits [B, T, V]; the attention's weights [B, T, S], or None."""

    logits: Tensor  # [B, T, V]
    weights: Tensor | None  # [B, T, S]


@part
class Seq2Seq(nn.Module):
    """A sequence-to-sequence model over tokens: forward, loss and generate.

    encoder: an `Encoder` with an `embedding`, or any module (src, src_lengths) -> Memory, whatever src is; batch first.
    Padded sources need src_lengths: an encoder knows no padding by its id.
    decoder: a `Decoder`. vocab_size: V target tokens, of which bos_id begins, eos_id ends and pad_id fills up; bos_id
    may be eos_id, as in fairseq's models.
    embedding: of the target, a module from ids [...] to [..., decoder.input_size]; None: nn.Embedding, whose row of the
    padding is 0 and, unless tied, stays so.
    output: a module from [..., decoder.output_size] to logits [..., V]; None: nn.Linear, with a bias if output_bias.
    tie: "target": the output's weight is the embedding's (Press and Wolf 2017); "all": that of the source as well, so
    that embedding is `encoder.embedding` and both sides have one vocabulary. The decoder's output_size is its
    input_size then.
    An encoder and a decoder of fastseq that cannot go together, by their sizes or the bridge, are refused here; what an
    encoder of your own gives is seen in the first call.

    The encoder is called as encoder(src, src_lengths). Searches and scheduled sampling call decoder.step, which runs no
    hooks of the decoder.

    Parameters: encoder.*, decoder.*, embedding.*, output.*; a tied one has both names. `extra`: plain data of yours
    (a vocabulary, say) that `save` stores with it.
    """

    __prepare_scriptable__ = not_scriptable
    encoder: nn.Module
    decoder: Decoder
    embedding: nn.Module
    output: nn.Module

    def __init__(
        self,
        encoder: nn.Module,
        decoder: Decoder,
        vocab_size: int,
        *,
        bos_id: int,
        eos_id: int,
        pad_id: int,
        embedding: nn.Module | None = None,
        output: nn.Module | None = None,
        output_bias: bool = True,
        tie: str | None = None,
    ) -> None:
        super().__init__()
        one_of("tie", tie, (None, "target", "all"))
        for name, module in (("encoder", encoder), ("embedding", embedding), ("output", output)):
            if not isinstance(module, nn.Module) and not (module is None and name != "encoder"):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
        if not isinstance(decoder, Decoder):
            raise TypeError(
                f"decoder must be a fastseq.Decoder, got {type(decoder).__name__}; for others, fastseq.generate takes"
                " any step"
            )
        self.vocab_size, self.bos_id, self.eos_id, self.pad_id = vocab_size, bos_id, eos_id, pad_id
        self.tie = tie
        self.extra: dict[str, Any] = {}
        self._check_ids()
        self._check_memory(encoder, decoder)
        if tie == "all":
            embedding = _source_embedding(encoder, embedding, vocab_size)
        like = next(iter(decoder.parameters()))
        factory: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        if embedding is None:
            idle = None if pad_id in (bos_id, eos_id) else pad_id  # its row is never learned
            embedding = nn.Embedding(vocab_size, decoder.input_size, padding_idx=idle, **factory)
        if output is None:
            output = nn.Linear(decoder.output_size, vocab_size, output_bias, **factory)
        self.encoder, self.decoder, self.embedding, self.output = encoder, decoder, embedding, output
        self._check_sizes()
        if tie is not None:
            self._tie()
        self._check_first()

    def _check_ids(self) -> None:
        for name in ("vocab_size", "bos_id", "eos_id", "pad_id"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if name == "vocab_size" and value < 1:
                raise InputError(f"vocab_size={value}; it is at least 1")
            if name != "vocab_size" and not 0 <= value < self.vocab_size:
                raise InputError(f"{name}={value}; ids are 0 to {self.vocab_size - 1}, vocab_size - 1")

    def _check_memory(self, encoder: nn.Module, decoder: Decoder) -> None:
        if isinstance(encoder, Encoder) and decoder.memory_size not in (None, encoder.output_size):
            raise InputError(
                f"the decoder reads a memory of {decoder.memory_size} features, the encoder's has"
                f" {encoder.output_size}; pass memory_size=encoder.output_size"
            )

    def _check_first(self) -> None:
        """Whether our decoder can begin with what our encoder leaves; of others it is seen when they run."""
        encoder = self.encoder
        if isinstance(encoder, Encoder) and _is_plain(encoder, Encoder) and _is_plain(self.decoder, Decoder):
            memory = encoder.outline()
            if memory is not None:
                self.decoder.check_first(memory)

    def _check_sizes(self) -> None:
        """Those of torch's own modules; what others give is seen when they run."""
        embedding, output, decoder = self.embedding, self.output, self.decoder
        if isinstance(embedding, nn.Embedding):
            sizes = (embedding.num_embeddings, embedding.embedding_dim)
            if sizes[1] != decoder.input_size or sizes[0] < self.vocab_size:
                raise InputError(
                    f"embedding has {sizes[0]} rows of {sizes[1]}; expected at least V={self.vocab_size} of"
                    f" {decoder.input_size}, the decoder's input_size"
                )
        if isinstance(output, nn.Linear):
            sizes = (output.in_features, output.out_features)
            if sizes != (decoder.output_size, self.vocab_size):
                raise InputError(
                    f"output maps {sizes[0]} features to {sizes[1]}; expected {decoder.output_size}, the decoder's"
                    f" output_size, to V={self.vocab_size}"
                )

    def _tie(self) -> None:
        embedding, output = self.embedding, self.output
        if not isinstance(embedding, nn.Embedding) or not isinstance(output, nn.Linear):
            raise TypeError(f"tie={self.tie!r} needs nn.Embedding and nn.Linear, got {_kinds(embedding, output)}")
        if embedding.weight.shape != output.weight.shape:
            raise InputError(
                f"tie={self.tie!r} of an embedding {tuple(embedding.weight.shape)} and an output"
                f" {tuple(output.weight.shape)}; make the decoder's output_size its input_size, by combine_size or"
                " hidden_size, and the vocabularies one"
            )
        output.weight = embedding.weight

    def forward(
        self,
        src: Any,  # [B, S] ids, or what the encoder takes
        tgt_in: Tensor,  # [B, T] ids: bos, then the target
        src_lengths: Lengths = None,  # [B], any order; None: all S
        *,
        teacher_forcing: float = 1.0,
        need_weights: bool = False,
    ) -> Seq2SeqOutput:
        """Logits [B, T, V], where logits[:, t] follow tgt_in[:, t], and the attention's weights [B, T, S].

        teacher_forcing: with this probability, drawn for each token, a step reads tgt_in, otherwise the likeliest token
        of the step before (scheduled sampling, Bengio et al. 2015, 2.4). The first reads tgt_in. With 1, the
        default, all steps are one operator.

        Raises InputError or TypeError, naming the argument.
        """
        tgt_in = self._within("tgt_in", tgt_in, None)
        self._need_rows("tgt_in", tgt_in, src)
        features, weights = self._features(src, tgt_in, src_lengths, teacher_forcing, need_weights)
        return Seq2SeqOutput(self._logits(features), weights)

    def loss(
        self,
        src: Any,  # [B, S] ids, or what the encoder takes
        tgt: Tensor,  # [B, T + 1] ids: bos ... eos, then pad_id
        src_lengths: Lengths = None,
        tgt_lengths: Lengths = None,  # [B], of tgt with bos and eos; None: up to the padding
        *,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        teacher_forcing: float = 1.0,
    ) -> Tensor:
        """Cross-entropy of tgt[:, 1:] given tgt[:, :-1] and the source: no shift is left to the caller.

        Padding is left out; "mean" is over real tokens, "none" gives [B, T], 0 at padding. label_smoothing and the
        memory of large vocabularies as in `functional.linear_cross_entropy`: logits of all tokens never exist at once.
        End each row with eos, or the model never learns to stop; this is not checked.
        In fp32 (fp64 of a model in fp64).

        Raises InputError or TypeError, naming the argument.
        """
        one_of("reduction", reduction, ("mean", "sum", "none"))
        need_smoothing(label_smoothing)
        tgt = self._within("tgt", tgt, tgt_lengths)
        self._need_rows("tgt", tgt, src)
        targets = self._targets(tgt, tgt_lengths)
        features, _ = self._features(src, tgt[:, :-1], src_lengths, teacher_forcing, False)
        output, options = self.output, {"label_smoothing": label_smoothing, "reduction": reduction}
        if _is_plain(output, nn.Linear):
            return linear_cross_entropy(features, output.weight, output.bias, targets, **options)  # type: ignore[arg-type]
        return cross_entropy(self._logits(features), targets, **options)  # type: ignore[arg-type]

    def _within(self, name: str, ids: Any, lengths: Lengths) -> Tensor:
        """Checked ids [B, T]; behind their lengths, which nobody looks at, pad_id."""
        check_kind(name, ids)
        if lengths is not None:
            ends = checked_lengths(lengths, ids, ids.shape[0], ids.shape[1], f"{name}_lengths").to(ids.device)
            ids = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) >= ends[:, None], self.pad_id)
        check_range(name, ids, self.vocab_size, "vocab_size - 1")
        return ids

    def _need_rows(self, name: str, ids: Tensor, src: Any) -> None:
        """InputError unless there is a target for each source."""
        check_ids(src, self.encoder)
        if isinstance(src, Tensor) and src.shape[0] != ids.shape[0]:
            raise InputError(f"{name} has B={ids.shape[0]} rows, src {src.shape[0]}; pass a target for each source")

    def _targets(self, tgt: Tensor, lengths: Lengths) -> Tensor:
        """[B, T] int64: tgt[:, 1:], and -100 for padding."""
        if tgt.shape[1] < 2:
            raise InputError(f"tgt has shape {tuple(tgt.shape)}; expected [B, T + 1], bos and at least one more token")
        checks = tgt.device.type == "cpu" and not torch.compiler.is_compiling()
        if checks and bool((wrong := tgt[:, 0] != self.bos_id).any()):
            row = int(wrong.nonzero()[0])
            raise InputError(
                f"tgt[{row}] begins with {int(tgt[row, 0])}; expected bos_id={self.bos_id}: the loss itself shifts tgt"
            )
        if lengths is not None:
            ends = checked_lengths(lengths, tgt, tgt.shape[0], tgt.shape[1], "tgt_lengths").to(tgt.device)
            padding = torch.arange(1, tgt.shape[1], device=tgt.device) >= ends[:, None]
        elif self.pad_id in (self.eos_id, self.bos_id):
            raise InputError(f"pad_id={self.pad_id} is also bos or eos, so padding cannot be told; pass tgt_lengths")
        else:
            padding = tgt[:, 1:] == self.pad_id
        return tgt[:, 1:].long().masked_fill(padding, -100)

    def _features(
        self, src: Any, tgt_in: Tensor, src_lengths: Lengths, teacher_forcing: float, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The decoder's outputs [B, T, R] and weights, of checked tgt_in."""
        if isinstance(teacher_forcing, bool) or not isinstance(teacher_forcing, (int, float)):
            raise TypeError(f"teacher_forcing must be a number, got {type(teacher_forcing).__name__}")
        if not 0 <= teacher_forcing <= 1:
            raise InputError(f"teacher_forcing={teacher_forcing}; it is a probability, 0 to 1")
        memory = self._encode(src, src_lengths)
        if teacher_forcing == 1:
            output, _, weights = self.decoder(self.embedding(tgt_in), memory, need_weights=need_weights)
            return output, weights
        return self._sampled(memory, tgt_in, teacher_forcing, need_weights)

    def _sampled(
        self, memory: Memory, tgt_in: Tensor, ratio: float, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`_features` step by step, each fed the token before it or what the model took for likeliest."""
        keys, state = self.decoder.prepare(memory), self.decoder.init_state(memory)
        given = torch.rand(tgt_in.shape, device=tgt_in.device) < ratio
        outputs: list[Tensor] = []
        weights: list[Any] = []
        token = tgt_in[:, 0]
        for t in range(tgt_in.shape[1]):
            if t:
                with torch.no_grad():
                    likeliest = self._logits(outputs[-1]).argmax(-1).to(tgt_in.dtype)
                token = torch.where(given[:, t], tgt_in[:, t], likeliest)
            output, state, w = self.decoder.step(self.embedding(token), keys, state, need_weights=need_weights)
            outputs.append(output)
            weights.append(w)
        return torch.stack(outputs, 1), None if weights[0] is None else torch.stack(weights, 1)

    def _encode(self, src: Any, src_lengths: Lengths) -> Memory:
        check_source(src, src_lengths, self.encoder)
        memory = self.encoder(src, src_lengths)
        if not isinstance(memory, Memory):
            raise TypeError(
                f"the encoder gave {with_article(type(memory).__name__)}; expected a fastseq.Memory,"
                " see Memory.from_rnn"
            )
        if isinstance(src, Tensor) and rows_of(memory) != src.shape[0]:
            raise InputError(
                f"the encoder gave a memory of B={rows_of(memory)} rows for src {tuple(src.shape)}; it is batch first"
            )
        return memory

    def _logits(self, features: Tensor) -> Tensor:
        output = self.output
        if _is_plain(output, nn.Linear):
            return linear(features, output.weight, output.bias)  # type: ignore[arg-type]
        logits: Tensor = output(features)
        if logits.shape != (*features.shape[:-1], self.vocab_size):
            raise InputError(
                f"output gave {tuple(logits.shape)}; expected {(*features.shape[:-1], self.vocab_size)}, V last"
            )
        return logits

    @torch.no_grad()
    def generate(
        self,
        src: Any,  # [B, S] ids, or what the encoder takes
        src_lengths: Lengths = None,
        *,
        num_beams: int = 1,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        length_penalty: float = 1.0,
        length_norm: str = "len",
        coverage_penalty: float = 0.0,
        early_stopping: bool | str = False,
        no_repeat_ngram_size: int = 0,
        num_return_sequences: int = 1,
        decoder_input_ids: Tensor | Sequence[Sequence[int]] | None = None,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
        streamer: Any = None,
        generator: torch.Generator | None = None,
        return_weights: bool = False,
    ) -> GenerateOutput:
        """Target sequences: greedy, by beams (num_beams), or drawn (do_sample); options as in `fastseq.generate`.

        As everywhere in PyTorch, a model in training mode drops out: call eval() first.
        """
        memory, request = self._asked(
            src, src_lengths, num_beams=num_beams, do_sample=do_sample, temperature=temperature, top_k=top_k,
            top_p=top_p, max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, length_penalty=length_penalty,
            length_norm=length_norm, coverage_penalty=coverage_penalty, early_stopping=early_stopping,
            no_repeat_ngram_size=no_repeat_ngram_size, num_return_sequences=num_return_sequences,
            decoder_input_ids=decoder_input_ids, logits_processor=logits_processor, streamer=streamer,
            generator=generator, return_weights=return_weights,
        )  # fmt: skip
        keys, state = self.decoder.prepare(memory), self.decoder.init_state(memory)
        need_weights = request.options.needs_weights
        if self._stepwise_for(request) is None:
            found = run_native(*self._native(keys, state, request), request, self.decoder.backend)
            if found is not None:
                return found

        def step(tokens: Tensor, state: DecoderState) -> Any:
            output, state, weights = self.decoder.step(self.embedding(tokens), keys, state, need_weights=need_weights)
            logits = self._logits(output)
            return (logits, state, weights) if need_weights else (logits, state)

        return run_search(step, state, request)

    @torch.no_grad()
    def why_stepwise(
        self, src: Any, src_lengths: Lengths = None, *, max_new_tokens: int = 1, **options: Any
    ) -> str | None:
        """Why `generate(src, src_lengths, **options)` would step from Python; None: it runs in the kernels' loop."""
        for name in options.keys() - inspect.signature(Seq2Seq.generate).parameters.keys():
            raise TypeError(f"generate has no option {name!r}; its options: {inspect.signature(Seq2Seq.generate)}")
        memory, request = self._asked(src, src_lengths, max_new_tokens=max_new_tokens, **options)
        keys, state = self.decoder.prepare(memory), self.decoder.init_state(memory)
        return self._stepwise_for(request) or refuses_native(*self._native(keys, state, request), self.decoder.backend)

    def _asked(self, src: Any, src_lengths: Lengths, **options: Any) -> tuple[Memory, Request]:
        """The memory, and what is asked for; that is checked first where the source tells how many rows there are."""
        check_ids(src, self.encoder)
        memory = None if isinstance(src, Tensor) else self._encode(src, src_lengths)
        request = Request.of(
            batch_size=rows_of(src if memory is None else memory), bos_id=self.bos_id, eos_id=self.eos_id,
            pad_id=self.pad_id, device=next(self.decoder.parameters()).device, **options,
        )  # fmt: skip
        request.check_vocabulary(self.vocab_size)
        if request.options.needs_weights and self.decoder.attention is None:
            raise InputError("return_weights and coverage_penalty need a decoder with attention; this one has none")
        return self._encode(src, src_lengths) if memory is None else memory, request

    def _stepwise_for(self, request: Request) -> str | None:
        """What of the request, or of this model's own parts, the kernels' loop knows nothing of."""
        return refuses(request) or self.stepwise_part

    @property
    def stepwise_part(self) -> str | None:
        """Why all searches step from Python: a part of this model, of the user's own; None: no part needs it."""
        decoder, embedding, output = self.decoder, self.embedding, self.output
        if not _is_plain(embedding, nn.Embedding) or embedding.max_norm is not None:
            return "the embedding is no plain torch.nn.Embedding"
        if not _is_plain(output, nn.Linear):
            return "the output is no plain torch.nn.Linear"
        own = type(decoder).step is not Decoder.step or "step" in vars(decoder)
        return "the decoder has a step of its own" if own else None

    def _native(self, keys: Keys, state: DecoderState, request: Request) -> tuple[DecoderCall, Vocabulary]:
        """The call of one step of all rows, and what makes tokens of it."""
        embedding, output, options = self.embedding, self.output, request.options
        if options.copies > 1:
            state = repeated(state, options.batch_size, options.copies)
        weight: Tensor = embedding.weight  # type: ignore[assignment]
        y = weight[:1].expand(options.batch_size * options.copies, -1)[:, None]  # its shape counts: tokens make inputs
        return self.decoder.as_call(y, keys, state), Vocabulary(weight, output.weight, output.bias)  # type: ignore[arg-type]

    @property
    def backend(self) -> str:
        """The decoder's."""
        return self.decoder.backend

    def as_call(self, src: Any, tgt_in: Tensor, lengths: Lengths = None) -> DecoderCall:
        """The call of the decoder that `forward(src, tgt_in, lengths)` makes, for `explain`."""
        if tgt_in is None:
            raise TypeError("explain of a Seq2Seq needs tgt_in, ids [B, T], beside src: explain(model, src, tgt_in)")
        tgt_in = self._within("tgt_in", tgt_in, None)
        self._need_rows("tgt_in", tgt_in, src)
        return self.decoder.as_call(self.embedding(tgt_in), self._encode(src, lengths))

    @property
    def vocabulary(self) -> Vocabulary | None:
        """What a search in the kernels' loop makes tokens of; None where there is a `stepwise_part`.

        The parameters themselves, which such a search needs in one dtype: embedding.weight [V or more,
        decoder.input_size], output.weight [V, decoder.output_size] and output.bias [V] or None.
        """
        if self.stepwise_part is not None:
            return None
        return Vocabulary(self.embedding.weight, self.output.weight, self.output.bias)  # type: ignore[arg-type]

    def config(self) -> dict[str, Any]:
        """The arguments that build it again, as plain data; a part is such data with its `kind`.

        Raises TypeError where a part, an encoder of the user's own say, is no such data.
        """
        bias = getattr(self.output, "bias", None) is not None
        return described(self, embedding=None if self.tie == "all" else self.embedding, output_bias=bias)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write config, parameters and `extra` to one file; as `fastseq.save`."""
        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> "Seq2Seq":
        """The model of a file that `save` wrote, in eval mode; as `fastseq.load`."""
        model = load(path, device=device)
        if not isinstance(model, cls):
            raise InputError(
                f"{os.fspath(path)} holds one {type(model).__name__}, not {with_article(cls.__name__)};"
                " use fastseq.load"
            )
        return model

    def extra_repr(self) -> str:
        text = f"vocab_size={self.vocab_size}, bos_id={self.bos_id}, eos_id={self.eos_id}, pad_id={self.pad_id}"
        return text + (f", tie={self.tie!r}" if self.tie else "")


def _source_embedding(encoder: nn.Module, embedding: nn.Module | None, vocab_size: int) -> nn.Module:
    """What tie="all" shares."""
    source = getattr(encoder, "embedding", None)
    if not isinstance(source, nn.Embedding):
        raise InputError(
            "tie='all' needs an encoder with embedding=nn.Embedding(...), which it shares; or use tie='target'"
        )
    if embedding not in (None, source):
        raise InputError("tie='all' with an embedding of its own; leave embedding out, or use tie='target'")
    if source.num_embeddings != vocab_size:
        raise InputError(
            f"tie='all' shares one vocabulary, but encoder.embedding has {source.num_embeddings} rows and"
            f" vocab_size={vocab_size}; make them one, or use tie='target'"
        )
    return source


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module is torch's own and nothing but it: no subclass, parametrization, hook or other forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and not hooks and "forward" not in vars(module) and not _has_any_global_hook()


def _kinds(*values: Any) -> str:
    return " and ".join(type(value).__name__ for value in values)
