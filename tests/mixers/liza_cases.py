"""A LiZA mixer that hides nothing behind initial values, and what it reads."""

import torch

from fastweight.mixers.liza import Liza, LizaConfig

T = 61  # prime


def build(config: LizaConfig, dtype: torch.dtype = torch.float64, d_model: int = 16) -> Liza:
    """A mixer whose parameters have all left their initial values."""
    torch.manual_seed(3)
    mixer = Liza(d_model, config)
    mixer.reset_parameters(0.3)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name != "mag":
                parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer.to(dtype).eval()


def tokens(length: int = T, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 5) -> torch.Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
