"""Kernels for quantised weights: arrays in, arrays out, no model code."""

from vlmlora_kernels.dispatch import Choice, explain
from vlmlora_kernels.in_place import elementwise_in_place
from vlmlora_kernels.int8 import dequantize_int8, matmul_int8, quantize_int8
from vlmlora_kernels.low_rank import LowRankGradients, low_rank_gradients
from vlmlora_kernels.nf4 import (
    CODE_BOOKS,
    DYNAMIC_CODE,
    NESTED_BLOCKSIZE,
    NestedAbsmax,
    Placed,
    dequantize_4bit,
    double_dequantize,
    double_quantize,
    in_lines,
    matmul_4bit,
    quantize_4bit,
)
from vlmlora_kernels.norm import layer_norm, layer_norm_gradient, rms_norm, rms_norm_gradient

__all__ = [
    "CODE_BOOKS",
    "DYNAMIC_CODE",
    "NESTED_BLOCKSIZE",
    "Choice",
    "LowRankGradients",
    "NestedAbsmax",
    "Placed",
    "dequantize_4bit",
    "dequantize_int8",
    "double_dequantize",
    "double_quantize",
    "elementwise_in_place",
    "explain",
    "in_lines",
    "layer_norm",
    "layer_norm_gradient",
    "low_rank_gradients",
    "matmul_4bit",
    "matmul_int8",
    "quantize_4bit",
    "quantize_int8",
    "rms_norm",
    "rms_norm_gradient",
]
