"""Reading a profiler trace: of this device, and one written by hand as a GPU's streams look."""

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from benchmarks.trace import Event, Instruction, kind_of, read_events, read_program, summarize, trace_steps

GPU_TRACE = """
planes {
  name: "/device:GPU:0"
  lines { id: 1 name: "Stream #7(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 4000000000
      stats { metadata_id: 1 str_value: "custom-call.3" } }
    events { metadata_id: 2 offset_ps: 5000000000 duration_ps: 1000000000
      stats { metadata_id: 1 str_value: "loop_convert_fusion.2" } } }
  lines { id: 2 name: "Stream #8(MemcpyD2H)" timestamp_ns: 1000
    events { metadata_id: 3 offset_ps: 3000000000 duration_ps: 2000000000 } }
  lines { id: 3 name: "XLA Modules" timestamp_ns: 1000
    events { metadata_id: 2 offset_ps: 0 duration_ps: 9000000000 } }
  event_metadata { key: 1 value { id: 1 name: "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT" } }
  event_metadata { key: 2 value { id: 2 name: "loop_convert_fusion" } }
  event_metadata { key: 3 value { id: 3 name: "MemcpyD2H" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
}
"""


def test_gpu_streams_are_summed_and_overlaps_told_apart():
    events = list(read_events(ProfileData.from_serialized_xspace(_serialized(GPU_TRACE))))
    assert len(events) == 3
    summary = summarize(events, 1, {})
    assert summary.step == pytest.approx(6)
    assert summary.idle == pytest.approx(0)
    found = {kind: (row["ms"], row["exposed_ms"]) for kind, row in summary.kinds.items()}
    assert found == {
        "gemm": pytest.approx((4, 3)),
        "copy D2H": pytest.approx((2, 1)),
        "elementwise, reduction": pytest.approx((1, 1)),
    }


def test_idle_time_and_steps():
    events = [Event("GPU", "gemm", "", 0, 1e6), Event("GPU", "gemm", "", 3e6, 4e6)]
    summary = summarize(events, 2, {})
    assert (summary.step, summary.idle) == pytest.approx((2, 1))
    assert summary.top[0]["count"] == 1
    assert "gemm" in summary.table()
    with pytest.raises(ValueError, match="no kernel"):
        summarize([], 2, {})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("MemcpyH2D", "copy H2D"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "collective"),
        ("mosaic_gpu_nf4_dequantize_kernel", "decode"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "gemm"),
        ("gemm_fusion_dot_12", "gemm"),
        ("input_transpose_fusion_3", "slice, update"),
        ("loop_dynamic_update_slice_fusion", "slice, update"),
        ("loop_convert_fusion", "elementwise, reduction"),
        ("input_add_reduce_fusion", "elementwise, reduction"),
    ],
)
def test_kernels_are_known_by_name(name, kind):
    assert kind_of(Event("GPU", name, "", 0, 1), {}) == kind


def test_kernels_are_known_by_their_instruction():
    program = {"custom-call.1": Instruction("mosaic_gpu_v2 jit(f)/nf4_dequantize", "forward", "vision", "")}
    assert kind_of(Event("GPU", "kernel", "custom-call.1", 0, 1), program) == "decode"


def test_traced_program_says_what_came_from_where():
    @jax.jit
    def loss_gradient(w, x):
        return jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w) + 1

    w = x = jnp.ones((256, 256))
    program = read_program(loss_gradient.lower(w, x).compile().as_text())
    assert {"forward", "backward"} <= {instruction.phase for instruction in program.values()}
    jax.block_until_ready(loss_gradient(w, x))
    events = trace_steps(lambda: [loss_gradient(w, x) for _ in range(3)])
    assert {event.op for event in events} <= set(program)
    summary = summarize(events, 3, program)
    assert min(summary.phases["forward"], summary.phases["backward"]) > 0
    assert sum(summary.phases.values()) == pytest.approx(sum(k["ms"] for k in summary.kinds.values()))


def _serialized(text: str) -> bytes:
    return ProfileData.text_proto_to_serialized_xspace(text)
