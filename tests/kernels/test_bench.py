"""The kernels' benchmark without a GPU: what it would run, and what it makes of a profiler's answers."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import emulator
from vlmlora_kernels import bench, dequantize_4bit, dequantize_int8
from vlmlora_kernels.hopper import tuning

SHAPE = (40, 256)


def test_the_evicting_kernel_reads_every_word():
    words = np.random.default_rng(0).integers(0, 2**31, 2 * 256 * 4 * 4 * 3, np.int32)
    kernel = bench.read_all(words.nbytes, blocks=2)
    assert np.bitwise_xor.reduce(emulator.run(kernel, words)) == np.bitwise_xor.reduce(words)


@pytest.mark.parametrize("tokens", [None, 3, 512])
def test_operations_are_what_their_names_say(tokens):
    operands = jax.tree.map(jnp.asarray, bench.random_operands(SHAPE, tokens))
    codes, scales = operands["codes"], operands["scales"]
    decoded = dequantize_4bit(codes, scales, shape=SHAPE, dtype=jnp.float32)
    weights = {
        "nf4": decoded,
        "xla": decoded,
        "int8": dequantize_int8(operands["values"], operands["scale"], dtype=jnp.float32),
        "bf16": operands["dense"].astype(jnp.float32),
    }
    found = bench.operations(SHAPE, tokens)
    assert {(o.what, o.who) for o in found} >= (
        {("decode", "nf4")} if tokens is None else {("x @ W.T", "nf4")}
    )
    assert any(o.what == "dy @ W" for o in found) == (tokens == 512)
    for operation in found:
        weight = np.asarray(weights[operation.who], np.float64)
        result = operation.run(*[operands[name] for name in operation.operands])
        expected = {
            "decode": lambda weight=weight: weight,
            "x @ W.T": lambda weight=weight: np.asarray(operands["x"], np.float64) @ weight.T,
            "dy @ W": lambda weight=weight: np.asarray(operands["dy"], np.float64) @ weight,
        }[operation.what]()
        error = np.linalg.norm(np.asarray(result, np.float64) - expected) / np.linalg.norm(expected)
        assert error < 5e-3, operation  # W and the result are rounded to bfloat16


def test_each_operation_follows_an_eviction():
    found = bench.operations((64, 256), 16)
    operands = [jax.tree.map(jnp.asarray, o) for o in bench.random_operands((64, 256), 16).values()]
    names = list(bench.random_operands((64, 256), 16))
    functions = [lambda *a, o=o: o.run(*[a[names.index(name)] for name in o.operands]) for o in found]
    buffer = jax.ShapeDtypeStruct((bench._EVICTED_BYTES // 4,), jnp.int32)
    traced = jax.jit(bench.in_turn(functions)).trace(buffer, operands)
    parts: list[list[str]] = [[]]
    for equation in traced.jaxpr.eqns:
        if equation.primitive.name == "optimization_barrier":
            parts.append([])
        else:
            parts[-1].append(equation.primitive.name)
    assert len(parts) == 2 * len(found) + 1
    assert all(part == parts[0] and len(part) == 1 for part in parts[0:-1:2]), "one that reads the buffer"
    assert all(parts[1::2]), "an operation"


def test_kernels_are_added_up_between_evictions(monkeypatch):
    runs = [
        [
            ("evict_cache_kernel", 9.0),
            ("a", 0.001 * i),
            ("b", 0.002),
            ("evict_cache_kernel", 9.0),
            ("c", 0.005),
        ]
        for i in (1, 2, 30)
    ]
    monkeypatch.setattr(bench.profiler, "measure", lambda *_, **__: lambda *_: (None, runs))
    assert bench.times_us(None, jnp.zeros(1), None, 2) == pytest.approx([4.0, 5.0])
    with pytest.raises(RuntimeError, match="3 operations were to run, and the profiler saw 2"):
        bench.times_us(None, jnp.zeros(1), None, 3)


def test_the_table_and_the_file(tmp_path):
    name = {"shape": [512, 3584], "tokens": 4, "what": "x @ W.T"}
    rows = [
        name | {"who": "nf4", "us": 5.0, "of_roofline": 0.25},
        name | {"who": "bf16", "us": 12.0, "of_roofline": 0.5},
        name | {"who": "torch_bf16", "us": 11.0},
        {"shape": [512, 3584], "tokens": 1, "error": "no"},
    ]
    line = bench.table(rows).splitlines()[-1]
    assert line.split() == ["512x3584", "x", "@", "W.T", "4", "5.0", "25%", "2.20", "12.0", "11.0"]
    bench.save(tmp_path / "out.json", {"device": "none", "rows": rows})
    text = (tmp_path / "out.json").read_text()
    assert json.loads(text) == {"device": "none", "rows": rows}
    assert sum('"us"' in line for line in text.splitlines()) == 3


def test_the_sweep_prints_the_table_of_the_fastest(monkeypatch):
    shapes = [(512, 512), (96, 1024)]
    wanted = next(row for row in bench.candidates(64, tuning.ROWS[0]) if row.warps == 16 and row.unit == 4)
    best = {tuning.cut(wanted, 64, shape) for shape in shapes}

    def programs(jobs):
        # The other tilings are as fast as each other.
        return {key: 1.0 if key[3] in best else 2.0 for key, _ in jobs}

    monkeypatch.setattr(bench, "compile_all", programs)
    monkeypatch.setattr(bench, "times_us", lambda program, *_: [program])
    rows, text = bench.sweep(shapes, {})
    assert {row["us"] for row in rows} == {1.0, 2.0}
    scope: dict = {}
    exec(text, {"FewTokens": tuning.FewTokens}, scope)
    table = scope["FEW_TOKENS"]
    found = {kind: [(row.tokens, row.rows) for row in rows] for kind, rows in table.items()}
    expected = [(tokens, tuning.ROWS[0]) for tokens in (4, 16, 32, 64)]
    assert found == dict.fromkeys(tuning.FEW_TOKENS, expected)
    assert {tuning.cut(table["nf4"][-1], 64, shape) for shape in shapes} == best


def test_the_sweep_of_many_tokens_stops_where_decoding_is_faster_and_sees_wrong_results(monkeypatch, capsys):
    counts = [128, 256, 512]
    tried = {count: [row for row in bench.many_candidates(count) if not row.halved] for count in counts}
    fastest = {count: tried[count][1] for count in counts}
    wrong = {count: tried[count][2] for count in counts}

    def programs(jobs):
        def program(count):
            values = [
                1.0,
                1.0,
                1.0,
                *(2.0 if row == wrong[count] else 1.0 for row in tried[count]),
            ]
            return lambda *_: [(None, jnp.full((2, 2), value)) for value in values]

        programs = {key: program(key[1]) for key, _ in jobs}
        counts_of.update({id(made): key[1] for key, made in programs.items()})
        return programs

    def times(program, *_):
        count = counts_of[id(program)]
        speed = {fastest[count]: 4.0, wrong[count]: 1.0}
        slow = 3.0 if count == 512 else 1.0
        return [5.0, 60.0, 6.0, *(slow * speed.get(row, 5.0) for row in tried[count])]

    counts_of: dict = {}
    monkeypatch.setattr(bench, "compile_all", programs)
    monkeypatch.setattr(bench, "times_us", times)
    kept = []
    rows, text = bench.sweep_many([(96, 256)], counts, {}, keep=lambda rows: kept.append(len(rows)))
    # Both ways, cuBLAS alone, after decoding, and decoding meanwhile.
    assert kept == list(itertools.accumulate(2 * (3 + len(tried[count])) for count in counts))
    scope: dict = {}
    exec(text, {"ManyTokens": tuning.ManyTokens}, scope)
    # In pairs whatever the length, of which 96 is the shortest.
    expected = tuple(dataclasses.replace(fastest[count], elements=2**14, paired=2**6) for count in (128, 256))
    assert scope["MANY_TOKENS"] == expected, "neither the wrong one nor the slow ones"
    printed = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert len(printed) == 6
    assert {row["who"] for row in rows} == {"bf16", "decode", "overlapped", "fused"}


def test_the_sweep_of_many_tokens_has_blocks_share_tiles_where_that_is_faster(monkeypatch):
    shapes = [(4096, 4096), (8192, 4096)]

    def programs(jobs):
        def program(shape, count, transposed):
            rows = [row for row in bench.many_candidates(count) if row.takes(count, shape, transposed)]
            us = [5.0, 6.0, 6.0, *(3.0 if row.halved and row.width == 128 else 4.0 for row in rows)]
            return lambda *_: us if _ == () else [(None, jnp.ones((2, 2)))] * len(us)

        return {key: program(*key) for key, _ in jobs}

    monkeypatch.setattr(bench, "compile_all", programs)
    monkeypatch.setattr(bench, "times_us", lambda program, *_: program())
    monkeypatch.setattr(
        bench, "random_operands", lambda *_: dict.fromkeys(("x", "dy", "codes", "scales", "dense"), 0)
    )
    _, text = bench.sweep_many(shapes, [256, 512], {})
    scope: dict = {}
    exec(text, {"ManyTokens": tuning.ManyTokens}, scope)
    first, *others = scope["MANY_TOKENS"]
    # With 512 tokens, of 256 a tile, such rows are as fast as others.
    assert first == tuning.ManyTokens(256, width=128, stages=6, halved=True, elements=2**24)
    assert not any(row.halved for row in others)


# Without the one whose blocks straddle rows, which is decoded instead.
@pytest.mark.parametrize(
    "shape",
    sorted(
        {s for group in (bench.LANGUAGE, bench.VISION) for m in group.values() for s in m if s[1] % 64 == 0}
    ),
)
def test_every_tile_fits_a_block_and_a_wave(shape):
    for tokens in (1, 4, 5, 16, 17, 32, 33, 64):
        known = tuning.few_tokens_row(tokens, shape[0], "nf4")
        rows = bench.candidates(known.tokens, known.rows)
        for row in rows:
            cut = tuning.cut(row, tokens, shape)
            assert cut.columns <= shape[1]
            assert cut.warps <= 32
            assert cut.splits < 16, "named barriers"
            assert cut.shared_words(tokens) + 33 * 256 <= tuning.SHARED_WORDS
            assert -(-shape[0] // cut.rows) * cut.cluster <= tuning.MULTIPROCESSORS


@settings(max_examples=50, deadline=None)
@given(out=st.integers(1, 200_000), pieces=st.integers(4, 900), tokens=st.integers(1, tuning.FUSED_TOKENS))
def test_a_tile_for_any_shape(out, pieces, tokens):
    for kind in tuning.FEW_TOKENS:
        cut = tuning.matvec_tuning(tokens, (out, 64 * pieces), kind)
        assert cut.columns <= 64 * pieces
        assert cut.shared_words(tokens) + 33 * 256 <= tuning.SHARED_WORDS
        assert cut.warps <= 32


def test_the_command_measures_all_and_goes_on_after_a_failure(monkeypatch, tmp_path, capsys):
    def programs(jobs):
        return {key: ValueError("too large") if key[1] == 16 else key for key, _ in jobs}

    limits = {"memory TB/s": 3.0, "bf16 TFLOP/s": 700.0}
    monkeypatch.setattr(bench.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(bench, "LANGUAGE", {"Qwen2.5-VL-7B": [(64, 256)]})
    monkeypatch.setattr(bench, "ceilings", lambda options: limits)
    monkeypatch.setattr(bench, "compile_all", programs)
    monkeypatch.setattr(bench, "times_us", lambda program, buffer, operands, count, runs: [2.0] * count)
    monkeypatch.setattr(bench, "peers", lambda shapes, tokens: [])
    out = tmp_path / "bench.json"
    monkeypatch.setattr("sys.argv", ["bench", "--quick", "--tokens", "1", "16", "512", "--out", str(out)])
    bench.main()
    result = json.loads(out.read_text())
    assert result["command"] == "python -m vlmlora_kernels.bench --quick --tokens 1 16 512"
    rows = result["rows"]
    assert [row for row in rows if "error" in row] == [
        {"shape": [64, 256], "tokens": 16, "error": "too large"}
    ]
    assert {(row["tokens"], row["what"]) for row in rows if "us" in row} == {
        (None, "decode"),
        (1, "x @ W.T"),
        (512, "x @ W.T"),
        (512, "dy @ W"),
    }
    one = next(row for row in rows if row["tokens"] == 1 and row["who"] == "nf4")
    moved = 64 * 256 // 2 + 64 * 256 // 64 + 2 * (64 + 256)
    assert one["of_roofline"] == pytest.approx(moved / 3.0e6 / 2.0, abs=1e-3)
    assert "64x256 x @ W.T" in capsys.readouterr().out
