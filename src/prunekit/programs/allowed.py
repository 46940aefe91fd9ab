"""The operators that an exported program may call, by name: pure ones, whose arguments can be judged beforehand.

Excluded are operators that print, read or write, that call back, whose result's size depends on values (`nonzero`),
that trust their caller with the sizes of lists and buffers (`_foreach_*`, `*_backward`, fused and quantised kernels,
torchvision's C++), or that loop as often as a value says (`matrix_power`, `special_*`).
"""

from __future__ import annotations

# Operators that also exist in place, with a trailing underscore.
_IN_PLACE_TOO = """
    abs absolute acos acosh add addcdiv addcmul angle asin asinh atan atan2 atanh bitwise_and bitwise_left_shift
    bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp clamp_max clamp_min clip copysign cos cosh
    deg2rad div divide elu eq erf erfc erfinv exp exp2 expm1 fill float_power floor floor_divide fmod frac ge gelu
    greater greater_equal gt hardshrink hardsigmoid hardswish hardtanh hypot le leaky_relu lerp less less_equal lgamma
    log log10 log1p log2 logical_and logical_not logical_or logical_xor logit lt masked_fill mish mul multiply
    nan_to_num ne neg negative not_equal pow rad2deg reciprocal relu relu6 remainder round rsqrt selu sgn sigmoid sign
    silu sin sinc sinh softplus softshrink sqrt square squeeze sub subtract tan tanh threshold transpose true_divide
    trunc unsqueeze xlogy zero dropout alpha_dropout feature_dropout feature_alpha_dropout copy index_put index_add
    index_copy index_fill scatter scatter_add scatter_reduce masked_scatter bernoulli detach tril triu cumsum cumprod
    swapaxes swapdims t
    """

_ELEMENTWISE = """
    __and__ __or__ __xor__ _conj _neg_view complex conj fmax fmin heaviside imag isfinite isinf isnan isneginf
    isposinf ldexp log_sigmoid log_sigmoid_forward logaddexp logaddexp2 maximum minimum positive polar prelu
    _prelu_kernel real resolve_conj resolve_neg rsub signbit where view_as_complex view_as_real type_as
    """

_VIEWS = """
    alias as_strided atleast_1d atleast_2d atleast_3d broadcast_tensors broadcast_to channel_shuffle chunk clone
    column_stack cat concat concatenate contiguous detach_copy diag_embed diagonal dstack expand expand_as flatten
    flip fliplr flipud hstack lift_fresh lift_fresh_copy meshgrid moveaxis movedim mT mH narrow native_channel_shuffle
    permute pixel_shuffle pixel_unshuffle ravel repeat repeat_interleave reshape reshape_as roll rot90 select
    select_scatter slice slice_scatter split split_with_sizes stack tile unbind unflatten unfold unsafe_chunk
    unsafe_split unsafe_split_with_sizes _unsafe_view view view_as vstack _reshape_alias _to_copy to pad
    constant_pad_nd expand_copy permute_copy view_copy slice_copy select_copy squeeze_copy unsqueeze_copy
    transpose_copy t_copy
    """

_REDUCTIONS = """
    all amax amin aminmax any argmax argmin argsort count_nonzero cosine_similarity cummax cummin linalg_norm
    linalg_vector_norm log_softmax _log_softmax logcumsumexp logsumexp max mean median min nanmean nansum norm prod
    softmax _softmax _safe_softmax sort special_log_softmax special_softmax std std_mean sum topk var var_mean
    """

_LAYERS = """
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d addbmm addmm addmv addr avg_pool1d avg_pool2d
    avg_pool3d baddbmm batch_norm _batch_norm_no_update _batch_norm_with_update _batch_norm_with_update_functional
    bilinear bmm cdist _cdist_forward col2im conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    convolution _convolution dot einsum embedding fft_fft fft_fft2 fft_fftn fft_fftshift fft_hfft fft_ifft fft_ifft2
    fft_ifftn fft_ifftshift fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn _fft_c2c _fft_c2r _fft_r2c
    glu grid_sampler grid_sampler_2d grid_sampler_3d group_norm im2col inner instance_norm kron layer_norm linear
    matmul max_pool1d max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices mm mv native_batch_norm
    _native_batch_norm_legit _native_batch_norm_legit_functional _native_batch_norm_legit_no_training native_dropout
    native_group_norm native_layer_norm outer reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
    replication_pad2d replication_pad3d rms_norm scaled_dot_product_attention
    _scaled_dot_product_flash_attention_for_cpu tensordot upsample_bicubic2d upsample_bilinear2d upsample_linear1d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_trilinear3d
    """

_RECURRENT = "gru lstm rnn_relu rnn_tanh"

_INDEXING = "gather index index_select take take_along_dim _unsafe_index _unsafe_index_put one_hot"

_CREATION = """
    arange empty empty_like empty_permuted eye full full_like linspace logspace new_empty new_full new_ones new_zeros
    ones ones_like rand rand_like randn randn_like scalar_tensor zeros zeros_like
    """

# Queries of sizes, and the checks of sizes that exporting leaves.
_OF_SIZES = """
    sym_size sym_numel sym_stride sym_storage_offset sym_constrain_range sym_constrain_range_for_size _assert_scalar
    _assert_tensor_metadata
    """

SIZES = frozenset(_OF_SIZES.split())
ALLOWED = SIZES.union(
    (f"{name}_" for name in _IN_PLACE_TOO.split()),
    *(
        text.split()
        for text in (_IN_PLACE_TOO, _ELEMENTWISE, _VIEWS, _REDUCTIONS, _LAYERS, _RECURRENT, _INDEXING, _CREATION)
    ),
)
