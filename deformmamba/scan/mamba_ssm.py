"""Adapter to mamba-ssm's CUDA kernel, if it is installed. It has no fused 2-D form, so every direction is a copy."""

import torch

from deformmamba.errors import UnsupportedCall
from deformmamba.scan.backend import Abilities
from deformmamba.scan.reference import orders

ABILITIES = Abilities(
    dtypes=(torch.float32, torch.float16, torch.bfloat16), zoh=False, initial_state=False, max_states=256
)

_CURE = "pip install --no-build-isolation mamba-ssm, with nvcc of the CUDA version that PyTorch was built with"


def unusable(tensor: torch.Tensor | None = None) -> str | None:
    """Why the kernel cannot run on `tensor` (None: on anything here), and the cure, separated by a semicolon."""
    if tensor is not None and tensor.device.type != "cuda":
        return f"it runs on CUDA only, the tensor is on {tensor.device}; move it to the GPU"
    if tensor is not None and tensor.dtype == torch.float64:
        return "it has no float64; use float32 or another backend"
    try:
        # the extension itself: the package imports without it
        import selective_scan_cuda
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except Exception as error:  # not installed, built for another torch, or broken by the version of a dependency
        return f"mamba-ssm's extension cannot be imported ({' '.join(str(error).split())}); {_CURE}"
    for found in (type(selective_scan_cuda), selective_scan_fn):
        if found.__module__.startswith(
            "deformmamba."
        ):  # the replacement by deformmamba.mamba.install would call this scan
            return f"mamba-ssm here is the stand-in that deformmamba.mamba.install put there; {_CURE}"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device; use backend 'cpu'"
    return None


def scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    height: int,
    width: int,
    delta_softplus: bool,
    zoh: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, last state); shapes as in `backend`, differentiable by mamba-ssm's own backward, which leaves out the
    gradient of the last state: asking for that is an error here."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    walks = orders(len(delta), height, width, u.device)
    k, b, g, length, r = delta.shape
    n = A.shape[-1]

    def flat(x: torch.Tensor) -> torch.Tensor:  # (k, b, g, l, c) -> (b, k g c, l), the groups of one direction together
        return x.permute(1, 0, 2, 4, 3).reshape(b, -1, length).contiguous()

    def walked(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[i][:, :, walk] for i, walk in enumerate(walks)])

    y, last = selective_scan_fn(
        flat(torch.stack([u[:, :, walk] for walk in walks])),
        flat(walked(delta)),
        A.reshape(-1, n),
        flat(walked(B)).reshape(b, k * g, n, length),
        flat(walked(C)).reshape(b, k * g, n, length),
        None if D is None else D.reshape(-1),
        None,
        None if delta_bias is None else delta_bias.reshape(-1),
        delta_softplus,
        True,
    )
    y = y.reshape(b, k, g, r, length).permute(1, 0, 2, 4, 3)
    total = torch.stack([y[i][:, :, torch.argsort(walk)] for i, walk in enumerate(walks)]).sum(0)
    last = last.reshape(b, k, g, r, n).transpose(0, 1)
    if last.requires_grad:
        last.register_hook(_no_gradient)
    return total, last


def _no_gradient(_: torch.Tensor) -> None:
    raise UnsupportedCall("mamba-ssm has no gradient of the last state; use another scan backend")
