"""The files of fastseq.save: each is whole or not there, and load refuses what is cut, edited or made up."""

import json
import os
import random
import re
import signal
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fastseq
from fastseq import Encoder, InputError, Seq2Seq, saving
from tests.test_saving import save_tiny, tiny

pytest.importorskip("safetensors")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_tiny(tmp_path)


class File:
    """A file's parts; what is done to them."""

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        self.header, self.data = json.loads(raw[8:start]), raw[start:]
        self.metadata = self.header["__metadata__"]
        self.config, self.extra, self.shared = (json.loads(self.metadata[n]) for n in ("config", "extra", "shared"))
        self.digests = json.loads(self.metadata["digests"])

    def write(self, path: Path, *, digest: bool = False) -> None:
        """digest: as one who knows what he does would, with digests that fit."""
        stored = {"config": self.config, "extra": self.extra, "shared": self.shared}
        if digest:
            kept = {n: v for n, v in self.digests.items() if n.startswith("tensor.")}
            self.digests = kept | {n: saving._digest(v) for n, v in saving._fields(stored)}
        for name, value in (stored | {"digests": self.digests}).items():
            if name in self.metadata:
                self.metadata[name] = json.dumps(value)
        header = json.dumps(self.header).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + self.data)


def shift(header: dict[str, Any]) -> None:
    """Two biases of one size change places."""
    a, b = (header[f"decoder.bias_{n}_l0"] for n in ("ih", "hh"))
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]


Edit = Callable[[File], Any]
EDITS: dict[str, tuple[Edit, str]] = {  # as an accident or a hand without the digests would
    "nothing of ours": (lambda f: f.header.pop("__metadata__"), r"format=None in its metadata, expected 'fastseq'"),
    "format": (lambda f: f.metadata.update(format="pt"), r"format='pt' .*safetensors\.torch\.load_file"),
    "newer": (lambda f: f.metadata.update(version="3"), r"version='3' of the format; fastseq \S+ reads '1' and '2': "),
    "no version": (lambda f: f.metadata.pop("version"), r"version=None of the format"),
    "no config": (lambda f: f.metadata.pop("config"), r"config is missing in its metadata"),
    "no digests": (lambda f: f.metadata.pop("digests"), r"digests is missing in its metadata"),
    "size": (lambda f: f.config["decoder"].update(hidden_size=5), r"config\.decoder\.hidden_size was edited"),
    "deep": (lambda f: f.config["decoder"]["attention"].update(normalize=False), r"decoder\.attention\.normalize was"),
    "type": (lambda f: f.config.update(vocab_size="8"), r"config\.vocab_size was edited"),
    "lost field": (lambda f: f.config["encoder"].pop("dropout"), r"config\.encoder\.dropout is missing, though"),
    "field more": (lambda f: f.config["encoder"].update(zoneout=0.1), r"config\.encoder\.zoneout was edited"),
    "digest": (lambda f: f.digests.update({"config.tie": "0"}), r"config\.tie was edited"),
    "digest of nothing": (lambda f: f.digests.update({"config.x": "0"}), r"config\.x is missing, though"),
    "lost digest": (lambda f: f.digests.pop("tensor.output.bias"), r"tensor output\.bias was edited"),
    "extra": (lambda f: f.extra["words"].reverse(), r"extra\.words was edited"),
    "lost extra": (lambda f: f.extra.clear(), r"extra\.words is missing"),
    "shared": (lambda f: f.shared.update({"output.weight": "decoder.readout.weight"}), r"shared\.output\.weight was"),
    "dtype": (lambda f: f.header["output.bias"].update(dtype="I32"), r"tensor output\.bias is I32; expected one of"),
    "swapped": (lambda f: shift(f.header), r"tensor decoder\.bias_.h_l0 was edited"),
    "renamed": (lambda f: f.header.update(w=f.header.pop("output.bias")), r"tensor output\.bias is missing; .*\(8,\)"),
    "shape": (
        lambda f: f.header["encoder.embedding.weight"].update(shape=[3, 8]),
        r"tensor encoder\.embedding\.weight has shape \(3, 8\); expected \(8, 3\)",
    ),
    "tensor more": (
        lambda f: (
            f.header.update(w={"dtype": "F32", "shape": [1], "data_offsets": [len(f.data), len(f.data) + 4]}),
            setattr(f, "data", f.data + b"\0" * 4),
        ),
        r"tensor w is unexpected",
    ),
    "bytes more": (lambda f: setattr(f, "data", f.data + b"abc"), r"3 bytes too many, behind byte \d+"),
    "json": (lambda f: f.metadata.update(fastseq=1), r"its header was edited"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_load_refuses_what_was_edited(name: str, saved: Path) -> None:
    edit, message = EDITS[name]
    file = File(saved)
    edit(file)
    file.write(saved)
    with pytest.raises(InputError, match=re.escape(str(saved)) + ": .*" + message):
        fastseq.load(saved)


def put(path: str, value: Any) -> Edit:
    *parts, last = path.split(".")

    def edit(file: File) -> None:
        at = file.config
        for name in parts:
            at = at[name]
        at[last] = value

    return edit


MALICE: dict[str, tuple[Edit, str]] = {  # with digests that fit
    "kind": (put("kind", "os.system"), r"config\.kind='os\.system'; use one of Embedding, Linear, "),
    "kind of torch": (put("encoder.kind", "LSTMCell"), r"config\.encoder\.kind='LSTMCell'; use one of"),
    "no kind": (lambda f: f.config["decoder"].pop("kind"), r"config\.decoder\.kind=None"),
    "unhashable kind": (put("decoder.kind", []), r"config\.decoder\.kind=\[\]"),
    "other kind": (put("decoder.kind", "Bridge"), r"config\.decoder\.source is missing; Bridge has source, map"),
    "no module": (
        lambda f: setattr(f, "config", {"kind": "LocalP", "D": 2}), r"config\.kind='LocalP'; expected a module",
    ),
    "text": (put("decoder.hidden_size", "8"), r"config\.decoder\.hidden_size='8' is a str; expected int"),
    "bool": (put("decoder.hidden_size", True), r"hidden_size=True is a bool; expected int"),
    "float": (put("encoder.num_layers", 1.0), r"config\.encoder\.num_layers=1\.0 is a float; expected int"),
    "none": (put("encoder.dropout", None), r"config\.encoder\.dropout=None is a NoneType; expected float"),
    "list": (put("decoder.readout", ["state", 3]), r"config\.decoder\.readout=\['state', 3\] is a list; expected"),
    "part": (put("encoder.cell", {"kind": "LocalP", "D": 1}), r"config\.encoder\.cell=.* is a LocalP; expected str"),
    "wrong part": (put("decoder.bridge", {"kind": "LocalP", "D": 1}), r"bridge=.* is a LocalP; expected .*Bridge"),
    "long": (put("tie", "a" * 10**6), r"config: Seq2Seq cannot be built of it: tie='a+'; use one of None, 'target'"),
    "lost": (lambda f: f.config["encoder"].pop("dropout"), r"config\.encoder\.dropout is missing; Encoder has input"),
    "unknown": (put("decoder.zoneout", 0.1), r"config\.decoder\.zoneout is unknown; Decoder has"),
    "device": (put("decoder.device", "cuda"), r"config\.decoder\.device is unknown"),
    "refused": (put("decoder.attend", "never"), r"config\.decoder: Decoder cannot be built of it: attend='never'"),
    "negative": (put("decoder.hidden_size", -4), r"config\.decoder: .*hidden_size=-4; it is at least 1"),
    "asserted": (put("encoder.embedding.padding_idx", 99), r"encoder\.embedding: Embedding cannot be .*Padding"),
    "size": (put("decoder.attention.attn_size", 10**7), r"tensor decoder\.attention\.weight_memory has shape \(4, 8\)"),
    "huge size": (put("encoder.embedding.num_embeddings", 10**12), r"tensor encoder\.embedding\.weight has shape"),
    "size over all": (put("output.out_features", 10**30), r"config\.output: Linear cannot be built"),
    "layers": (put("encoder.num_layers", 10**9), r"config\.encoder\.num_layers=1000000000, but there are \d+ tensors"),
    "no object": (lambda f: setattr(f, "extra", [1]), r"extra in its metadata is a list; expected an object"),
    "shared with nothing": (lambda f: f.shared.update({"output.weight": "w"}), r"tensor w is missing"),
    "shared number": (lambda f: f.shared.update({"output.weight": 3}), r"shared\.output\.weight is no name"),
    "shared twice": (lambda f: f.shared.update({"output.bias": "output.bias"}), r"tensor output\.bias is unexpected"),
    "shared unknown": (lambda f: f.shared.update({"w": "output.bias"}), r"tensor w is unexpected"),
    "no longer shared": (lambda f: f.shared.clear(), r"tensor output\.weight is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALICE)
def test_load_refuses_what_was_made_up(name: str, saved: Path) -> None:
    edit, message = MALICE[name]
    file = File(saved)
    edit(file)
    file.write(saved, digest=isinstance(file.extra, dict))
    with pytest.raises(InputError, match=message):
        fastseq.load(saved)


@pytest.mark.parametrize("depth", [600, 30_000])
def test_nesting_is_refused(depth: int, saved: Path) -> None:
    file = File(saved)
    file.write(saved)
    file.metadata["config"] = '{"a":' * depth + "0" + "}" * depth
    header = json.dumps(file.header).encode()
    saved.write_bytes(len(header).to_bytes(8, "little") + header + file.data)
    with pytest.raises(InputError, match=r"nested too deeply|was edited"):
        fastseq.load(saved)


def test_made_up_files_may_be_right(saved: Path) -> None:
    """Digests guard against accidents: a config that fits the tensors is a model."""
    file = File(saved)
    put("encoder.dropout", 0.5)(file)
    put("decoder.attention.backend", "reference")(file)
    file.write(saved, digest=True)
    assert fastseq.load(saved).encoder.dropout == 0.5


FOREIGN = {
    "empty": (b"", r"0 bytes, but no safetensors file"),
    "text": (b"hello, world: a text of some length", r"35 bytes, but no safetensors file"),
    "zip": (b"PK\x03\x04\0\0\x08\x08" + b"\0" * 90, r"98 bytes, but no safetensors file"),
    "no header": ((2).to_bytes(8, "little") + b"[]", r"its header was edited"),
    "bad header": ((2).to_bytes(8, "little") + b"{]", r"its header was edited"),
    "no tensors": ((2).to_bytes(8, "little") + b"{}", r"format=None"),
}


def test_version_1_is_read(saved: Path) -> None:
    """Its encoders had no options of the recurrence; `Seq2Seq`s and encoders alone."""
    model, encoder = Seq2Seq.load(saved), saved.with_name("encoder")
    fastseq.save(model.encoder, encoder)
    for path, found in ((saved, model), (encoder, model.encoder)):
        file = File(path)
        file.metadata["version"] = "1"
        config = file.config.get("encoder", file.config)
        for name in ("zoneout", "recurrent_dropout", "recurrent_dropout_on", "layer_norm", "learn_state"):
            del config[name]
        file.write(path, digest=True)
        old = fastseq.load(path)
        assert old.config() == found.config()
        assert all(p.equal(q) for p, q in zip(old.parameters(), found.parameters(), strict=True))
        file.metadata["version"] = "2"
        file.write(path)
        with pytest.raises(InputError, match=r"zoneout is missing; Encoder has input_size, "):
            fastseq.load(path)


@pytest.mark.parametrize("name", FOREIGN)
def test_other_files(name: str, tmp_path: Path) -> None:
    content, message = FOREIGN[name]
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(InputError, match=message):
        fastseq.load(tmp_path / "model")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fastseq.load(tmp_path / "model")
    with pytest.raises(IsADirectoryError):
        fastseq.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such folder; make it first, by os\.makedirs"):
        fastseq.save(tiny(), tmp_path / "a" / "model")


def test_every_cut_is_refused(saved: Path) -> None:
    raw = saved.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for end in [*range(20), *range(20, len(raw), 61), start - 1, start, start + 1, len(raw) - 1]:
        saved.write_bytes(raw[:end])
        where = r"but no safe" if end < 8 else "within its header of" if end < start else r"of \d+, within tensor [a-z]"
        with pytest.raises(InputError, match=rf"model: ({end} bytes|cut at byte {end}).*{where}"):
            fastseq.load(saved)


def loads_as(model: Seq2Seq, path: Path) -> bool:
    """Whether the file loads, and then as the model; anything but InputError fails."""
    try:
        found = Seq2Seq.load(path)
    except InputError:
        return False
    assert found.config() == model.config()
    assert found.extra == model.extra
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), found.parameters(), strict=True))
    return True


def test_every_flipped_byte_is_refused_or_harmless(saved: Path) -> None:
    model, raw, pick = Seq2Seq.load(saved), saved.read_bytes(), random.Random(0)
    start = 8 + int.from_bytes(raw[:8], "little")
    places = [*range(8), *range(8, start, 29), *range(start, len(raw), 31)]
    harmless = []
    for place in places:
        wrong = bytearray(raw)
        wrong[place] ^= 1 << pick.randrange(8)
        saved.write_bytes(wrong)
        if loads_as(model, saved):
            harmless.append(place)
    version = raw.index(b'"fastseq":')  # the library's, for information
    assert all(version <= place < version + 40 or raw[place : place + 1] == b" " for place in harmless)


# ---- a file is whole or not there


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a second process and its limits")


def forked(work: Callable[[], Any]) -> int:
    """The id of a process that does the work; it exits with 0 if that returns True."""
    if child := os.fork():
        return child
    code = 1
    try:
        code = 0 if work() is True else 2
    finally:
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@needs_fork
@pytest.mark.parametrize("where", ["safetensors.serialize_file", "os.chmod", "os.fsync", "os.replace"])
def test_a_save_that_is_killed_leaves_the_old_file(where: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, model = saved.read_bytes(), tiny()

    def killed(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(where, killed)
        child = forked(lambda: model.save(saved))
    assert ended(child) == -signal.SIGKILL
    assert saved.read_bytes() == before
    fastseq.load(saved)
    model.save(saved)  # and what it left is in nobody's way
    assert fastseq.load(saved).config() == model.config()


@needs_fork
def test_saves_at_once_that_are_killed_at_any_moment(saved: Path) -> None:
    """Two processes save models of different sizes over and over, a third reads; both are killed, again and again."""
    models, seen = [Encoder(8, size) for size in (128, 192)], set()

    def save_on(model: Encoder) -> None:
        while True:
            fastseq.save(model, saved)

    for _ in range(8):
        children = [forked(partial(save_on, model)) for model in models]
        seen |= {getattr(fastseq.load(saved), "hidden_size", None) for _ in range(12)}
        for child in children:
            os.kill(child, signal.SIGKILL)
        assert [ended(child) for child in children] == [-signal.SIGKILL] * 2
        fastseq.load(saved)
    assert seen & {128, 192}


@needs_fork
def test_a_full_disk_leaves_the_old_file(saved: Path) -> None:
    resource = pytest.importorskip("resource")
    before, model = saved.read_bytes(), tiny()

    def work() -> bool:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(OSError, match=re.escape(str(saved)) + r" cannot be written: .*File too large"):
            model.save(saved)
        return True

    assert ended(forked(work)) == 0
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["chmod", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()], ids=["OSError", "interrupted"])
def test_a_save_that_fails_leaves_nothing(
    name: str, error: BaseException, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(os, name, fail)
        with pytest.raises(type(error)):
            tiny().save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(mask: int, saved: Path) -> None:
    old = os.umask(mask)
    try:
        tiny().save(saved)
        (saved.parent / "other").touch()
    finally:
        os.umask(old)
    ours, theirs = (stat.S_IMODE(p.stat().st_mode) for p in (saved, saved.parent / "other"))
    assert ours == theirs == 0o666 & ~mask


@pytest.mark.skipif(os.name != "posix", reason="makes links")
def test_links_and_relative_paths(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    Path("link").symlink_to("model")
    Encoder(2, 3)
    fastseq.save(Encoder(2, 3), "link")
    assert Path("link").is_symlink()
    assert isinstance(fastseq.load(b"model".decode()), Encoder)
    fastseq.save(Encoder(2, 4), "new")
    assert fastseq.load(Path("new")).hidden_size == 4
