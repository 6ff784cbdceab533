"""Mamba's operations without the packages mamba-ssm and causal-conv1d: same interfaces, any device, with gradients.

Import the functions and blocks from here, or call `install`: if mamba_ssm or causal_conv1d cannot be imported, `import
mamba_ssm` and `import causal_conv1d` then return these functions:

    import deformmamba.mamba
    deformmamba.mamba.install()

or, for a program: `python -m deformmamba.mamba script.py arguments`. On a CPU the scans are compiled. docs/mamba.md
lists all names, their limits and their speed.
"""

from deformmamba.mamba.causal_conv import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
    causal_conv1d_varlen_states,
    causal_conv1d_varlen_states_ref,
)
from deformmamba.mamba.mamba2 import Mamba2
from deformmamba.mamba.mamba_simple import Mamba
from deformmamba.mamba.norm import (
    LayerNormGated,
    RMSNorm,
    RMSNormGated,
    gated_norm_ref,
    layer_norm_fn,
    layer_norm_ref,
    layernorm_fn,
    rms_norm_fn,
    rms_norm_ref,
    rmsnorm_fn,
)
from deformmamba.mamba.selective_scan import (
    bimamba_inner_fn,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
)
from deformmamba.mamba.ssd import (
    mamba_chunk_scan,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    mamba_split_conv1d_scan_ref,
    ssd_ref,
)
from deformmamba.mamba.standin import install, uninstall
from deformmamba.mamba.state_update import selective_state_update, selective_state_update_ref
from deformmamba.mamba.volumes import SS3D

__all__ = [
    "SS3D",
    "LayerNormGated",
    "Mamba",
    "Mamba2",
    "RMSNorm",
    "RMSNormGated",
    "bimamba_inner_fn",
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
    "causal_conv1d_varlen_states",
    "causal_conv1d_varlen_states_ref",
    "gated_norm_ref",
    "install",
    "layer_norm_fn",
    "layer_norm_ref",
    "layernorm_fn",
    "mamba_chunk_scan",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_inner_fn_no_out_proj",
    "mamba_inner_ref",
    "mamba_split_conv1d_scan_combined",
    "mamba_split_conv1d_scan_ref",
    "rms_norm_fn",
    "rms_norm_ref",
    "rmsnorm_fn",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "selective_state_update_ref",
    "ssd_ref",
    "uninstall",
]
