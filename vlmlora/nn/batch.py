"""What a batch holds beside the model's inputs."""

from collections.abc import Mapping

import jax


def model_inputs(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The entries of a batch that the model reads.

    ``labels`` are the loss's. ``attention_mask`` [batch, tokens] tells tokens from padding for generation;
    the model needs none, since rows are padded on the right, where causal attention never looks. Rows that
    hold several samples come with ``segment_ids``, which the model does read.
    """
    return {name: array for name, array in batch.items() if name not in ("labels", "attention_mask")}
