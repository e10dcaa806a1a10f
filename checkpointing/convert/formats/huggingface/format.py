"""Models as Hugging Face keeps them: safetensors (or older pickles), in one file or many, with a config.json.

They hold no optimizer. Settings on writing: `max_shard_size` ("5GB"), `dtype` (of all that is floating point; else
what the module computes in), `config` (a config.json to put beside weights that came from elsewhere).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from everstep.checkpointing.convert.core.casting import cast
from everstep.checkpointing.convert.core.content import Content, ConversionError, Lazy
from everstep.checkpointing.convert.core.format import Options
from everstep.checkpointing.convert.core.work import Piece, PieceWork
from everstep.checkpointing.convert.files import safetensors_file, torchfile
from everstep.checkpointing.convert.files.filetensor import FileTensor
from everstep.checkpointing.convert.formats.dcp import tensors as dcp_tensors
from everstep.checkpointing.universal.dtypes import NAMES, numpy_dtype

from . import safetensors_shards

EXTRA = "hf"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OLD_SINGLE = "pytorch_model.bin"
_OLD_INDEX = "pytorch_model.bin.index.json"
_CONFIGS = {"config": "config.json", "generation_config": "generation_config.json"}
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|shared)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_layer)\.weight$")
_BUFFER = re.compile(r"(^|\.)(running_mean|running_var|num_batches_tracked|inv_freq|masked_bias|.*_cached)$")
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def detect(path: Path) -> bool:
    """Whether `path` is such a model, or one file of safetensors."""
    if path.is_file():
        return path.suffix == ".safetensors"
    return path.is_dir() and (
        any((path / name).exists() for name in (SINGLE, INDEX, _OLD_SINGLE, _OLD_INDEX))
        or any(path.glob("*.safetensors"))
    )


def read(path: Path, options: Options) -> Content:
    """The model in the folder `path`, or in one file."""
    folder = path if path.is_dir() else path.parent
    found = _Found.of(path)
    configs = {key: _json(folder / name) for key, name in _CONFIGS.items() if (folder / name).exists()}
    content = Content(step=0)
    tied = _tied(found, configs.get("config", {}))
    for name, tensor in found.tensors.items():
        if name in tied:
            content.notes[name] = f"tied to {tied[name]}"
            continue
        floating = tensor.dtype.startswith(("float", "bfloat"))
        room = content.params if floating and not _BUFFER.search(name) else content.buffers
        room[name] = tensor
        content.notes[name] = f"{name} in {tensor.origin.partition(':')[0]}"
    if found.parts:
        content.warnings.append(
            f"{path}: put together of {len(found.parts)} shards of a distributed save, which do not say how many there "
            "were: check the shapes"
        )
    if path.is_dir() and (beside := _beside(path, found)):
        content.dropped.append((", ".join(beside), "files beside the weights, which are not read: copy what you need"))
    content.tied = tied
    content.extra[EXTRA] = configs
    return content


def _beside(folder: Path, found: _Found) -> list[str]:
    """Files in the folder that hold nothing of what was read: tokenizers, a trainer's states, other weights."""
    read_ = {tensor.path.name for tensor in found.places.values()} | set(found.parts)
    known = {*read_, *_CONFIGS.values(), INDEX, _OLD_INDEX}
    return sorted(each.name for each in folder.iterdir() if each.is_file() and each.name not in known)


@dataclass(frozen=True)
class _Found:
    """The tensors of a model's files, by name, and the strings in the files' headers."""

    tensors: dict[str, Lazy]
    metadata: dict[str, str]
    places: dict[str, FileTensor] = field(default_factory=dict)  # locations of the tensors that are whole in one file
    parts: tuple[str, ...] = ()  # the files of a distributed save, of which each tensor may be in several

    @classmethod
    def of(cls, path: Path) -> _Found:
        if path.is_file():
            return cls._of_file(path, alone=True)
        for index in (INDEX, _OLD_INDEX):
            if (path / index).exists():
                return cls._of_index(path / index)
        for single in (SINGLE, _OLD_SINGLE):
            if (path / single).exists():
                return cls._of_file(path / single)
        files = sorted(path.glob("*.safetensors"))
        if (divided := safetensors_shards.assemble(files)) is not None:
            tensors = {name: dcp_tensors.lazy(tensor) for name, tensor in divided.items()}
            return cls(tensors, {}, parts=tuple(each.name for each in files))
        if len(files) == 1:
            return cls._of_file(files[0])
        raise ConversionError(f"{path}: {len(files)} safetensors files and no {INDEX}; expected it, or one file")

    @classmethod
    def _of_file(cls, path: Path, *, alone: bool = False) -> _Found:
        if path.suffix == ".safetensors":
            header = safetensors_file.read_header(path)
            if alone:
                safetensors_shards.check_whole(path, header)
            return cls._whole(header.tensors, header.metadata)
        values = torchfile.load(path)
        if not isinstance(values, dict) or not all(isinstance(each, FileTensor) for each in values.values()):
            raise ConversionError(f"{path}: expected a dictionary of tensors by name")
        return cls._whole(dict(values), {})

    @classmethod
    def _whole(cls, tensors: dict[str, FileTensor], metadata: dict[str, str]) -> _Found:
        lazies = {name: tensor.lazy(f"{tensor.path.name}:{name}") for name, tensor in tensors.items()}
        return cls(lazies, metadata, tensors)

    @classmethod
    def _of_index(cls, index: Path) -> _Found:
        names = _json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ConversionError(f"{index}: no weight_map; expected one from each name to its file")
        tensors: dict[str, FileTensor] = {}
        metadata: dict[str, str] = {}
        for file in sorted(set(names.values())):
            if Path(file).name != file:
                raise ConversionError(f"{index}: names {file!r}; expected a file in the same folder")
            part = cls._of_file(index.parent / file)
            wanted = {name for name, where in names.items() if where == file}
            if wanted != set(part.tensors):
                name = min(wanted ^ set(part.tensors))
                where = "in it, but not in the index" if name in part.tensors else "not in it, but in the index"
                raise ConversionError(f"{index.parent / file}: {name} is {where}; the files are of different saves")
            tensors.update(part.places)
            metadata.update(part.metadata)
        return cls._whole({name: tensors[name] for name in names}, metadata)


def _tied(found: _Found, config: dict[str, Any]) -> dict[str, str]:
    """Tied names: according to the files' metadata, their storage, or the configuration."""
    tied = {
        alias: name
        for alias, name in found.metadata.items()
        if name in found.tensors and alias not in found.tensors and alias != "format"
    }
    stored: dict[FileTensor, str] = {}
    for name, place in found.places.items():
        if stored.setdefault(place, name) != name:
            tied[name] = stored[place]
    head = next((name for name in found.tensors if _HEAD.search(name)), None)
    embedding = next((name for name in found.tensors if _EMBEDDING.search(name)), None)
    ties = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings"))
    if embedding is None or ties is False:
        return tied
    if head is None:
        with_head = any(name.endswith(_WITH_HEAD) for name in config.get("architectures") or ())
        if with_head and not any(_HEAD.search(alias) for alias in tied):
            tied["embed_out.weight" if "embed_in." in embedding else "lm_head.weight"] = embedding
    elif ties and head not in tied and _equal(found.tensors[head], found.tensors[embedding]):
        tied[head] = embedding
    return tied


def _equal(one: Lazy, other: Lazy) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype) and one.read().tobytes() == other.read().tobytes()


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: holds a {type(value).__name__}; expected an object")
    return value


def write(content: Content, out: Path, options: Options, work: PieceWork) -> None:
    """Write the weights of `content` in the module's compute type; tied weights once, without the optimizer."""
    work.make(out)
    tensors = _weights(content)
    dtypes = {name: _dtype(content, name, tensor, options) for name, tensor in tensors.items()}
    shards = _shards(tensors, dtypes, _bytes(options.settings.get("max_shard_size", "5GB")))
    configs = _configs(content, options)
    names = [SINGLE] if len(shards) == 1 else [_shard_name(at, len(shards)) for at in range(len(shards))]
    work.run(_pieces(content, out, dict(zip(names, shards, strict=True)), tensors, dtypes))
    if len(shards) > 1:
        total = sum(tensors[name].elements * numpy_dtype(dtypes[name]).itemsize for name in tensors)
        metadata = {"total_parameters": sum(each.elements for each in tensors.values()), "total_size": total}
        where = {name: file for file, members in zip(names, shards, strict=True) for name in members}
        _write_json(out / INDEX, {"metadata": metadata, "weight_map": dict(sorted(where.items()))})
    for name, config in configs.items():
        _write_json(out / name, config)


def _weights(content: Content) -> dict[str, Lazy]:
    """What the module's state dictionary holds; the rows that Megatron pads embeddings with are left."""
    kept = content.extra.get("megatron", {})
    rows, padded = kept.get("vocab_size"), kept.get("padded_vocab_size")
    weights = {**content.params, **content.frozen, **content.buffers}
    if rows and padded and rows < padded:
        for name, tensor in weights.items():
            if (_EMBEDDING.search(name) or _HEAD.search(name)) and tensor.shape[0] == padded:
                weights[name] = _first_rows(tensor, int(rows))
    return weights


def _first_rows(tensor: Lazy, rows: int) -> Lazy:
    return replace(tensor, shape=(rows, *tensor.shape[1:]), read=lambda: np.ascontiguousarray(tensor.read()[:rows]))


def _dtype(content: Content, name: str, tensor: Lazy, options: Options) -> str:
    asked = options.settings.get("dtype")
    if asked is not None and asked not in NAMES:
        raise ConversionError(f"dtype={asked}: expected one of {', '.join(NAMES)}")
    if asked is not None and tensor.dtype.startswith(("float", "bfloat")):
        return asked
    return content.dtypes.get(name, tensor.dtype)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*([KMG]?I?B?)\s*", text.upper())
    if match is None or match[2] not in _UNITS or int(match[1]) == 0:
        raise ConversionError(f"max_shard_size={text}: expected a number of bytes, or one with KB, MB, GB, KiB, ...")
    return int(match[1]) * _UNITS[match[2]]


def _shards(tensors: dict[str, Lazy], dtypes: dict[str, str], limit_bytes: int) -> list[list[str]]:
    """The names in each file: in order, a new file where one would grow over the limit."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.elements * numpy_dtype(dtypes[name]).itemsize
        if shards[-1] and size + nbytes > limit_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _shard_name(at: int, count: int) -> str:
    return f"model-{at + 1:05d}-of-{count:05d}.safetensors"


def _pieces(
    content: Content, out: Path, files: dict[str, list[str]], tensors: dict[str, Lazy], dtypes: dict[str, str]
) -> Iterator[Piece]:
    """A piece for the beginning of each file, and one for each tensor in it."""
    for file, members in files.items():
        aliases = {alias: name for alias, name in content.tied.items() if name in members}
        begin, at = safetensors_file.layout(
            {name: tensors[name] for name in members}, dtypes, {"format": "pt", **aliases}
        )
        yield Piece(file, len(begin), _placing(out / file, 0, lambda begin=begin: begin))  # type: ignore[misc]
        for name in members:
            nbytes = tensors[name].nbytes + tensors[name].elements * numpy_dtype(dtypes[name]).itemsize
            yield Piece(f"{file}:{name}", nbytes, _placing(out / file, at[name], _data(tensors[name], dtypes[name])))


def _data(tensor: Lazy, dtype: str) -> Callable[[], Any]:
    return lambda: memoryview(np.ascontiguousarray(cast(tensor.read(), dtype)).reshape(-1).view(np.uint8).data)


def _placing(path: Path, offset: int, data: Callable[[], Any]) -> Callable[[], None]:
    def do() -> None:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            left, at = memoryview(data()), offset
            while left:
                count = os.pwrite(handle, left, at)
                left, at = left[count:], at + count
            os.fsync(handle)
        finally:
            os.close(handle)

    return do


def _configs(content: Content, options: Options) -> dict[str, Any]:
    """What the other files of the model hold, by their names."""
    kept = content.extra.get(EXTRA, {})
    configs = {file: dict(kept[key]) for key, file in _CONFIGS.items() if key in kept}
    if "config" in options.settings:
        configs["config.json"] = _json(Path(options.settings["config"]))
    if "config.json" in configs and "dtype" in options.settings:
        key = "torch_dtype" if "torch_dtype" in configs["config.json"] else "dtype"
        configs["config.json"][key] = options.settings["dtype"]
    return configs


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as stream:
        stream.write(json.dumps(value, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
