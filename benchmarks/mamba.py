"""Mamba networks with `deformmamba.mamba` and with plain PyTorch: Mamba-2's scan, and transformers' Mamba models.

Run: python benchmarks/mamba.py [ssd] [Mamba] [Mamba2] [FalconMamba] [--layers 24] [--tokens 2048] [--threads 1]
     python benchmarks/mamba.py SegMamba | VM-UNet | MambaIR [--source FOLDER] [--size 32]

The models need transformers 5.16 or later (`pip install transformers`); nothing is downloaded, because the models have
the 130M configuration with random weights. Each model runs with transformers' PyTorch functions and, after `install`,
with ours, in one process; logits and generated tokens are compared first. With one thread, times are CPU seconds of
this process, which depend little on other work on the machine; with more threads, wall-clock seconds.

The floor of Mamba-2's scan is the time of its matrix products alone, at the rate of a 1024x1024 product measured here.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

import deformmamba.mamba

MODELS = ("Mamba", "Mamba2", "FalconMamba")


def clock() -> float:
    """CPU time of this process with one thread, so that other work on the machine hardly counts; else time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(run: Callable[[], Any], repeats: int = 3) -> float:
    """The time of the fastest of `repeats` runs."""
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append(clock() - start)
    return min(times)


def ssd(tokens: int) -> None:
    """Forward and backward pass of Mamba-2's scan, 24 heads of 64 channels and 128 states."""
    b, h, p, g, n = 1, 24, 64, 1, 128
    torch.manual_seed(0)
    x, B, C = torch.randn(b, tokens, h, p), torch.randn(b, tokens, g, n), torch.randn(b, tokens, g, n)
    given = [x, F.softplus(torch.randn(b, tokens, h) - 4), -15 * torch.rand(h) - 1, B, C]
    given = [t.requires_grad_() for t in given]

    def both(scan: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        y = scan(*given, 256)
        return [y.detach(), *torch.autograd.grad(y.sum(), given)]

    contenders: dict[str, Callable[..., torch.Tensor]] = {"ours": deformmamba.mamba.mamba_chunk_scan_combined}
    for chunk in (64, 256):
        contenders[f"the paper's listing, chunks of {chunk}"] = lambda x, dt, A, B, C, _, q=chunk: listing(
            x, dt, A, B, C, q
        )
    try:
        import transformers
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

        transformers.logging.set_verbosity_error()
        contenders["transformers"] = mamba2_chunk_scan
    except ImportError:
        print("transformers is not installed: its models are skipped")
    expected = both(contenders["ours"])
    for name, scan in contenders.items():
        for ours, theirs in zip(expected, both(scan), strict=True):
            assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max(), f"{name} disagrees"
    square = torch.randn(1024, 1024)
    rate = 2 * 1024**3 / seconds(lambda: square @ square, 7)
    chunk = 128  # ours
    # per token and head: scores times values, and states in and out; the backward pass has twice as many products, and
    # repeats none; all heads share the scores
    forward = 2 * (chunk * p + 2 * n * p)
    backward = 2 * forward
    floor = tokens * h * (forward + backward) / rate
    times = {name: seconds(lambda scan=scan: both(scan)) for name, scan in contenders.items()}  # type: ignore[misc]
    print(f"Mamba-2's scan, {tokens} tokens, both passes; floor {1e3 * floor:.0f} ms at {rate / 1e9:.0f} Gflop/s")
    for name, time_ in times.items():
        ratios = f"{time_ / times['ours']:.1f} times ours, {time_ / floor:.1f} times the floor"
        print(f"  {name}: {1e3 * time_:.0f} ms, {ratios}", flush=True)


def listing(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, q: int
) -> torch.Tensor:
    """Listing 1 of the Mamba-2 paper (Dao and Gu 2024), which is mamba-ssm's plain PyTorch version."""
    h = x.shape[2]
    B, C = (t.expand(-1, -1, h, -1) for t in (B, C))
    u, a = (x * dt[..., None]).unflatten(1, (-1, q)), (dt * A).unflatten(1, (-1, q)).permute(0, 3, 1, 2)
    B, C = B.unflatten(1, (-1, q)), C.unflatten(1, (-1, q))

    def sums(a: torch.Tensor) -> torch.Tensor:
        n = a.shape[-1]
        lower = torch.ones(n, n, dtype=torch.bool)
        steps = a[..., None].expand(*a.shape, n).masked_fill(~lower.tril(-1), 0).cumsum(-2)
        return steps.masked_fill(~lower.tril(), -torch.inf)

    total = a.cumsum(-1)
    near = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, sums(a).exp(), u)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, (total[..., -1:] - total).exp(), u)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], 1)
    carried = torch.einsum("bhzc,bchpn->bzhpn", sums(F.pad(total[..., -1], (1, 0))).exp(), states)[:, :-1]
    return (near + torch.einsum("bclhn,bchpn,bhcl->bclhp", C, carried, total.exp())).flatten(1, 2)


def model(name: str, layers: int, tokens: int) -> None:
    """Prefill and decoding of one of transformers' models."""
    import transformers

    transformers.logging.set_verbosity_error()
    options: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": layers, "vocab_size": 50280}
    if name == "Mamba2":
        options |= {"num_heads": 24, "head_dim": 64, "state_size": 128, "n_groups": 1}
    torch.manual_seed(0)
    network = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**options)).eval()
    ids = torch.randint(0, 50280, (1, tokens))

    def prefill() -> torch.Tensor:
        with torch.inference_mode():
            return network(ids, use_cache=True, logits_to_keep=1).logits  # type: ignore[no-any-return]

    def decode(n: int) -> torch.Tensor:
        return network.generate(ids[:, :16], max_new_tokens=n, min_new_tokens=n, do_sample=False)  # type: ignore[no-any-return]

    results, times = [], []
    for ours in (False, True):
        if ours:
            deformmamba.mamba.install(quiet=True)
            prefill()  # compiles
        logits = prefill()
        results.append((logits, decode(16)))
        times.append((seconds(prefill), seconds(lambda: decode(16), 5)))
    deformmamba.mamba.uninstall()
    (theirs, tokens_theirs), (logits, tokens_ours) = results
    floor = layers * seconds(lambda: linear_layers(network, tokens))
    scale = theirs.abs().max().item()
    worst = (logits - theirs).abs().max().item()
    print(f"{name}, {layers} layers, {tokens} tokens: largest difference of logits {worst:.1e} of {scale:.1f}")
    print(f"  the same 16 tokens generated: {torch.equal(tokens_theirs, tokens_ours)}")
    for what, a, b in zip(("prefill", "16 tokens"), *times, strict=True):
        print(
            f"  {what}: {a:.2f} s with transformers' functions, {b:.2f} s with ours, {a / b:.1f} times as fast",
            flush=True,
        )
    theirs_prefill, ours_prefill = times[0][0], times[1][0]
    print(
        f"  the linear layers alone: {floor:.2f} s; with the rest at no cost, the prefill would be "
        f"{theirs_prefill / floor:.1f} times as fast; ours takes {ours_prefill / floor:.1f} times the linear layers"
    )


@torch.inference_mode()
def linear_layers(network: Any, tokens: int) -> None:
    """The linear layers of one block, on `tokens` steps."""
    for layer in network.backbone.layers[0].mixer.children():
        if isinstance(layer, torch.nn.Linear):
            layer(torch.ones(1, tokens, layer.in_features))


def segmamba(source: str, size: int) -> None:
    """SegMamba's network on a cube."""
    sys.path.insert(0, source)
    deformmamba.mamba.install(quiet=True)
    from model_segmamba.segmamba import SegMamba

    from deformmamba.mamba import selective_scan

    torch.manual_seed(0)
    plain = {"selective_scan_fn": selective_scan.selective_scan_ref, "causal_conv1d_fn": plain_convolution}
    against_loop(
        "SegMamba", SegMamba(in_chans=1, out_chans=4), torch.randn(1, 1, size, size, size), selective_scan, plain
    )


def vm_unet(source: str, size: int) -> None:
    """VM-UNet with one block a level and a quarter of its channels, on an image."""
    sys.path.insert(0, source)
    plain_timm()
    deformmamba.mamba.install(quiet=True)
    from models.vmunet import vmamba

    torch.manual_seed(0)
    dims, one = [24, 48, 96, 192], [1, 1, 1, 1]
    network = vmamba.VSSM(
        in_chans=3, num_classes=1, depths=one, depths_decoder=one, dims=dims, dims_decoder=dims[::-1], drop_path_rate=0
    )
    plain = {"selective_scan_fn": deformmamba.mamba.selective_scan_ref}
    against_loop("VM-UNet", network, torch.randn(1, 3, size, size), vmamba, plain)


def mamba_ir(source: str, size: int) -> None:
    """MambaIR with one group of two blocks, on an image."""
    plain_timm()
    for name, folder in (("basicsr", "basicsr"), ("basicsr.utils", None), ("basicsr.archs", "basicsr/archs")):
        package = sys.modules[name] = ModuleType(name)  # the real one imports all of its training code
        package.__path__ = [] if folder is None else [str(Path(source, folder))]
    registry = sys.modules["basicsr.utils.registry"] = ModuleType("basicsr.utils.registry")
    registry.__dict__["ARCH_REGISTRY"] = SimpleNamespace(register=lambda: lambda architecture: architecture)
    deformmamba.mamba.install(quiet=True)
    from basicsr.archs import mambair_arch

    torch.manual_seed(0)
    network = mambair_arch.MambaIR(
        img_size=size, embed_dim=60, depths=(2,), drop_path_rate=0.0, upscale=2, upsampler="pixelshuffledirect"
    )
    plain = {"selective_scan_fn": deformmamba.mamba.selective_scan_ref}
    against_loop("MambaIR", network, torch.randn(1, 3, size, size), mambair_arch, plain)


def plain_timm() -> None:
    """The three functions that VM-UNet and MambaIR take from timm, without timm, which imports torchvision."""
    for name in ("timm", "timm.models", "timm.models.layers"):
        sys.modules[name] = ModuleType(name)
    sys.modules["timm.models.layers"].__dict__.update(
        DropPath=lambda rate: torch.nn.Identity(),
        to_2tuple=lambda x: x if isinstance(x, tuple) else (x, x),
        trunc_normal_=torch.nn.init.trunc_normal_,
    )


def against_loop(
    name: str, network: torch.nn.Module, x: torch.Tensor, module: ModuleType, plain: dict[str, Callable[..., Any]]
) -> None:
    """Both passes of an unmodified network with our functions, and with `plain` in their place in `module`."""
    ours = {function: getattr(module, function) for function in plain}

    def both(functions: dict[str, Any]) -> list[torch.Tensor]:
        for function, replacement in functions.items():
            setattr(module, function, replacement)
        for block in network.modules():
            if "selective_scan" in vars(block):
                vars(block)["selective_scan"] = functions["selective_scan_fn"]
        network.zero_grad()
        y = network(x)
        y.square().mean().backward()
        return [y.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]

    found = both(ours)
    mine = seconds(lambda: both(ours), 3)
    start = clock()
    expected = both(plain)
    loop = clock() - start
    (y, *gradients), (y_loop, *gradients_loop) = found, expected
    error = ((y - y_loop).abs().max() / y_loop.abs().max()).item()
    # of the largest gradient of all: a weight before a norm has none but rounding
    largest = max(g.abs().max() for g in gradients_loop)
    worst = max(((a - b).abs().max() / largest).item() for a, b in zip(gradients, gradients_loop, strict=True))
    parameters = sum(p.numel() for p in network.parameters()) / 1e6
    print(
        f"{name}, {parameters:.2f} million parameters, {'x'.join(map(str, x.shape[2:]))}, both passes: {mine:.2f} s, "
        f"with the loop over steps {loop:.2f} s, {loop / mine:.1f} times as long; largest difference {error:.1e} of "
        f"the largest output, {worst:.1e} of the largest gradient"
    )


def plain_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, activation: str
) -> torch.Tensor:
    """The causal convolution in PyTorch's own functions."""
    assert activation == "silu"
    return F.silu(F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=len(weight)))


NETWORKS = {"SegMamba": segmamba, "VM-UNet": vm_unet, "MambaIR": mamba_ir}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", nargs="*", default=["ssd", *MODELS], choices=["ssd", *MODELS, *NETWORKS])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--source", help="folder of the source code of SegMamba, VM-UNet or MambaIR (default: its name)"
    )
    parser.add_argument("--size", type=int, default=32, help="edge of the image or cube (SegMamba: a multiple of 32)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for what in args.what:
        if what == "ssd":
            ssd(args.tokens)
        elif what in NETWORKS:
            NETWORKS[what](args.source or what, args.size)
        else:
            model(what, args.layers, args.tokens)


if __name__ == "__main__":
    main()
