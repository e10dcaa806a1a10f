"""Safe reading of untrusted pickles: the allowed globals are listed here; no other is looked up, let alone called.

Calls that rebuild a tensor return a `FileTensor`, which has the location of the numbers in the file; objects of the
frameworks' classes become `Unpickled`s, which only hold the stored values. A global that is not in the list is refused
by name before it could be called.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from everstep.checkpointing.convert.core.content import ConversionError
from everstep.checkpointing.universal.dtypes import NAMES, numpy_dtype

from .filetensor import FileTensor, Storage

Stubs = Mapping[tuple[str, str], Callable[..., Any]]
NO_STUBS: Stubs = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Dtype:
    """torch.float32 and the like, where it is a value in a file."""

    name: str

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a dtype has no state")


class Unpickled:
    """The stored values of an object whose class is not imported: the constructor's `arguments`, the `state`."""

    __slots__ = ("arguments", "state")
    kind = ""  # module.name of the class
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> Unpickled:
        self = super().__new__(cls)
        self.arguments = arguments
        self.state = None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @property
    def fields(self) -> dict[str, Any]:
        """The attributes that were stored, by name; none for an object that stored none."""
        return self.state if isinstance(self.state, dict) else {}

    def __repr__(self) -> str:
        return f"{self.kind}{self.arguments}{self.fields or ''}"


def record(kind: str) -> type[Unpickled]:
    """A record class in place of `module.name`."""
    return type(kind.rpartition(".")[2], (Unpickled,), {"__slots__": (), "kind": kind})


class _Call:
    """A function that a pickle may call, and can do nothing else with."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError("an attribute of a function was to be set")

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class Unpickler(pickle.Unpickler):
    """One reading of one pickle. `stubs`: more globals that it may hold; `storage`: what finds a tensor's bytes."""

    def __init__(
        self, data: bytes, where: str, stubs: Stubs, storage: Callable[[object, str, int], Storage] | None = None
    ) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._where = where
        self._stubs = stubs
        self._storage = storage
        self._records: dict[str, type[Unpickled]] = {}

    def load(self) -> Any:
        try:
            return super().load()
        except ConversionError:
            raise
        except Exception as error:  # any error that a damaged or hostile pickle causes in the allowed calls
            raise ConversionError(f"{self._where}: its pickle cannot be read: {error!r}") from error

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if (module, name) in self._stubs:
            return self._stubs[module, name]
        if (module, name) in _CALLS:
            return _Call(_CALLS[module, name])
        if (module, name) in _TYPES:
            return _TYPES[module, name]
        if name in _RECORDS.get(module, ()):
            kind = f"{module}.{name}"
            return self._records.setdefault(kind, record(kind))
        if module == "torch" and (name in NAMES or name in UNKNOWN_DTYPES):
            return Dtype(name)
        if module in ("torch", "torch.storage") and name in STORAGES:
            return Dtype(STORAGES[name])
        raise ConversionError(
            f"{self._where}: refused: its pickle asks for {module}.{name}, which is not among what a checkpoint may "
            "hold; nothing of it was executed"
        )

    def persistent_load(self, pid: Any) -> Storage:
        tag, kind, key, _, elements = pid
        if tag != "storage" or not isinstance(kind, Dtype) or self._storage is None:
            raise pickle.UnpicklingError(f"a reference to {pid!r}")
        return self._storage(key, kind.name, int(elements) * _itemsize(kind.name, self._where))


def _itemsize(dtype: str, where: object) -> int:
    if dtype not in NAMES:
        raise ConversionError(f"{where}: holds a tensor whose element type, {dtype}, is not known here")
    return numpy_dtype(dtype).itemsize


def _tensor(
    storage: Storage,
    start: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    _trained: object = None,
    _hooks: object = None,
    flags: Any = None,
) -> FileTensor:
    """torch._utils._rebuild_tensor_v2. Raises for a tensor that exceeds its storage."""
    flags = flags or {}
    if left := flags.keys() - {"conj", "neg"}:
        raise ConversionError(f"{storage.path}: a tensor is marked {', '.join(sorted(left))}, which is not understood")
    itemsize = _itemsize(storage.dtype, storage.path)
    tensor = FileTensor(
        storage.path,
        storage.offset,
        storage.nbytes,
        storage.dtype,
        tuple(shape),
        tuple(strides),
        start,
        bool(flags.get("conj")),
        bool(flags.get("neg")),
    )
    numbers = (start, *tensor.shape, *tensor.strides)
    if len(tensor.shape) != len(tensor.strides) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ConversionError(f"{storage.path}: a tensor of shape {tensor.shape} with strides {tensor.strides}")
    if tensor.elements:
        ends = start + 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True))
        needed = ends * itemsize
        if needed > storage.nbytes:
            raise ConversionError(
                f"{storage.path}: torn: a tensor of shape {list(tensor.shape)} ends at byte {needed} of its storage, "
                f"which has {storage.nbytes}"
            )
    return tensor


def _typed_tensor(
    storage: Storage, start: int, shape: Any, strides: Any, _: bool, __: Any, dtype: Dtype, flags: Any = None
) -> FileTensor:
    """torch._utils._rebuild_tensor_v3: its storage is bytes, its type beside it."""
    typed = Storage(storage.path, storage.offset, storage.nbytes, dtype.name)
    return _tensor(typed, start, shape, strides, None, None, flags)


def _from_type(function: _Call, kind: object, arguments: tuple[Any, ...], state: object) -> Any:
    """torch._tensor._rebuild_from_type_v2: a tensor that had attributes, which are left."""
    if not isinstance(function, _Call):
        raise pickle.UnpicklingError(f"a tensor rebuilt by {function!r}")
    return function(*arguments)


def _reconstructor(kind: Any, base: object, state: object) -> Unpickled:
    """copyreg._reconstructor, for the classes that are records."""
    if not (isinstance(kind, type) and issubclass(kind, Unpickled)):
        raise pickle.UnpicklingError(f"an instance of {kind!r}")
    return kind()


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    """_codecs.encode, as it is used to store bytes."""
    if encoding not in ("latin1", "latin-1", "utf-8"):
        raise pickle.UnpicklingError(f"an encoding {encoding!r}")
    return text.encode(encoding)


def _bytearray(data: Any = b"", encoding: str = "latin-1") -> bytearray:
    """builtins.bytearray, but never of a size alone."""
    return bytearray(data.encode(encoding) if isinstance(data, str) else bytes(memoryview(data)))


def _number(kind: Any, data: bytes) -> Any:
    """numpy's scalars, as Python's numbers."""
    code = kind.arguments[0]
    if code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
        raise pickle.UnpicklingError(f"a numpy scalar of type {code!r}")
    return np.frombuffer(data, "<" + code)[0].item()


# What may be called. Each gives a value and has no effect.
_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch", "Size"): tuple,
    ("torch", "device"): lambda *parts: ":".join(map(str, parts)),
    ("torch.serialization", "_get_layout"): str,
    ("builtins", "bytearray"): _bytearray,
    ("builtins", "slice"): slice,
    ("builtins", "complex"): complex,
    ("collections", "defaultdict"): lambda *_: {},
    ("collections", "Counter"): dict,
    ("collections", "deque"): lambda items=(), *_: list(items),
    ("_codecs", "encode"): _encode,
    ("numpy.core.multiarray", "scalar"): _number,
    ("numpy._core.multiarray", "scalar"): _number,
    ("copyreg", "_reconstructor"): _reconstructor,
}
# Types that a pickle may make instances of.
_TYPES: dict[tuple[str, str], type] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "object"): object,
}
# Classes whose instances become records, by module.
_RECORDS: dict[str, tuple[str, ...]] = {
    "argparse": ("Namespace",),
    "torch": ("Tensor",),
    "torch.nn.parameter": ("Parameter",),
    "pathlib": ("PosixPath", "PurePosixPath", "Path"),
    "signal": ("Signals",),
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("_reconstruct",),
    "numpy._core.multiarray": ("_reconstruct",),
    "numpy._core.numeric": ("_frombuffer",),
    "numpy.core.numeric": ("_frombuffer",),
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
    "deepspeed.checkpoint.universal_checkpoint": ("SubparamShape",),
    "megatron.core.enums": ("ModelType", "Fp8Recipe", "Fp4Recipe"),
    "megatron.core.transformer.enums": (
        "AttnBackend",
        "AttnMaskType",
        "AttnType",
        "CudaGraphScope",
        "LayerType",
        "ModelType",
    ),
    "megatron.core.rerun_state_machine": ("RerunDiagnostic", "RerunMode", "RerunState", "RerunValidationStatus"),
    "transformer_engine.common.recipe": ("DelayedScaling", "Format", "_FormatHelper"),
}
# torch's other element types: accepted as names only, so that an error can name the type.
UNKNOWN_DTYPES = frozenset(
    {
        *("complex32", "float8_e8m0fnu", "float4_e2m1fn_x2", "quint8", "qint8", "qint32", "quint4x2", "quint2x4"),
        *("bits1x8", "bits2x4", "bits4x2", "bits8", "bits16"),
        *(f"{sign}int{width}" for sign in ("", "u") for width in range(1, 8)),
    }
)
STORAGES = {
    "UntypedStorage": "uint8",
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
