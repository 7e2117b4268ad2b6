"""What a checkpoint directory holds, from the headers of its safetensors files alone.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the data).
"""

import json
import math
import mmap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath

import ml_dtypes
import numpy as np

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Types of safetensors, by the name in the header."""

_LENGTH_BYTES = 8
# safetensors' own limit.
_MAX_HEADER_BYTES = 100_000_000
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class MappedFile:
    """A safetensors file of which nothing is read before a tensor's bytes are touched.

    Attributes:
        path: the file.
        size: its bytes.
    """

    def __init__(self, path: Path):
        self.path = path
        self.size = path.stat().st_size

    @cached_property
    def mapping(self) -> mmap.mmap:
        """The file mapped into memory, read-only."""
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor in a safetensors file.

    Attributes:
        key: its name in the file.
        dtype: its type.
        shape: its shape.
        file: the file.
        start: offset of its first byte in the file.
    """

    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: MappedFile
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor as a view of the mapped file."""
        count = math.prod(self.shape)
        if count == 0:
            return np.empty(self.shape, self.dtype)
        array = np.frombuffer(self.file.mapping, self.dtype, count, self.start).reshape(self.shape)
        # Older writers do not pad the header, so that a view may not be aligned.
        return np.require(array, requirements="A")

    def prefetch(self) -> None:
        """Ask the system to read the tensor's pages ahead."""
        if self.nbytes == 0 or not hasattr(mmap, "MADV_WILLNEED"):
            return
        first = self.start - self.start % mmap.PAGESIZE
        self.file.mapping.madvise(mmap.MADV_WILLNEED, first, self.start + self.nbytes - first)


def read_checkpoint(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its key in the files; one file, or shards with an index.

    Raises:
        FileNotFoundError: there are no safetensors, or a shard is missing.
        ValueError: a file or the index is corrupt, or the index points outside of the directory.
    """
    if (directory / SINGLE_FILE).exists():
        return read_header(directory / SINGLE_FILE)
    if (directory / INDEX_FILE).exists():
        return _read_shards(directory)
    pickles = sorted(path.name for pattern in _PICKLE_PATTERNS for path in directory.glob(pattern))
    if pickles:
        raise FileNotFoundError(
            f"{directory} holds its weights as pickle files ({', '.join(pickles)}), which can run code when "
            "they are loaded and are not read. Save it again with transformers' "
            "save_pretrained(..., safe_serialization=True), or use a repository with safetensors."
        )
    raise FileNotFoundError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by key. Nothing but the header is read.

    Raises:
        ValueError: the file is truncated or its header is corrupt.
    """
    file = MappedFile(path)
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if file.size < _LENGTH_BYTES or length > min(file.size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise _corrupt(path, f"it has {file.size} bytes and declares a header of {length}")
        header_bytes = stream.read(length)
    try:
        header = json.loads(header_bytes)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _corrupt(path, f"its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    data = _LENGTH_BYTES + length
    tensors = {key: _stored_tensor(file, data, key, entry) for key, entry in header.items()}
    end = max((tensor.start + tensor.nbytes for tensor in tensors.values()), default=data)
    if end > file.size:
        raise _corrupt(path, f"its tensors end at byte {end}, but it has {file.size}")
    return tensors


def _stored_tensor(file: MappedFile, data: int, key: str, entry: object) -> StoredTensor:
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        valid = all(isinstance(n, int) and n >= 0 for n in (*shape, first, last))
    except (TypeError, KeyError, ValueError):
        valid = False
    if not valid:
        raise _corrupt(file.path, f"the header's entry for {key} is {entry!r}")
    if dtype not in DTYPES:
        raise ValueError(
            f"{file.path}: {key} has type {dtype!r}, which is not supported; supported: {', '.join(DTYPES)}"
        )
    tensor = StoredTensor(key, DTYPES[dtype], shape, file, data + first)
    if last - first != tensor.nbytes:
        raise _corrupt(
            file.path, f"{key} needs {tensor.nbytes} bytes ({dtype} {list(shape)}), stored {last - first}"
        )
    return tensor


def _read_shards(directory: Path) -> dict[str, StoredTensor]:
    weight_map = _read_index(directory)
    tensors: dict[str, StoredTensor] = {}
    for shard in dict.fromkeys(weight_map.values()):
        for key, tensor in read_header(directory / shard).items():
            if key in tensors:
                raise ValueError(
                    f"{directory}: {key} is both in {tensors[key].file.path.name} and in {shard}"
                )
            tensors[key] = tensor
    if absent := sorted(key for key in weight_map if key not in tensors):
        raise ValueError(
            f"{directory / INDEX_FILE} names {len(absent)} tensors that its shards do not hold: "
            f"{', '.join(absent)}"
        )
    return tensors


def _read_index(directory: Path) -> dict[str, str]:
    """Key → shard, every shard checked to be a file inside of the directory."""
    index = directory / INDEX_FILE
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        valid = all(isinstance(shard, str) for shard in weight_map.values())
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise ValueError(f"{index} is corrupt: it must be a JSON object with a weight_map of file names")
    shards = dict.fromkeys(weight_map.values())
    # By name only: in the hub's cache the files themselves are links to elsewhere.
    if outside := [shard for shard in shards if _leaves_directory(shard)]:
        raise ValueError(
            f"{index} points outside of its directory: {', '.join(outside)}; "
            "a checkpoint's shards must lie beside its index"
        )
    if missing := [shard for shard in shards if not (directory / shard).is_file()]:
        raise FileNotFoundError(
            f"{directory} lacks {len(missing)} of {len(shards)} shards that {INDEX_FILE} names: "
            f"{', '.join(missing)}; download it again"
        )
    return weight_map


def _leaves_directory(shard: str) -> bool:
    paths = (PurePosixPath(shard), PureWindowsPath(shard))
    return any(path.is_absolute() or path.drive or ".." in path.parts for path in paths) or not shard


def _corrupt(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is truncated or corrupt: {reason}; download it again")
