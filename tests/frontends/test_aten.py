"""Every operator the frontend converts, against eager: bit for bit by `torch_eval`, and numerically by TVM."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tvm
from tvm import relax

import bnncc
import bnncc.dialect.kernels  # lets TVM's own pipeline compile the dialect
from bnncc.dialect.torch_eval import evaluate_function
from bnncc.frontends.torch import export_model, operator_name, supported_operators, to_relax

aten = torch.ops.aten

SPECIAL = torch.tensor(
    [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        -0.5,
        1.5,
        2.5,
        -2.5,
        1e-40,
        -1e-40,
        3e38,
        -3e38,
        math.inf,
        -math.inf,
        math.nan,
        1e-9,
        7,
    ]
).reshape(2, 9)
FLOAT = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)) * 3
POSITIVE = FLOAT.abs() + 0.1
BOOL = FLOAT > 0
INT = torch.tensor([[3, -2, 0, 7], [1, -9, 4, -1]])
IMAGE = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(1))
SEQUENCE = IMAGE[..., 0].contiguous()
VOLUME = torch.randn(1, 4, 5, 6, 7, generator=torch.Generator().manual_seed(2))
VECTOR = torch.randn(4, generator=torch.Generator().manual_seed(3))


def weight(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


# operator: (function, inputs), …; the function must export to a graph that has the operator.
CASES = {
    "_adaptive_avg_pool2d.default": [(lambda x: F.adaptive_avg_pool2d(x, (4, 3)), IMAGE)],
    "_assert_tensor_metadata.default": [(lambda x: x.to(torch.int32), FLOAT)],
    "_log_softmax.default": [(lambda x: F.log_softmax(x, -1), FLOAT)],
    "_native_batch_norm_legit_no_training.default": [
        (lambda x, w: F.batch_norm(x, w, w.abs() + 0.1, w, w + 1), IMAGE, VECTOR),
        (lambda x, w: F.batch_norm(x, w, w.abs() + 0.1, eps=1e-3), IMAGE, VECTOR),
        (lambda x, w: F.batch_norm(x, w, w.abs() + 0.1, w, None), SEQUENCE, VECTOR),
        (lambda x, w: F.batch_norm(x.transpose(2, 3), w, w.abs() + 0.1, w, w + 1), IMAGE, VECTOR),
    ],
    "_softmax.default": [(lambda x: F.softmax(x, 1), IMAGE)],
    "_to_copy.default": [
        (lambda x: x.to(torch.int32), FLOAT),
        (lambda x: x.to(torch.bool), SPECIAL),
        (lambda x: x.float(), BOOL),
        (lambda x: x.to(torch.int8), INT),
    ],
    "abs.default": [(torch.abs, SPECIAL), (torch.abs, INT)],
    "add.Scalar": [(lambda x: aten.add.Scalar(x, 2.5), FLOAT)],
    "add.Tensor": [
        (lambda x, y: x + y, FLOAT, SPECIAL),
        (lambda x, y: torch.add(x, y, alpha=2), FLOAT, SPECIAL),
        (lambda x, y: x + y, FLOAT, BOOL),
        (lambda x: x + 0.1, INT),
    ],
    "addmm.default": [
        (F.linear, FLOAT, weight(5, 9), weight(5)),
        (lambda x, w, b: torch.addmm(b, x, w, alpha=2, beta=3), FLOAT, weight(9, 5), weight(5)),
        (lambda x, w, b: torch.addmm(b, x, w, beta=0), FLOAT, weight(9, 5), weight(5)),
    ],
    "alias.default": [(lambda x: x.detach() + 1, FLOAT)],
    "amax.default": [(lambda x: torch.amax(x, (1, 3)), IMAGE)],
    "amin.default": [(lambda x: torch.amin(x, -1, keepdim=True), IMAGE)],
    "arange.start_step": [(lambda x: x + torch.arange(9), FLOAT), (lambda x: x * torch.arange(0.5, 9.5, 1), FLOAT)],
    "argmax.default": [(lambda x: x.argmax(1), FLOAT), (lambda x: x.argmax(), FLOAT)],
    "avg_pool2d.default": [
        (lambda x: F.avg_pool2d(x, 2), IMAGE),
        (lambda x: F.avg_pool2d(x, (3, 2), (2, 1), (1, 0)), IMAGE),
        (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), IMAGE),
        (lambda x: F.avg_pool2d(x, 2, ceil_mode=True), IMAGE),
        (lambda x: F.avg_pool2d(x, 2), IMAGE[0]),
        (lambda x: F.avg_pool1d(x, 3, 2, 1), SEQUENCE),
    ],
    "avg_pool3d.default": [(lambda x: F.avg_pool3d(x, 2), VOLUME)],
    "bitwise_and.Tensor": [(lambda x, y: x & y, BOOL, BOOL.flip(0))],
    "bitwise_not.default": [(lambda x: ~x, BOOL)],
    "bitwise_or.Tensor": [(lambda x, y: x | y, BOOL, BOOL.flip(0))],
    "bitwise_xor.Tensor": [(lambda x, y: x ^ y, BOOL, BOOL.flip(0))],
    "bmm.default": [
        (torch.bmm, weight(2, 3, 4), weight(2, 4, 5)),
        (lambda x, y, b: torch.baddbmm(b, x, y), weight(2, 3, 4), weight(2, 4, 5), weight(2, 3, 5)),
    ],
    "cat.default": [
        (lambda x, y: torch.cat([x, y], 1), FLOAT, SPECIAL),
        (lambda x, y: torch.stack([x, y], -1), FLOAT, SPECIAL),
    ],
    "ceil.default": [(torch.ceil, SPECIAL)],
    "clamp.Tensor": [(lambda x, y: torch.clamp(x, y, y + 1), SPECIAL, FLOAT)],
    "clamp.default": [
        (lambda x: x.clamp(-1, 1), SPECIAL),
        (lambda x: x.clamp(min=0.25), SPECIAL),
        (lambda x: x.clamp(max=0.25), SPECIAL),
        (lambda x: x.clamp(-2, 3), INT),
    ],
    "clone.default": [(lambda x: x.clone() + 1, FLOAT)],
    "constant_pad_nd.default": [
        (lambda x: F.pad(x, (1, 2, 3, 0), value=-1.0), IMAGE),
        (lambda x: F.pad(x, (-1, 2, 0, -2), value=1.0), IMAGE),
        (lambda x: F.pad(x, (-1, -1)), IMAGE),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), IMAGE),
    ],
    "convolution.default": [
        (lambda x, w: F.conv2d(x, w, padding=1), IMAGE, weight(6, 4, 3, 3)),
        (lambda x, w, b: F.conv2d(x, w, b, stride=(2, 1)), IMAGE, weight(6, 4, 3, 2), weight(6)),
        (lambda x, w: F.conv2d(x, w, padding="same", dilation=2, groups=2), IMAGE, weight(6, 2, 3, 3)),
        (lambda x, w: F.conv2d(x, w, padding="same"), IMAGE, weight(6, 4, 4, 2)),
        (lambda x, w: F.conv2d(x, w, groups=4), IMAGE, weight(4, 1, 3, 3)),
        (lambda x, w: F.conv2d(x, w), IMAGE[0], weight(6, 4, 3, 3)),
        (lambda x, w, b: F.conv1d(x, w, b, padding=1), SEQUENCE, weight(6, 4, 3), weight(6)),
        (lambda x, w: F.conv3d(x, w, padding=(1, 0, 1)), VOLUME, weight(2, 4, 3, 2, 3)),
    ],
    "convolution.default transposed": [
        (lambda x, w: F.conv_transpose1d(x, w, stride=2), SEQUENCE, weight(4, 3, 3)),
        (lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, 1), IMAGE, weight(4, 3, 3, 3), weight(3)),
        (lambda x, w: F.conv_transpose2d(x, w, groups=2), IMAGE, weight(4, 3, 3, 3)),
        (lambda x, w: F.conv_transpose2d(x, w, padding=3, dilation=(1, 2), stride=2), IMAGE, weight(4, 3, 3, 3)),
        (lambda x, w: F.conv_transpose3d(x, w, stride=2, output_padding=1), VOLUME, weight(4, 2, 3, 2, 3)),
    ],
    "cos.default": [(torch.cos, FLOAT)],
    "div.Scalar": [(lambda x: aten.div.Scalar(x, 3), FLOAT)],
    "div.Tensor": [(lambda x, y: x / y, FLOAT, SPECIAL), (lambda x: x / 3, FLOAT), (lambda x: x / 3, INT)],
    "eq.Scalar": [(lambda x: x == 0, SPECIAL), (lambda x: x == 0.1, torch.tensor([0.1, 0.2]))],
    "eq.Tensor": [(lambda x, y: x == y, SPECIAL, SPECIAL.flip(0)), (lambda x, y: x == y, INT, INT.float())],
    "erf.default": [(torch.erf, FLOAT)],
    "exp.default": [(torch.exp, FLOAT)],
    "expand.default": [(lambda x: x.expand(3, 2, 9), FLOAT), (lambda x: x[:, :1].expand(-1, 5), FLOAT)],
    "flip.default": [(lambda x: x.flip(0, 2), IMAGE), (lambda x: x.flip(-1), FLOAT)],
    "floor.default": [(torch.floor, SPECIAL)],
    "full.default": [(lambda x: x + torch.full((2, 1), 0.25), FLOAT), (lambda x: x.new_ones(2, 1) + x, FLOAT)],
    "full_like.default": [(lambda x: torch.full_like(x, 0.1), FLOAT), (lambda x: torch.zeros_like(x) + x, FLOAT)],
    "ge.Scalar": [
        (lambda x: x >= 0, SPECIAL),
        (lambda x: x >= 0.5, INT),
        (lambda x: 2 * (x >= 0).float() - 1, SPECIAL),
    ],
    "ge.Tensor": [(lambda x, y: x >= y, SPECIAL, FLOAT)],
    "gelu.default": [(F.gelu, FLOAT), (lambda x: F.gelu(x, approximate="tanh"), FLOAT)],
    "gt.Scalar": [(lambda x: x > 0, SPECIAL), (lambda x: torch.where(x > 0, 1.0, -1.0), SPECIAL)],
    "gt.Tensor": [(lambda x, y: x > y, SPECIAL, FLOAT)],
    "hardsigmoid.default": [(F.hardsigmoid, SPECIAL), (F.hardsigmoid, FLOAT)],
    "hardswish.default": [(F.hardswish, SPECIAL), (F.hardswish, FLOAT)],
    "hardtanh.default": [(F.hardtanh, SPECIAL), (lambda x: F.hardtanh(x, -2, 0.5), FLOAT), (F.relu6, FLOAT * 3)],
    "isinf.default": [(torch.isinf, SPECIAL)],
    "isnan.default": [(torch.isnan, SPECIAL)],
    "le.Scalar": [(lambda x: x <= 0, SPECIAL)],
    "le.Tensor": [(lambda x, y: x <= y, SPECIAL, FLOAT)],
    "leaky_relu.default": [(F.leaky_relu, SPECIAL), (lambda x: F.leaky_relu(x, 0.3), FLOAT)],
    "log.default": [(torch.log, POSITIVE)],
    "logical_and.default": [(torch.logical_and, BOOL, SPECIAL)],
    "logical_not.default": [(torch.logical_not, SPECIAL)],
    "logical_or.default": [(torch.logical_or, BOOL, SPECIAL)],
    "logical_xor.default": [(torch.logical_xor, BOOL, SPECIAL)],
    "lt.Scalar": [(lambda x: x < 0, SPECIAL)],
    "lt.Tensor": [(lambda x, y: x < y, SPECIAL, FLOAT)],
    "max.default": [(lambda x: aten.max.default(x), FLOAT)],
    "max.dim": [(lambda x: torch.max(x, 1).values, IMAGE), (lambda x: x.max(-1, keepdim=True)[0], FLOAT)],
    "max_pool2d_with_indices.default": [
        (lambda x: F.max_pool2d(x, 2), IMAGE),
        (lambda x: F.max_pool2d(x, 3, 2, 1), IMAGE),
        (lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), IMAGE),
        (lambda x: F.max_pool2d(x, 2, dilation=2), IMAGE),
        (lambda x: F.max_pool2d(x, 2), IMAGE[0]),
        (lambda x: F.max_pool1d(x, 2), SEQUENCE),
    ],
    "max_pool3d_with_indices.default": [(lambda x: F.max_pool3d(x, 2), VOLUME)],
    "maximum.default": [(torch.maximum, SPECIAL, FLOAT)],
    "mean.default": [(lambda x: x.mean(), IMAGE), (lambda x: x.abs().mean(), IMAGE)],
    "mean.dim": [
        (lambda x: x.mean((2, 3), keepdim=True), IMAGE),
        (lambda x: x.mean(-1), IMAGE),
        (lambda x: F.adaptive_avg_pool2d(x, 1), IMAGE),
    ],
    "min.default": [(lambda x: aten.min.default(x), FLOAT)],
    "min.dim": [(lambda x: torch.min(x, 1).values, IMAGE)],
    "minimum.default": [(torch.minimum, SPECIAL, FLOAT)],
    "mm.default": [(torch.mm, FLOAT, weight(9, 5)), (F.linear, FLOAT, weight(5, 9))],
    "mul.Scalar": [(lambda x: aten.mul.Scalar(x, 0.1), FLOAT)],
    "mul.Tensor": [(lambda x, y: x * y, FLOAT, SPECIAL), (lambda x: x * 0.1, FLOAT), (lambda x: x * 0.5, INT)],
    "ne.Scalar": [(lambda x: x != 0, SPECIAL)],
    "ne.Tensor": [(lambda x, y: x != y, SPECIAL, FLOAT)],
    "neg.default": [(torch.neg, SPECIAL), (torch.neg, INT)],
    "permute.default": [
        (lambda x: x.permute(0, 2, 3, 1), IMAGE),
        (lambda x: x.permute(0, -1, 1, 2), IMAGE),
        (torch.t, FLOAT),
    ],
    "pow.Tensor_Scalar": [(lambda x, p=p: x**p, POSITIVE) for p in (0.5, 1, 2, 3, -0.5, -1, -2, 1.7)]
    + [(lambda x: x**2, INT), (lambda x: x**2, SPECIAL)],
    "pow.Tensor_Tensor": [(torch.pow, POSITIVE, FLOAT)],
    "reciprocal.default": [(torch.reciprocal, SPECIAL)],
    "relu.default": [(torch.relu, SPECIAL), (torch.relu, INT)],
    "round.default": [(torch.round, SPECIAL), (torch.round, FLOAT * 10)],
    "rsqrt.default": [(torch.rsqrt, POSITIVE)],
    "scalar_tensor.default": [(lambda x: torch.masked_fill(x, x < 0, -1.0), SPECIAL)],
    "select.int": [(lambda x: x[:, 1], IMAGE), (lambda x: x[..., -2], IMAGE)],
    "sigmoid.default": [(torch.sigmoid, FLOAT)],
    "sign.default": [(torch.sign, SPECIAL), (torch.sgn, SPECIAL), (torch.sign, INT)],
    "silu.default": [(F.silu, FLOAT)],
    "sin.default": [(torch.sin, FLOAT)],
    "slice.Tensor": [
        (lambda x: x[:, 1:3], IMAGE),
        (lambda x: x[..., -3:-1], IMAGE),
        (lambda x: x[:, :, ::2], IMAGE),
    ],
    "split_with_sizes.default": [
        (lambda x: list(torch.split(x, [1, 3], 1)), IMAGE),
        (lambda x: list(x.split(3, 2)), IMAGE),
        (lambda x: x.chunk(2, 1)[1], IMAGE),
    ],
    "sqrt.default": [(torch.sqrt, POSITIVE), (torch.sqrt, INT.abs())],
    "squeeze.dims": [(lambda x: x.squeeze(0), IMAGE[:1]), (lambda x: x.squeeze(), IMAGE[:1])],
    "sub.Scalar": [(lambda x: aten.sub.Scalar(x, 2.5), FLOAT)],
    "sub.Tensor": [
        (lambda x, y: x - y, FLOAT, SPECIAL),
        (lambda x, y: torch.sub(x, y, alpha=3), FLOAT, SPECIAL),
        (lambda x: (torch.sign(x) - x).detach() + x, FLOAT),
        (lambda x: 2 - x, FLOAT),
    ],
    "sum.dim_IntList": [(lambda x: x.sum(), FLOAT), (lambda x: x.sum((1, 2)), IMAGE), (lambda x: x.sum(0), BOOL)],
    "tanh.default": [(torch.tanh, FLOAT)],
    "trunc.default": [(torch.trunc, SPECIAL)],
    "unsqueeze.default": [(lambda x: x.unsqueeze(1), FLOAT), (lambda x: x.unsqueeze(-1), FLOAT)],
    "view.default": [
        (lambda x: x.flatten(1), IMAGE),
        (lambda x: x.view(2, 2, 2, -1), IMAGE),
        (lambda x: F.pixel_shuffle(x, 2), IMAGE),
    ],
    "_adaptive_avg_pool3d.default": [
        (lambda x: F.adaptive_avg_pool3d(x, (2, 4, 3)), VOLUME),
        (lambda x: F.adaptive_avg_pool3d(x, (5, 3, 1)), VOLUME),
    ],
    "_assert_async.msg": [
        (lambda x: F.one_hot(x, 10).float(), INT.abs()),
    ],
    "_embedding_bag.default": [
        (lambda i, w: aten._embedding_bag(w, i[0], torch.tensor([0, 2]))[0], INT.abs() % 4, weight(4, 5)),
    ],
    "_embedding_bag_forward_only.default": [
        (lambda i, w: F.embedding_bag(i, w, mode="sum"), INT.abs() % 4, weight(4, 5)),
        (lambda i, w: F.embedding_bag(i, w), INT.abs() % 4, weight(4, 5)),
        (lambda i, w: F.embedding_bag(i, w, mode="max"), INT.abs() % 4, weight(4, 5)),
        (
            lambda i, w, s: F.embedding_bag(i, w, mode="sum", per_sample_weights=s),
            INT.abs() % 4,
            weight(4, 5),
            weight(2, 4),
        ),
    ],
    "_native_batch_norm_legit.no_stats": [
        (lambda x, w: F.instance_norm(x, None, None, w, w), IMAGE, VECTOR),
        (lambda x: F.batch_norm(x, None, None, training=True), IMAGE),
    ],
    "_upsample_nearest_exact1d.vec": [
        (lambda x: F.interpolate(x, size=13, mode="nearest-exact"), SEQUENCE),
    ],
    "_upsample_nearest_exact2d.vec": [
        (lambda x: F.interpolate(x, size=(13, 5), mode="nearest-exact"), IMAGE),
    ],
    "_upsample_nearest_exact3d.vec": [
        (lambda x: F.interpolate(x, scale_factor=1.5, mode="nearest-exact"), VOLUME),
    ],
    "adaptive_max_pool2d.default": [
        (lambda x: F.adaptive_max_pool2d(x, (4, 3)), IMAGE),
        (lambda x: F.adaptive_max_pool2d(x, (3, 4)), IMAGE),
        (lambda x: F.adaptive_max_pool1d(x, 4), SEQUENCE),
    ],
    "adaptive_max_pool3d.default": [
        (lambda x: F.adaptive_max_pool3d(x, (2, 4, 3)), VOLUME),
        (lambda x: F.adaptive_max_pool3d(x, (5, 3, 7)), VOLUME),
    ],
    "any.default": [
        (lambda x: torch.any(x), BOOL),
    ],
    "any.dim": [
        (lambda x: x.any(1), BOOL),
        (lambda x: x.any(1, keepdim=True), SPECIAL),
        (lambda x: x.all(0), BOOL),
    ],
    "any.dims": [
        (lambda x: x.any((0, 1)), BOOL),
    ],
    "atan.default": [
        (torch.atan, FLOAT),
    ],
    "copysign.Tensor": [
        (torch.copysign, FLOAT, SPECIAL),
        (lambda x: torch.copysign(torch.ones_like(x), x), SPECIAL),
    ],
    "elu.default": [
        (F.elu, FLOAT),
        (lambda x: F.elu(x, 0.3), FLOAT),
        (F.selu, FLOAT),
    ],
    "embedding.default": [
        (F.embedding, INT.abs() % 4, weight(4, 5)),
    ],
    "expm1.default": [
        (torch.expm1, FLOAT),
    ],
    "index.Tensor": [
        (lambda x: x[:, torch.tensor([3, -1, 0])], IMAGE),
        (lambda x: x[torch.tensor([[1, 0]]), :, torch.tensor([2, 3])], IMAGE),
        (lambda x: x[:, :, torch.tensor([[1], [2]]), torch.tensor([0, 3])], IMAGE),
        (lambda x, i: x[i], weight(9, 5), INT % 9 - 4),
        (lambda x: F.unfold(x, 3), IMAGE),
    ],
    "index_select.default": [
        (lambda x: x.index_select(1, torch.tensor([3, 1])), IMAGE),
    ],
    "linalg_vector_norm.default": [
        (lambda x: F.normalize(x, dim=1), IMAGE),
        (lambda x: torch.linalg.vector_norm(x, 1, (1, 2)), IMAGE),
        (lambda x: torch.linalg.vector_norm(x, math.inf), IMAGE),
    ],
    "log1p.default": [
        (torch.log1p, POSITIVE),
        (F.softplus, FLOAT),
    ],
    "native_group_norm.default": [
        (lambda x, w: F.group_norm(x, 2, w, w), IMAGE, VECTOR),
        (lambda x: F.group_norm(x, 4), SEQUENCE),
    ],
    "native_layer_norm.default": [
        (lambda x, w: F.layer_norm(x, (8,), w, w), IMAGE, weight(8)),
        (lambda x: F.layer_norm(x, (9, 8)), IMAGE),
    ],
    "pad.default": [
        (lambda x: F.pad(x, (1, 2, 3, 0), mode="reflect"), IMAGE),
        (lambda x: F.pad(x, (4, 2), mode="replicate"), SEQUENCE),
        (lambda x: F.pad(x, (1, 2, 3, 0), mode="circular"), IMAGE),
        (lambda x: F.pad(x, (1, 2, 3, 0, 1, 1), mode="circular"), VOLUME),
        (lambda x: F.pad(x, (1, 2), mode="reflect"), SEQUENCE[0]),
    ],
    "roll.default": [
        (lambda x: x.roll(2, 1), IMAGE),
        (lambda x: x.roll((1, -3), (2, 3)), IMAGE),
        (lambda x: x.roll(5), FLOAT),
    ],
    "repeat.default": [(lambda x: x.repeat(1, 2, 1, 3), IMAGE), (lambda x: x.repeat(2, 1, 2), FLOAT)],
    "rrelu.default": [
        (F.rrelu, SPECIAL),
    ],
    "signbit.default": [
        (torch.signbit, SPECIAL),
        (torch.signbit, INT),
    ],
    "upsample_bicubic2d.vec": [
        (lambda x: F.interpolate(x, scale_factor=1.7, mode="bicubic"), IMAGE),
        (lambda x: F.interpolate(x, size=(4, 13), mode="bicubic", align_corners=True), IMAGE),
    ],
    "upsample_bilinear2d.vec": [
        (lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"), IMAGE),
        (lambda x: F.interpolate(x, size=(4, 13), mode="bilinear", align_corners=True), IMAGE),
    ],
    "upsample_linear1d.vec": [
        (lambda x: F.interpolate(x, scale_factor=2, mode="linear"), SEQUENCE),
    ],
    "upsample_nearest1d.vec": [
        (lambda x: F.interpolate(x, scale_factor=2), SEQUENCE),
    ],
    "upsample_nearest2d.vec": [
        (lambda x: F.interpolate(x, scale_factor=(2, 1.6)), IMAGE),
        (lambda x: F.interpolate(x, size=(4, 13)), IMAGE),
    ],
    "upsample_nearest3d.vec": [
        (lambda x: F.interpolate(x, scale_factor=2), VOLUME),
    ],
    "upsample_trilinear3d.vec": [
        (lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), VOLUME),
    ],
    "var.correction": [
        (lambda x: x.var((2, 3)), IMAGE),
        (lambda x: x.std(1, keepdim=True), IMAGE),
        (lambda x: x.var(unbiased=False), IMAGE),
    ],
    "where.self": [
        (lambda x: torch.where(torch.sign(x) == 0, 1.0, torch.sign(x)), SPECIAL),
        (lambda x: torch.where(x > 0, x, 1), SPECIAL),
        (lambda x, v: x.masked_fill(x < 0, v), SPECIAL, torch.tensor(2.0)),
        (lambda x, w: F.prelu(x, w), IMAGE, VECTOR),
        (lambda x: torch.where(x > 0, x, INT[0, 0]), FLOAT),
        (lambda x: torch.heaviside(x, torch.tensor([0.5])), SPECIAL),
    ],
}

# Eager starts the sum of a biased product from the bias, raises to a float64 exponent, and adds the terms of a
# transposed convolution in another order.
TOLERANCE = {"addmm.default": 3e-7, "pow.Tensor_Scalar": 3e-7, "convolution.default transposed": 1e-5}
# What is spelled out as simpler operators adds in another order than eager's own kernel.
TOLERANCE |= dict.fromkeys((
    "_adaptive_avg_pool2d.default", "_adaptive_avg_pool3d.default",
    "_embedding_bag.default", "_embedding_bag_forward_only.default",
    "_native_batch_norm_legit.no_stats", "elu.default", "linalg_vector_norm.default", "log1p.default",
    "native_group_norm.default", "native_layer_norm.default", "upsample_bicubic2d.vec", "upsample_bilinear2d.vec",
    "upsample_linear1d.vec", "upsample_trilinear3d.vec", "var.correction",
), 3e-6)  # fmt: skip
# TVM's own max and min drop NaN; bnncc's kernels do not (tests/targets).
TVM_DROPS_NAN = {
    "clamp.Tensor", "clamp.default", "hardsigmoid.default", "hardtanh.default", "maximum.default", "minimum.default",
    "relu.default",
}  # fmt: skip


class _Cases(torch.nn.Module):
    """All cases of an operator as one model, which is exported and compiled once."""

    def __init__(self, cases):
        super().__init__()
        self.cases = cases

    def forward(self, *inputs):
        values, outputs = iter(inputs), []
        for function, *own in self.cases:
            outputs += _as_list(function(*(next(values) for _ in own)))
        return outputs


def test_every_operator_has_a_case():
    """Those that quantize are held by test_aten_quantized.py."""
    others = [name for name in supported_operators() if "quantize" not in name]
    assert sorted({key.split()[0] for key in CASES}) == others


@pytest.mark.parametrize("key", CASES)
def test_operator_is_eager(key):
    model = _Cases(CASES[key]).eval()
    inputs = [value for _, *own in CASES[key] for value in own]
    program = export_model(model, inputs)
    assert key.split()[0] in {operator_name(node) for node in program.graph.nodes if node.op == "call_function"}
    imported = to_relax(program)
    relax.analysis.well_formed(imported.mod)

    expected, tolerance = model(*inputs), TOLERANCE.get(key, 0)
    exact = evaluate_function(imported.mod["main"], inputs)
    for got, want, port in zip(exact, expected, imported.outputs, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
        assert (tuple(want.shape), str(want.dtype)) == (port.shape, f"torch.{port.dtype}")

    if key in TVM_DROPS_NAN:
        inputs = [torch.nan_to_num(tensor, 0.0, math.inf, -math.inf) for tensor in inputs]
        expected = model(*inputs)
    for got, want in zip(_run_with_tvm(imported.mod, inputs), expected, strict=True):
        # Sums in another order and TVM's own exp, erf, … differ in the last bits.
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("part", [
    lambda x: x.chunk(2, 1)[1], lambda x: x[:, ::2], lambda x: x.transpose(2, 3), lambda x: x[..., 2:], lambda x: x[:1],
    lambda x: x.to(memory_format=torch.channels_last), lambda x: x[:, :, 0], lambda x: x[:, :, 0, 0],
])  # fmt: skip
def test_batch_norm_rounds_as_the_kernel_that_eager_chooses_by_strides(part):
    image = torch.randn(2, 16, 9, 8, generator=torch.Generator().manual_seed(5))
    channels = part(image).shape[1]
    gamma, beta, mean, variance = (weight(4, channels) * 3).unbind()

    class Norm(torch.nn.Module):
        def forward(self, x):
            return F.batch_norm(part(x), mean, variance.abs() + 0.1, gamma, beta)

    artifact = bnncc.compile(Norm().eval(), (image,))
    assert all(step["exact"] for step in artifact.manifest["versions"][0]["steps"])
    np.testing.assert_array_equal(artifact.load(threads=1)(image.numpy()), Norm()(image).numpy())


def _as_list(outputs):
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def _run_with_tvm(mod, inputs):
    executable = tvm.compile(mod, target=tvm.target.Target({"kind": "llvm", "opt-level": 0}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    result = machine["main"](*(tvm.runtime.tensor(value.contiguous().numpy()) for value in inputs))
    return [
        torch.from_numpy(tensor.numpy())
        for tensor in _as_list(result if isinstance(result, tvm.runtime.Tensor) else list(result))
    ]
