"""Exact match of what a model reads in rendered pictures."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree
from tokenizers import Tokenizer

from bundled_model.batches import BatchTables, assemble, host_fields
from vlmlora.demo.printed_text import MAX_LENGTH
from vlmlora.generation.greedy import greedy_decode


def readings(
    graphdef: nnx.GraphDef,
    state: PyTree,
    tables: BatchTables,
    records: np.ndarray,
    *,
    end: int,
    batch_size: int,
) -> Iterator[tuple[list[int], list[int]]]:
    """What the model reads in each sample and what is there, as token ids.

    Args:
        graphdef: Structure of the model.
        state: All of its parameters.
        tables: From `bundled_model.batches.make_tables`.
        records: Samples, as an array of `bundled_model.pool.RECORD`.
        end: Token that ends a turn.
        batch_size: Samples read at once.
    """
    prompts = jax.jit(assemble, static_argnames="answers")
    for start in range(0, len(records), batch_size):
        chunk = records[start : start + batch_size]
        # The last batch is filled up by repetition, so that there is one shape.
        padded = chunk[np.arange(batch_size) % len(chunk)]
        batch = prompts(tables, jax.tree.map(jnp.asarray, host_fields(padded)), answers=False)
        tokens = greedy_decode(
            graphdef,
            state,
            batch,
            max_new_tokens=MAX_LENGTH + 2,
            eos_token_ids=(end,),
            pad_token_id=int(tables.pad),
        )
        for row, record in zip(np.asarray(tokens).tolist(), chunk, strict=False):
            read = row[: row.index(end)] if end in row else row
            yield read, record["answer"][: record["answer_length"]].tolist()


def exact_match(
    graphdef: nnx.GraphDef,
    state: PyTree,
    tables: BatchTables,
    records: np.ndarray,
    tokenizer: Tokenizer,
    *,
    batch_size: int = 250,
) -> tuple[float, list[tuple[str, str]]]:
    """Share of samples that are read without a mistake, and the (truth, reading) of the others."""
    end = tokenizer.token_to_id("<|im_end|>")
    pairs = readings(graphdef, state, tables, records, end=end, batch_size=min(batch_size, len(records)))
    wrong = [
        (tokenizer.decode(truth), tokenizer.decode(read, skip_special_tokens=False))
        for read, truth in pairs
        if read != truth
    ]
    return 1 - len(wrong) / len(records), wrong
