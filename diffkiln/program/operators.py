"""The closed list of ATen operators that a program may name.

All are functional: none writes to its arguments, draws random numbers, reads a file or depends on anything but its
arguments. A bundle that names another operator is refused before anything runs, and a recording that meets one stops.
"""

from __future__ import annotations

_POINTWISE = """
abs neg exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square sin cos tan tanh asin acos atan atan2 rad2deg
deg2rad sigmoid sign floor ceil round trunc frac erf relu relu6 silu gelu mish softplus elu leaky_relu hardtanh
hardswish hardsigmoid celu selu logical_not logical_and logical_or logical_xor bitwise_not bitwise_and bitwise_or
bitwise_xor bitwise_left_shift bitwise_right_shift __and__ __or__ __xor__ __lshift__ __rshift__ isnan isinf isfinite
add sub rsub mul div true_divide floor_divide remainder fmod pow maximum minimum fmax fmin lerp addcmul addcdiv clamp
clamp_min clamp_max where eq ne lt le gt ge masked_fill nan_to_num log_sigmoid threshold prelu glu softmax _softmax
log_softmax special_expm1
"""
_REDUCTIONS = """
sum mean amax amin max min prod var std any all argmax argmin cumsum cumprod norm linalg_vector_norm var_mean std_mean
logsumexp count_nonzero argsort sort topk searchsorted bucketize quantile median
"""
_SHAPES = """
reshape view _unsafe_view _reshape_alias view_as reshape_as flatten unflatten expand expand_as squeeze unsqueeze
permute transpose t swapaxes movedim moveaxis numpy_T mT slice select narrow split split_with_sizes unsafe_split chunk
unbind tensor_split pad_sequence cat concat concatenate stack hstack vstack repeat repeat_interleave tile roll flip
rot90 contiguous clone alias detach as_strided unfold pad constant_pad_nd reflection_pad1d reflection_pad2d
reflection_pad3d replication_pad1d replication_pad2d replication_pad3d _pad_circular diagonal diag_embed tril triu
as_strided_scatter slice_scatter select_scatter diagonal_scatter scatter scatter_add gather index index_select
index_put index_add index_fill index_copy take_along_dim masked_scatter meshgrid broadcast_to broadcast_tensors
pixel_shuffle pixel_unshuffle channel_shuffle lift_fresh lift_fresh_copy view_as_complex view_as_real resolve_conj
resolve_neg complex polar real imag view_copy expand_copy permute_copy movedim unsafe_chunk unsafe_split_with_sizes
atleast_1d atleast_2d atleast_3d ravel unsqueeze_copy adjoint mH conj_physical
"""
_CREATION = """
to _to_copy type_as zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full
new_empty arange linspace eye scalar_tensor copy fill one_hot new_empty_strided
"""
_LAYERS = """
linear addmm addmv mm bmm baddbmm addbmm matmul dot mv einsum outer conv1d conv2d conv3d convolution conv_transpose1d
conv_transpose2d conv_transpose3d _convolution embedding layer_norm native_layer_norm group_norm native_group_norm
rms_norm _fused_rms_norm instance_norm batch_norm native_batch_norm scaled_dot_product_attention upsample_nearest1d
upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d upsample_linear1d
_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bilinear2d_aa
_upsample_bicubic2d_aa avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d
adaptive_avg_pool2d adaptive_max_pool2d cosine_similarity bilinear _int_mm _weight_int8pack_mm _scaled_mm fft_fft
fft_ifft fft_fft2 fft_ifft2 fft_fftn fft_ifftn fft_rfft fft_irfft fft_rfft2 fft_irfft2 fft_rfftn fft_irfftn
fft_fftshift fft_ifftshift logaddexp cdist linalg_norm linalg_qr cross linalg_cross
"""

OPERATORS: frozenset[str] = frozenset(" ".join((_POINTWISE, _REDUCTIONS, _SHAPES, _CREATION, _LAYERS)).split())

#: Views whose legality depends on strides, and strides depend on kernels and devices. `reshape` always holds.
RESHAPES: frozenset[str] = frozenset(
    {"aten.view.default", "aten._unsafe_view.default", "aten._reshape_alias.default", "aten.reshape.default"}
)


def allowed(name: str) -> bool:
    """Whether `name`, such as "aten.add.Tensor", is in the closed list.

    Any overload of a listed operator is; `diffkiln.aten.overload` refuses those whose schema says that they write.
    """
    parts = name.split(".")
    if len(parts) != 3 or parts[0] != "aten" or parts[1] not in OPERATORS:
        return False
    name_like = parts[2].isascii() and parts[2].isidentifier() and not parts[2].startswith("_")
    return name_like and "out" not in parts[2].split("_")
