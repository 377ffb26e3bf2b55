"""A module in one safetensors file: its config, its parameters and its `extra`, each with a digest.

The header's metadata: "format", "version", "fastseq" (the library's version, for information) and, as JSON, "config"
(`fastseq.config`), "extra", "shared" ({a tied parameter: the one that is stored}) and "digests" ({field: SHA-256}).
Nothing is unpickled, imported or evaluated, and a file's sizes are believed once its tensors have them.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ._version import __version__
from .config import REMEDY, build, config_of
from .errors import InputError, with_article

__all__ = ["load", "save"]

FORMAT, VERSION = "fastseq", "2"  # an option more of any constructor is another version
SINCE: dict[str, dict[str, dict[str, Any]]] = {  # {version: {kind: options that it lacks, as it had them}}
    "1": {
        "Encoder": {
            "zoneout": 0.0, "recurrent_dropout": 0.0, "recurrent_dropout_on": "state", "layer_norm": False,
            "learn_state": False,
        }
    }
}  # fmt: skip
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER = 100_000_000  # bytes; safetensors reads no larger one
AGAIN = "get the file anew, or save the model again"

Path = str | os.PathLike[str]
Shapes = dict[str, tuple[int, ...]]


def save(module: nn.Module, path: Path) -> None:
    """Write a Seq2Seq, Encoder, Decoder, Attention, LSTM, GRU or RNN to one safetensors file.

    It has the module's `config()`, parameters and `extra`.
    A file at `path` is replaced whole or not at all, whatever happens meanwhile; its folder must exist. Parameters keep
    their dtype; a tied one is stored once. `extra`: a dict of plain data, None, bool, int, float, str, lists and dicts
    with str keys. Not stored: device, requires_grad, training or eval mode, hooks.

    Raises TypeError or InputError, naming the part, for what a config cannot describe (modules and functions of your
    own, subclasses, parametrizations); OSError where the file cannot be written; ImportError without safetensors.
    """
    library = _safetensors()
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"fastseq.save takes a Seq2Seq, Encoder, Decoder, Attention, LSTM, GRU or RNN, got {type(module).__name__}"
        )
    config = config_of("the module", module)
    stored = {"config": config, "extra": _extra(module)}
    tensors, stored["shared"] = _tensors(module)
    _need_described(module, build(config), {name: tuple(t.shape) for name, t in tensors.items()}, stored["shared"])
    digests = {field: _digest(value) for field, value in _fields(stored)}
    digests |= {f"tensor.{name}": _digest_of(t) for name, t in tensors.items()}
    texts = {name: json.dumps(value) for name, value in (stored | {"digests": digests}).items()}
    metadata = {"format": FORMAT, "version": VERSION, "fastseq": __version__, **texts}
    if (size := len(json.dumps(metadata))) > MAX_HEADER // 2:  # the rest is for the tensors' names
        raise InputError(f"config and extra take {size} bytes, at most {MAX_HEADER // 2} fit; keep extra elsewhere")
    specs = {
        name: library.TensorSpec(
            dtype=str(t.dtype).removeprefix("torch."), shape=list(t.shape), data_ptr=t.data_ptr(), data_len=t.nbytes
        )
        for name, t in tensors.items()
    }
    with _replacing(os.fsdecode(path)) as partial:
        try:
            library.serialize_file(specs, partial, metadata)
        except library.SafetensorError as error:
            raise OSError(f"{os.fsdecode(path)} cannot be written: {error}") from error


def load(path: Path, *, device: torch.device | str | None = None) -> nn.Module:
    """The module of a file that `save` wrote, on `device` (None: torch's default), in eval mode, with its `extra`.

    Call train() to go on training. torch's random state stays as it is.

    Raises InputError, naming file and field, for a file that is cut, edited or of another kind: nothing is taken from
    it then; OSError where it cannot be read; ImportError without safetensors.
    """
    library, name = _safetensors(), os.fsdecode(path)
    with open(name, "rb"):  # what cannot be opened is the system's error
        pass
    try:
        # Read, not mapped: what is checked is then what is used, even if another program writes to the file.
        with library.safe_open(name, framework="pt", backend="pread") as file:
            return _read(file, device).eval()
    except library.SafetensorError as error:
        raise InputError(f"{name}: {_damage(name)}; {AGAIN} (safetensors: {error})") from None
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except RecursionError:
        raise InputError(f"{name}: config or extra is nested too deeply; {AGAIN}") from None


def _safetensors() -> Any:
    """The library, imported when it is first needed."""
    try:
        import safetensors

        if hasattr(safetensors, "TensorSpec"):  # which writes a tensor without NumPy
            return safetensors
        found = f"this is {safetensors.__version__}"
    except ImportError as error:
        found = str(error)
    raise ImportError(f"fastseq.save and load need safetensors, 0.8 or newer ({found}): pip install fastseq-rnn[save]")


def _fields(stored: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of everything that has a digest of its own, but for the tensors."""

    def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, dict):
            yield name, value
            return
        for key, item in value.items():
            yield from leaves(f"{name}.{key}", item)

    yield from leaves("config", stored["config"])
    for name in ("extra", "shared"):
        yield from ((f"{name}.{key}", value) for key, value in stored[name].items())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _digest_of(t: Tensor) -> str:
    """Of dtype, shape and bytes of a contiguous tensor on the CPU."""
    digest = hashlib.sha256(f"{t.dtype} {list(t.shape)} ".encode())
    digest.update((ctypes.c_char * t.nbytes).from_address(t.data_ptr()))  # without NumPy, which torch may lack
    return digest.hexdigest()


def _extra(module: nn.Module) -> dict[str, Any]:
    """The module's extra; TypeError or InputError unless JSON gives the same again."""
    extra = getattr(module, "extra", {})
    if type(extra) is not dict:
        raise TypeError(f"extra must be a dict, got {type(extra).__name__}")
    try:
        _need_plain("extra", extra)
    except RecursionError:
        raise InputError("extra contains itself, or is nested too deeply; make it flatter") from None
    return extra


def _need_plain(name: str, value: Any) -> None:
    if value is None or type(value) in (bool, int, float, str):
        return
    if type(value) is list:
        for index, item in enumerate(value):
            _need_plain(f"{name}[{index}]", item)
    elif type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(
                    f"{name} has the key {key!r}, {with_article(type(key).__name__)}; keys are str: use str(key)"
                )
            _need_plain(f"{name}[{key!r}]", item)
    else:
        raise TypeError(
            f"{name} is {with_article(type(value).__name__)}; extra holds None, bool, int, float, str, list and dict:"
            " convert it, by list(...), .tolist() or str(...)"
        )


def _tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The parameters by name, contiguous and on the CPU, each once; {every other name: the first}."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, parameter in module.state_dict(keep_vars=True).items():
        if (known := first.setdefault(id(parameter), name)) != name:
            shared[name] = known
            continue
        t = parameter.detach() if isinstance(parameter, Tensor) else parameter
        if type(t) is not Tensor or t.layout != torch.strided:
            raise TypeError(f"{name} is {with_article(type(t).__name__)}, not a dense torch.Tensor; {REMEDY}")
        if t.device.type == "meta":
            raise InputError(f"{name} is on the meta device and has no values; load or initialise it first")
        if t.dtype not in DTYPES.values():
            raise InputError(f"{name} is {t.dtype}; parameters are {', '.join(map(str, DTYPES.values()))}: convert it")
        tensors[name] = t.cpu().contiguous()
    return tensors, shared


def _need_described(module: nn.Module, twin: nn.Module, shapes: Shapes, shared: dict[str, str]) -> None:
    """Refuse a module that its config would not build again: it was changed since."""
    ours, theirs = ({n: type(m) for n, m in of.named_modules(remove_duplicate=False)} for of in (module, twin))
    for name in ours | theirs:
        if ours.get(name) is not theirs.get(name):
            mine, other = (_class(kinds.get(name)) for kinds in (ours, theirs))
            raise TypeError(f"{name} is {mine}, its config would make {other}; {REMEDY}")
    try:
        _need_fitting(twin, shapes, shared)
    except InputError as error:
        raise InputError(f"{error} of the module; {REMEDY}") from None


def _class(cls: type | None) -> str:
    return "nothing" if cls is None else f"{cls.__name__} of {cls.__module__.partition('.')[0]}"


def _need_fitting(twin: nn.Module, shapes: Shapes, shared: dict[str, str]) -> None:
    """Raise InputError unless these tensors are the parameters of a module, no more and no less."""
    expected = {name: tuple(t.shape) for name, t in twin.state_dict(keep_vars=True).items()}
    for name, shape in expected.items():
        stored = shared.get(name, name)
        if stored not in shapes:
            raise InputError(f"tensor {stored} is missing; expected {shape}, by the config")
        if shapes[stored] != shape:
            raise InputError(f"tensor {stored} has shape {shapes[stored]}; expected {shape} for {name}, by the config")
    for name in [*shapes, *shared]:
        if name not in expected or (name in shapes and name in shared):
            raise InputError(f"tensor {name} is unexpected; no parameter is left for it, by the config")


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[str]:
    """A new path to write; then it takes the place of `path` at once, or is removed if something fails."""
    target = os.path.realpath(path)  # a link stays one
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "no such folder; make it first, by os.makedirs", folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fastseq-", ignore_cleanup_errors=True) as own:
        partial = os.path.join(own, "partial")
        with open(partial, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777  # what the umask gives a new file; safetensors', 0o600
        yield partial
        os.chmod(partial, mode)
        _sync(partial, os.O_RDWR)
        os.replace(partial, target)
    if os.name == "posix":
        with contextlib.suppress(OSError):  # some file systems cannot, and the file stands already
            _sync(folder, os.O_RDONLY)


def _sync(path: str, flags: int) -> None:
    file = os.open(path, flags)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _read(file: Any, device: torch.device | str | None) -> nn.Module:
    """The module of an open file; InputError, naming the field, where it is not as `save` left it."""
    stored, digests = _metadata(file.metadata() or {})
    shapes: Shapes = {}
    for name in file.keys():  # noqa: SIM118  # not a dict
        view = file.get_slice(name)
        shapes[name] = tuple(view.get_shape())
        if view.get_dtype() not in DTYPES:
            raise InputError(f"tensor {name} is {view.get_dtype()}; expected one of {', '.join(DTYPES)}; {AGAIN}")
    for field, value in _fields(stored):
        if field.endswith(".num_layers") and type(value) is int and value > len(shapes):
            raise InputError(f"{field}={value}, but there are {len(shapes)} tensors; a layer has at least two")
    module = build(stored["config"])
    if not isinstance(module, nn.Module):
        raise InputError(f"config.kind={stored['config']['kind']!r}; expected a module; {AGAIN}")
    _need_fitting(module, shapes, stored["shared"])
    parameters = {name: _parameter(file, name, digests, device) for name in shapes}
    for name in module.state_dict():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, parameters[stored["shared"].get(name, name)])
    if stored["extra"]:
        module.extra = stored["extra"]
    return module


def _parameter(file: Any, name: str, digests: dict[str, Any], device: torch.device | str | None) -> nn.Parameter:
    t = file.get_tensor(name)
    if _digest_of(t) != digests.get(f"tensor.{name}"):
        raise InputError(f"tensor {name} was edited: it is not what its digest says; {AGAIN}")
    return nn.Parameter(torch.empty(t.shape, dtype=t.dtype, device=device).copy_(t))  # aligned as torch's are


def _metadata(metadata: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """({"config", "extra", "shared"}, digests), where every field is what its digest says."""
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"format={metadata.get('format')!r} in its metadata, expected {FORMAT!r}: not a file of fastseq.save; for"
            " others use safetensors.torch.load_file and load_state_dict"
        )
    if (version := metadata.get("version")) not in (*SINCE, VERSION):
        known = " and ".join(map(repr, (*SINCE, VERSION)))
        raise InputError(
            f"version={version!r} of the format; fastseq {__version__} reads {known}: for a newer one upgrade"
            " fastseq-rnn"
        )
    stored = {name: _parsed(name, metadata) for name in ("config", "extra", "shared")}
    digests = _parsed("digests", metadata)
    found = dict(_fields(stored))
    for field, value in found.items():
        if _digest(value) != digests.get(field):
            raise InputError(f"{field} was edited: it is not what its digest says; {AGAIN}")
    for field in digests:
        if field not in found and not field.startswith("tensor."):
            raise InputError(f"{field} is missing, though there is a digest of it; {AGAIN}")
    if wrong := [name for name, kept in stored["shared"].items() if not isinstance(kept, str)]:
        raise InputError(f"shared.{wrong[0]} is no name; {AGAIN}")
    if version != VERSION:
        _upgrade(stored["config"], SINCE[str(version)])
    return stored, digests


def _upgrade(config: Any, lacking: dict[str, dict[str, Any]]) -> None:
    """Give a config, in place, and all parts within it the options that its version had not."""
    if isinstance(config, dict):
        for part in list(config.values()):
            _upgrade(part, lacking)
        for name, value in lacking.get(str(config.get("kind")), {}).items():
            config.setdefault(name, value)


def _parsed(name: str, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        value = json.loads(metadata[name])
    except KeyError:
        raise InputError(f"{name} is missing in its metadata; {AGAIN}") from None
    except ValueError as error:
        raise InputError(f"{name} in its metadata is no JSON: {error}; {AGAIN}") from None
    if not isinstance(value, dict):
        raise InputError(f"{name} in its metadata is {with_article(type(value).__name__)}; expected an object; {AGAIN}")
    return value


def _damage(path: str) -> str:
    """What is wrong with a file that safetensors does not read."""
    with open(path, "rb") as file:
        size, start = os.fstat(file.fileno()).st_size, 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > MAX_HEADER:
            return f"{size} bytes, but no safetensors file, or its first bytes were edited"
        if size < start:
            return f"cut at byte {size}, within its header of {start} bytes"
        try:
            header = json.loads(file.read(start - 8))
            ends = sorted((entry["data_offsets"][1], name) for name, entry in header.items() if name != "__metadata__")
            total = start + ends[-1][0]
            if size < total:
                name = next(name for end, name in ends if start + end > size)
                return f"cut at byte {size} of {total}, within tensor {name}"
            return "its header was edited" if size == total else f"{size - total} bytes too many, behind byte {total}"
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return "its header was edited"
