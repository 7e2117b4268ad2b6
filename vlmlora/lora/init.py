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
            so the adapter changes the model from the start.

    Raises:
        ValueError: another method.
    """
    if method not in (True, False, "gaussian"):
        raise ValueError(f"init_lora_weights={method!r}: it must be True, False or 'gaussian'")
    generator = np.random.default_rng([*np.asarray(jax.random.key_data(key)).tolist(), module_salt(name)])
    if method == "gaussian":
        lora_A = generator.standard_normal((r, in_features), np.float32) / r
    else:
        lora_A = _uniform(generator, (r, in_features), bound=in_features**-0.5)
    if method is False:
        return lora_A, _uniform(generator, (out_features, r), bound=r**-0.5)
    return lora_A, np.zeros((out_features, r), np.float32)


def _uniform(
    generator: np.random.Generator, shape: tuple[int, ...], *, bound: float
) -> Float32[np.ndarray, "rows columns"]:
    return generator.random(shape, np.float32) * np.float32(2 * bound) - np.float32(bound)
