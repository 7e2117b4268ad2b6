"""Run a kernel of `vlmlora_kernels.hopper` on the CPU, all threads of a block at once, with every access
checked.

It has the names of `vlmlora_kernels.hopper.simt`; a value is an array with one element a thread. Threads
run in step, so a barrier has nothing to do; the blocks of a cluster do too. A load or store outside an array,
or misaligned, is an error. An asynchronous copy arrives no sooner than it is waited for.
"""

import contextlib

import ml_dtypes
import numpy as np

_state: dict = {}


def _active():
    return _state["masks"][-1]


def _array(value):
    return np.broadcast_to(np.asarray(value, np.uint32), (_state["threads"],))


class Word:
    def __init__(self, value):
        self.value = _array(getattr(value, "value", value))

    def __add__(self, other):
        return Word(self.value + Word(other).value)

    def __sub__(self, other):
        return Word(self.value - Word(other).value)

    def __mul__(self, other):
        return Word(self.value * Word(other).value)

    def __floordiv__(self, other):
        return Word(self.value // Word(other).value)

    def __mod__(self, other):
        return Word(self.value % Word(other).value)

    def __and__(self, other):
        return Word(self.value & Word(other).value)

    def __or__(self, other):
        return Word(self.value | Word(other).value)

    def __xor__(self, other):
        return Word(self.value ^ Word(other).value)

    def __lshift__(self, other):
        return Word(self.value << Word(other).value)

    def __rshift__(self, other):
        return Word(self.value >> Word(other).value)

    def __lt__(self, other):
        return self.value < Word(other).value

    def equals(self, other):
        return self.value == Word(other).value

    def min(self, other):
        return Word(np.minimum(self.value, Word(other).value))

    def max(self, other):
        return Word(np.maximum(self.value, Word(other).value))

    __radd__, __rmul__ = __add__, __mul__


class Pointer:
    """Offsets into a memory [blocks of a cluster, bytes], of which a thread sees one row."""

    def __init__(self, memory, start=0, row=0):
        self.memory, self.start, self.row = memory, start, row

    def shifted(self, offset):
        start = self.start + np.asarray(getattr(offset, "value", offset), np.int64)
        return Pointer(self.memory, start, self.row)

    def indices(self, offset, size):
        """Rows and bytes of the active threads, checked."""
        at = np.broadcast_to(self.shifted(offset).start, (_state["threads"],))[_active()]
        bytes_ = self.memory.shape[1]
        if at.size and (at.min() < 0 or at.max() + size > bytes_ or (at % size).any()):
            raise IndexError(f"{size} bytes at {at.min()}..{at.max()} of an array of {bytes_}")
        row = np.broadcast_to(self.row, (_state["threads"],))[_active()]
        return row[:, None], at[:, None] + np.arange(size)


def _load(pointer, offset, size, dtype):
    values = np.zeros((_state["threads"], size), np.uint8)
    values[_active()] = pointer.memory[pointer.indices(offset, size)]
    return values.view(dtype)


def _store(pointer, offset, values):
    values = np.ascontiguousarray(values).view(np.uint8).reshape(_state["threads"], -1)
    pointer.memory[pointer.indices(offset, values.shape[1])] = values[_active()]


def load_words(pointer, offset, count, *, once=False):
    return [Word(column) for column in _load(pointer, offset, 4 * count, np.uint32).T]


def load_shared(pointer, offset):
    return load_words(pointer, offset, 1)[0]


def load_float(pointer, offset):
    return _load(pointer, offset, 4, np.float32)[:, 0]


load_shared_float = load_float


load_constant = load_written = load_words


def load_transposed(pointer, offset):
    rows = _load(pointer, offset, 16, np.uint16).reshape(-1, 4, 8, 8)  # warp, matrix, row, column
    lane_ = np.arange(32)
    words = np.ascontiguousarray(rows.transpose(0, 1, 3, 2)).view(np.uint32)  # warp, matrix, column, pair
    return [Word(words[:, m, lane_ // 4, lane_ % 4].reshape(-1)) for m in range(4)]


def load_byte(pointer, offset):
    return Word(_load(pointer, offset, 1, np.uint8)[:, 0])


def store_words(pointer, offset, words):
    _store(pointer, offset, np.stack([word.value for word in words], 1))


def store_float(pointer, offset, value):
    _store(pointer, offset, np.broadcast_to(np.float32(value), (_state["threads"],)))


def store_bfloat16(pointer, offset, value):
    _store(pointer, offset, value.astype(ml_dtypes.bfloat16).view(np.uint16))


def constant(value):
    return np.full(_state["threads"], value, np.float32)


def multiply(a, b):
    return a * b


def add(a, b):
    return a + b


def fma(a, b, c):
    return (a.astype(np.float64) * b + c).astype(np.float32)


def as_float(word):
    return (
        word.value.view(np.float32) if word.value.flags.c_contiguous else word.value.copy().view(np.float32)
    )


def as_word(value):
    return Word(np.ascontiguousarray(value).view(np.uint32))


def pack_bfloat16(low, high):
    low, high = (v.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32) for v in (low, high))
    return Word(low | high << np.uint32(16))


def select(condition, a, b):
    if isinstance(a, Word):
        return Word(np.where(condition, a.value, b.value))
    return np.where(condition, a, b)


def both(a, b):
    return a & b


def permute(low, high, selector):
    pool = np.stack([low.value, high.value], 1).view(np.uint8)
    threads, selector = np.arange(len(pool)), Word(selector).value
    return Word(
        sum(
            pool[threads, selector >> np.uint32(4 * i) & 7].astype(np.uint32) << np.uint32(8 * i)
            for i in range(4)
        )
    )


def shuffle(value, lane_):
    return Word(value.value.reshape(-1, 32)[np.arange(_state["threads"]) // 32, lane_.value])


def hidden(word):
    return word


def shuffle_xor(value, mask):
    return shuffle(value, lane() ^ mask)


def mma(a, b, accumulator):
    lane_ = np.arange(32)
    group, quarter = lane_ // 4, lane_ % 4

    def halves(word):
        return np.ascontiguousarray(word.value).view(ml_dtypes.bfloat16).reshape(-1, 32, 2).astype(np.float32)

    warps = _state["threads"] // 32
    left, right = np.zeros((warps, 16, 16), np.float32), np.zeros((warps, 16, 8), np.float32)
    for i, word in enumerate(a):
        for half in range(2):
            left[:, group + 8 * (i % 2), 2 * quarter + half + 8 * (i // 2)] = halves(word)[..., half]
    for i, word in enumerate(b):
        for half in range(2):
            right[:, 2 * quarter + half + 8 * i, group] = halves(word)[..., half]
    product = left @ right
    return [
        accumulator[k] + product[:, group + 8 * (k // 2), 2 * quarter + k % 2].reshape(-1) for k in range(4)
    ]


def thread():
    return Word(np.arange(_state["threads"]) % _state["block_threads"])


def lane():
    return Word(np.arange(_state["threads"]) % 32)


def warp():
    return thread() >> 5


def block():
    return Word(_state["block"])


cluster = block


def cluster_rank():
    return Word(np.arange(_state["threads"]) // _state["block_threads"])


def barrier():
    pass


def barrier_of(threads):
    assert threads == _state["threads"]


cluster_barrier = barrier


def barrier_among(number, threads):
    """The warps that meet, checked: as many active ones of each block and number as are waited for."""
    meeting = np.stack([cluster_rank().value, number.value])[:, _active()]
    counts = np.unique(meeting, axis=1, return_counts=True)[1]
    if number.value.max() > 15 or (counts != threads).any():
        raise RuntimeError(f"{threads} threads are to meet, and {counts} do")


def load_peer_float(pointer, offset, rank):
    return load_float(Pointer(pointer.memory, pointer.start, rank), offset)


def load_peer_words(pointer, offset, rank):
    return load_words(Pointer(pointer.memory, pointer.start, rank.value), offset, 4)


def copy_async(target, at, source, offset):
    data = source.memory[source.indices(offset, 16)]
    _state["copies"][-1].append((target.memory, target.indices(at, 16), data))


def commit_copies():
    _state["copies"].append([])


def wait_copies(pending):
    groups = _state["copies"]
    # The last group is the one that is still open.
    while len(groups) > pending + 1:
        for memory, indices, data in groups.pop(0):
            memory[indices] = data


@contextlib.contextmanager
def when(condition):
    _state["masks"].append(_active() & condition)
    yield
    _state["masks"].pop()


def branch(condition, values, body):
    with when(condition):
        return [np.where(condition, new, old) for new, old in zip(body(), values, strict=True)]


def loop(count, carry, body):
    for i in range(int(count.value[_active()].max(initial=0))):
        runs = i < count.value
        with when(runs):
            carry = [np.where(runs, new, old) for new, old in zip(body(Word(i), carry), carry, strict=True)]
    return carry


def loop_while(carry, condition, body):
    while (runs := condition(carry) & _active()).any():
        with when(runs):
            carry = [np.where(runs, new, old) for new, old in zip(body(carry), carry, strict=True)]
    return carry


def _first_lanes():
    return np.flatnonzero(_active() & (lane().value == 0))


def take(pointer):
    numbers = np.zeros(_state["threads"], np.uint32)
    _, at = pointer.indices(0, 4)
    for thread_ in _first_lanes():
        number = pointer.memory[0, at[0]].view(np.uint32)
        numbers[thread_] = number[0]
        pointer.memory[0, at[0]] = (number + 1).view(np.uint8)
    return Word(numbers)


def count_up(pointers):
    for first in _first_lanes():
        with when(np.arange(_state["threads"]) == first):
            for pointer in pointers:
                store_words(pointer, 0, [load_words(pointer, 0, 1)[0] + 1])


def fill(target, source, count, thread_, threads):
    for first in range(0, count // 4, threads):
        index = thread_ + first
        with when(index < count // 4):
            store_words(target, index << 4, load_words(source, index << 4, 4))


def run(kernel, *inputs):
    """The result of `kernel` on numpy arrays; every element of the result must have been written."""
    import sys

    def memory(array):
        return np.ascontiguousarray(array).reshape(1, -1).view(np.uint8)

    size = int(np.prod(kernel.shape))
    out = np.full(size * np.dtype(kernel.dtype).itemsize, 0xFF, np.uint8).view(kernel.dtype)  # NaN
    pointers = [Pointer(memory(array)) for array in inputs]
    block_threads = 32 * kernel.warps
    threads = block_threads * kernel.cluster
    with np.errstate(over="ignore", invalid="ignore"):
        for index in range(kernel.grid):
            _state.update(
                threads=threads,
                block_threads=block_threads,
                block=index,
                masks=[np.ones(threads, bool)],
                copies=[[]],
            )
            scratch = [
                Pointer(
                    np.full((kernel.cluster, words), np.nan, np.float32).view(np.uint8),
                    row=cluster_rank().value,
                )
                for words in kernel.scratch
            ]
            kernel.body(sys.modules[__name__], pointers, Pointer(memory(out)), scratch)
    return out.reshape(kernel.shape)
