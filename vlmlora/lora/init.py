"""How an adapter starts, as in PEFT's ``LoraLayer.reset_lora_parameters``."""

import zlib

import jax
import numpy as np
from jaxtyping import Float32, PRNGKeyArray


def module_salt(name: str) -> int:
    """A number for a module that depends on its name alone."""
    return zlib.crc32(name.encode())


def init_lora(
    key: PRNGKeyArray, name: str, *, in_features: int, out_features: int, r: int, method: bool | str = True
) -> tuple[Float32[np.ndarray, "r in"], Float32[np.ndarray, "out r"]]:
    """A and B of a module.

    The draw depends on `key` and the module's name only, not on which other modules are adapted. It is made
    on the host, where there is nothing to compile for each shape.

    Args:
        key: the run's key.
        name: Hugging Face name of the module.
        in_features: size of its input.
        out_features: size of its output.
        r: rank.
        method: True: A is U(−1/√in, 1/√in), which is Kaiming-uniform with a = √5, and B zero. ``"gaussian"``:
            A is normal with standard deviation 1/r, and B zero. False: A as with True and B U(−1/√r, 1/√r),
            so the adapter changes the model from the start. ``"orthogonal"``: A and B are random, but the
            rows of A and the columns of B span orthogonal subspaces, so that B A is zero
            (https://datta0.github.io/posts/rethink-lora-init/). ``"eva"``: as True, until
            `vlmlora.lora.eva.initialize_lora_eva_weights` has seen data.

    Raises:
        ValueError: another method.
    """
    if method not in (True, False, "gaussian", "orthogonal", "eva"):
        raise ValueError(f"init_lora_weights={method!r} is no start that a module's shape alone decides")
    generator = np.random.default_rng([*np.asarray(jax.random.key_data(key)).tolist(), module_salt(name)])
    if method == "orthogonal":
        return _orthogonal(generator, in_features, out_features, r)
    if method == "gaussian":
        lora_A = generator.standard_normal((r, in_features), np.float32) / r
    else:
        lora_A = _uniform(generator, (r, in_features), bound=in_features**-0.5)
    if method is False:
        return lora_A, _uniform(generator, (out_features, r), bound=r**-0.5)
    return lora_A, np.zeros((out_features, r), np.float32)


def init_bias(key: PRNGKeyArray, name: str, *, out_features: int, r: int) -> Float32[np.ndarray, " out"]:
    """The adapter's bias where `init_lora` starts B as a linear layer starts: U(−1/√r, 1/√r) too."""
    seed = [*np.asarray(jax.random.key_data(key)).tolist(), module_salt(f"{name}.lora_bias")]
    return _uniform(np.random.default_rng(seed), (1, out_features), bound=r**-0.5)[0]


def _orthogonal(
    generator: np.random.Generator, in_features: int, out_features: int, r: int
) -> tuple[Float32[np.ndarray, "r in"], Float32[np.ndarray, "out r"]]:
    """PEFT's: A from the even rows and B from the odd rows of a random orthogonal matrix; `r` is even."""

    def normal(*shape: int) -> Float32[np.ndarray, "rows columns"]:
        return generator.standard_normal(shape, np.float32)

    basis = np.linalg.qr(normal(r, r))[0]
    lora_A, lora_B = basis[0::2].T @ normal(r // 2, in_features), normal(out_features, r // 2) @ basis[1::2]
    return lora_A / np.float32(10), lora_B / np.float32(10)


def _uniform(
    generator: np.random.Generator, shape: tuple[int, ...], *, bound: float
) -> Float32[np.ndarray, "rows columns"]:
    return generator.random(shape, np.float32) * np.float32(2 * bound) - np.float32(bound)
