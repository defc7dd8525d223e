"""One operation on a list of tensors in few kernels; torch's own optimisers use them under these private names."""

import torch

add_ = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]
lerp = torch._foreach_lerp  # pyright: ignore[reportPrivateImportUsage]
lerp_ = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
mul_ = torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]
sub_ = torch._foreach_sub_  # pyright: ignore[reportPrivateImportUsage]
