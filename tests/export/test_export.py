"""Exported files equal the model at other sizes, describe themselves correctly, and are not written if they differ."""

import errno
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import assert_close

import deformmamba.export
from deformmamba import atomic
from deformmamba.cli import main
from deformmamba.data.thick_slices import robust_range
from deformmamba.errors import InvalidType
from deformmamba.export import FACTS, ExportError, export, onnx, openvino, pt2, whole_slice
from deformmamba.export.whole_slice import WholeSlice
from deformmamba.inference import upscale
from deformmamba.inference.upscaling import scan_units
from deformmamba.layers import SS2D, ModulatedDeformBlock, PatchEmbed, VisionMambaBlock
from deformmamba.models import SRCNN, DeformMambaSR, SRModel, ZeroFill
from deformmamba.physics import edges
from deformmamba.physics.consistency import data_consistency
from deformmamba.physics.kspace import lowpass, zero_fill
from deformmamba.scan import selective_scan_2d
from deformmamba.weights import weights_entry, write_checkpoint

SMALL = {"scale": 2, "dims": [4], "depths": [1], "patch": 2, "stem_channels": 2, "d_state": 2, "context_rates": [1, 2]}


def small(**options: object) -> DeformMambaSR:
    torch.manual_seed(0)
    model = DeformMambaSR(**{**SMALL, **options}).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def image(h: int, w: int, b: int = 1) -> torch.Tensor:
    return torch.rand(b, 1, h, w, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("directions", "zoh", "bias", "rank"),
    [(1, False, True, 0), (2, True, False, 3), (4, False, False, 0), (4, True, True, 3)],
)
def test_the_scan_by_steps_is_the_scan(directions: int, zoh: bool, bias: bool, rank: int) -> None:
    b, h, w, d, n, k = 2, 3, 4, 5, 2, directions
    generator = torch.Generator().manual_seed(0)
    u, delta, mix, B, C, D, A, dt = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in (
            (b, h, w, d), (k, b, h, w, rank or d), (k * d, rank), (b, h, w, k, n), (b, h, w, k, n),
            (k * d,), (k * d, n), (k * d,),
        )
    )  # fmt: skip
    A = -A.exp()
    wanted = selective_scan_2d(
        u, delta, A, B, C, *((D, dt) if bias else ()), delta_weight=mix if rank else None,
        discretization="zoh" if zoh else "euler", backend="reference",
    )  # fmt: skip
    got, last, kept = pt2._scan_by_steps(
        "cpu",
        u.reshape(b, 1, h * w, d),
        delta.reshape(k, b, 1, h * w, rank or d),
        A.reshape(k, 1, d, n),
        *(x.permute(3, 0, 1, 2, 4).reshape(k, b, 1, h * w, n) for x in (B, C)),
        D.reshape(k, 1, d) if bias else None,
        dt.reshape(k, 1, d) if bias else None,
        None,
        h,
        w,
        True,
        zoh,
        False,
        mix.reshape(k, 1, d, rank) if rank else None,
    )
    assert_close(got.reshape(b, h, w, d), wanted)
    assert last.shape == (k, b, 1, d, n)
    assert kept.shape[3] == 0


@pytest.mark.long
def test_a_pt2_file_needs_no_deformmamba(tmp_path: Path) -> None:
    model = small(deform=False, context=False)
    done = export(model, tmp_path / "m.pt2", format="pt2", size=(7, 6), inputs="lr,base")
    assert done.difference < 1e-5
    assert done.sizes == [(7, 6)]
    lr = image(7, 6)
    torch.save({"lr": lr, "sr": model(lr).detach()}, tmp_path / "example.pt")
    script = (
        "import sys, torch; f = {}; program = torch.export.load('m.pt2', extra_files=f).module()\n"
        "example = torch.load('example.pt', weights_only=True)\n"
        "torch.testing.assert_close(program(lr=example['lr']), example['sr'], atol=1e-5, rtol=0)\n"
        "assert not any(name.startswith('deformmamba') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=300)
    kept: dict[str, str] = {FACTS: ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=kept)
    facts = json.loads(kept[FACTS])
    assert facts == done.facts
    assert facts["size"] == "7x6, batch 1"
    assert "base" not in json.loads(facts["inputs"])


@pytest.mark.long
def test_a_pt2_file_takes_sizes_it_was_not_made_at(tmp_path: Path) -> None:
    model = small(skip="zero-fill")
    done = export(model, tmp_path / "m.pt2", format="pt2", inputs="lr,base")
    assert len(done.sizes) == 2
    program = torch.export.load(tmp_path / "m.pt2").module()
    for h, w, b in [(8, 8, 1), (9, 14, 3)]:
        lr = image(h, w, b)
        base = zero_fill(lr, 2)
        with torch.no_grad():  # with gradients, PyTorch imports its compiler, which causes warnings
            torch.testing.assert_close(program(lr=lr, base=base), model(lr, base), atol=1e-5, rtol=0)


@pytest.mark.long
def test_a_file_for_tiles_takes_the_range_of_the_whole_slice(tmp_path: Path) -> None:
    model = small(deform=False, context=False, skip="zero-fill-robust", normalise="slice")
    done = export(model, tmp_path / "m.pt2", format="pt2", inputs="lr,base")
    assert list(json.loads(done.facts["inputs"])) == ["lr", "base", "norm"]
    program = torch.export.load(tmp_path / "m.pt2").module()
    whole = image(24, 20)
    whole[..., 14:17, 14:17] = 20  # a marker: 2 % of the slice, 6 % of the tile
    further, tile = model.whole_slice(whole), whole[..., 8:24, 8:20]
    base, norm = further["base"][..., 16:48, 16:40], further["norm"]
    with torch.no_grad():
        got = program(lr=tile, base=base, norm=norm)
        torch.testing.assert_close(got, model(tile, base, norm), atol=1e-5, rtol=0)
        assert (got - model(tile, base)).abs().max() > 1e-3


def scan(h: int, w: int, b: int) -> np.ndarray:
    """A stack of slices (b, h, w): an object with intensities of about 2,000, in air."""
    generator = np.random.default_rng(h)
    y, x = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j]
    inside = (y**2 + x**2 < 0.7) * (1 + 0.3 * np.sin(9 * x) * np.cos(7 * y))
    noise = generator.standard_normal((2, b, h, w)) * 0.03
    return np.float32(2000 * np.hypot(inside + noise[0], noise[1]))


SHARE = 1e-5  # tolerance relative to the intensities: float32 sums of a few hundred terms in another order


def spread(stack: np.ndarray, unit: float) -> float:
    """The intensity to which rounding errors are relative: the unit, or a much brighter marker."""
    return max(unit, float(np.abs(stack).max()))


LONG = partial(pytest.param, marks=pytest.mark.long)
NETWORKS = [
    ({"skip": "zero-fill"}, "object"),
    LONG(
        {"dims": [4, 6], "depths": [1, 1], "discretization": "zoh", "directions": 2, "separable": True}
        | {"skip": "zero-fill-edges", "normalise": "slice"},
        "off",
    ),
    LONG({"skip": "zero-fill-robust", "normalise": "slice", "directions": 1, "context": False}, "object"),
]


@pytest.mark.parametrize("skip", ["zero-fill", "zero-fill-edges", "zero-fill-robust"])
@pytest.mark.parametrize("consistency", ["object", "exact", "off"])
@pytest.mark.filterwarnings("ignore:the scan does not look like a magnitude image")
def test_what_is_exported_is_upscale_in_any_units(skip: str, consistency: str) -> None:
    model = small(skip=skip, normalise="slice")
    module = WholeSlice(model, consistency).eval()
    whole = scan(26, 24, 2)
    whole[:, 3:5, 15:17] = 40_000  # a marker
    for stack in (whole, scan(40, 41, 2)[:, 10:27, 12:28]):  # a whole slice; a window with tissue at its edges
        wanted = upscale(model, stack, axis=0, consistency=consistency)
        for gain, offset in ((1, 0), (0.03, 0), (1, -1500), (20, 2000)):
            changed = torch.from_numpy(stack * np.float32(gain) + np.float32(offset))[:, None]
            with torch.no_grad():
                sr = module(changed, torch.zeros(3))[:, 0].numpy()
            # float32 holds the range with the offset to 1e-7, and a few layers amplify that
            np.testing.assert_allclose((sr - offset) / gain, wanted, rtol=0, atol=5e-5 * np.abs(wanted).max())


def onnx_file(write: Any, block: torch.nn.Module, shape: list[str | int], *, attention: bool = False) -> bytes:
    """An ONNX file with the graph of one block, by its writer `write`; `shape` of the input x, with names of sizes."""
    ir = pytest.importorskip("onnx_ir")
    x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    opset = onnx.OPSETS["linear-attention" if attention else "scan"]
    graph = ir.Graph([x], [], nodes=[], name="block", opset_imports={"": opset})
    nodes = onnx.Nodes(graph, "block", attention=attention)
    with torch.no_grad():
        y = write(nodes, block, x)
    y.dtype = ir.DataType.FLOAT
    graph.extend(nodes.made)
    graph.outputs.append(y)
    return ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString()


@pytest.mark.parametrize("directions", [1, pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("zoh", [False, True])
@pytest.mark.parametrize("attention", [False, True])
def test_the_graph_of_a_scan_gives_what_the_layer_gives(directions: int, zoh: bool, attention: bool) -> None:
    """At sizes below, at and above the steps of one round, with several maps at once."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if attention and tuple(int(n) for n in onnxruntime.__version__.split(".")[:2]) < (1, 32):
        pytest.skip("the installed ONNX Runtime may have no LinearAttention")
    torch.manual_seed(0)
    layer = SS2D(6, d_state=3, directions=directions, discretization="zoh" if zoh else "euler", backend="reference")
    file = onnx_file(onnx.scan_2d, layer, ["b", "h", "w", 6], attention=attention)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for b, h, w in ((1, 3, 5), (3, 8, 4), (2, 9, 13)):
        x = torch.randn(b, 6, h, w)
        with torch.no_grad():
            wanted = layer(x)
        (got,) = session.run(None, {"x": x.permute(0, 2, 3, 1).numpy()})
        torch.testing.assert_close(torch.from_numpy(got).permute(0, 3, 1, 2), wanted, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the scan does not look like a magnitude image")
@pytest.mark.parametrize(("options", "consistency"), NETWORKS)
def test_an_onnx_file_gives_what_upscale_gives(tmp_path: Path, options: dict[str, object], consistency: str) -> None:
    """At sizes other than those of the export, for each slice alone, and with the units of a stack."""
    pytest.importorskip("onnxscript")
    checker, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = small(**options)
    done = export(model, tmp_path / "m.onnx", format="onnx", consistency=consistency)
    assert done.difference < 1e-5
    file = checker.load(tmp_path / "m.onnx")
    checker.checker.check_model(file)
    assert {p.key: p.value for p in file.metadata_props}.items() >= done.facts.items()
    assert {node.domain for node in file.graph.node} == {""}
    assert str(Path(__file__).parents[2]).encode() not in file.SerializeToString()
    assert not any(entry.metadata_props for entry in (*file.graph.node, *file.graph.value_info))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["lr"]
    assert [i.name for i in session.get_overridable_initializers()] == ["units"]
    smallest = int(done.facts["minimum_size"])
    large = scan(24, 18, 2)
    marked = large.copy()
    marked[:, 2, 3] = 20 * large.max()
    stacks = {
        "smallest": scan(smallest, smallest, 1),
        "several": scan(21, 16, 2),
        "cropped": large[:, 7:18, 5:14],
        "offset": large + 500,
        "marked": marked,
        "masked": np.where(large > 300, large, np.float32(0)),
        "signed": large - large.mean(),
        "constant": np.full((1, 12, 13), 7, np.float32),
    }
    for name, stack in stacks.items():
        units = scan_units(model, stack)
        atol = SHARE * spread(stack, units.scale or 2000)
        given = np.float32([units.zero, units.scale, whole_slice.NO_FLOOR if units.floor is None else units.floor])
        (sr,) = session.run(["sr"], {"lr": stack[:, None], "units": given})
        wanted = upscale(model, stack, axis=0, consistency=consistency)
        np.testing.assert_allclose(sr[:, 0], wanted, atol=atol, rtol=0, err_msg=name)
        (sr,) = session.run(["sr"], {"lr": stack[:1, None]})
        wanted = upscale(model, stack[:1], axis=0, consistency=consistency)
        np.testing.assert_allclose(sr[:, 0], wanted, atol=atol, rtol=0, err_msg=name)


class Louder(VisionMambaBlock):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * super().forward(x)


def changed_blocks() -> DeformMambaSR:
    """A model with a subclass of a block, a parametrization and a hook, which the exporter's graphs do not have."""
    model = small()
    first, second = (block for block in model.modules() if type(block) is VisionMambaBlock)
    first.__class__ = Louder
    torch.nn.utils.parametrizations.weight_norm(second.gate)
    deformed = next(block for block in model.modules() if type(block) is ModulatedDeformBlock)
    deformed.register_forward_hook(lambda block, inputs, y: 2 * y)
    return model


def test_the_graph_of_a_changed_block_is_left_to_pytorch() -> None:
    changed, plain = ([type(block) for _, block in onnx.hide_blocks(model)] for model in (changed_blocks(), small()))
    assert plain.count(VisionMambaBlock) == 2
    assert VisionMambaBlock not in changed
    assert changed.count(ModulatedDeformBlock) == plain.count(ModulatedDeformBlock) - 1


@pytest.mark.long
def test_a_model_with_changed_blocks_can_be_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    assert export(changed_blocks(), tmp_path / "m.onnx", format="onnx", inputs="lr,base").difference < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("zoh", [False, LONG(True)])
def test_the_variant_for_gpus_gives_the_same(tmp_path: Path, zoh: bool) -> None:
    """The test runs on the CPU. The graph has one operator per scan and no loop."""
    pytest.importorskip("onnxscript")
    checker, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    if checker.defs.onnx_opset_version() < onnx.OPSETS["linear-attention"]:
        pytest.skip("the installed onnx has no LinearAttention")
    if tuple(int(n) for n in onnxruntime.__version__.split(".")[:2]) < (1, 32):
        pytest.skip("the installed ONNX Runtime may have no LinearAttention")
    model = small(skip="zero-fill", discretization="zoh" if zoh else "euler", directions=2 if zoh else 4)
    done = export(model, tmp_path / "m.onnx", format="onnx", inputs="lr,base", variant="linear-attention")
    file = checker.load(tmp_path / "m.onnx")
    checker.checker.check_model(file)
    assert done.facts["variant"] == "linear-attention"
    kinds = [node.op_type for node in file.graph.node]
    assert kinds.count("LinearAttention") == sum(isinstance(part, SS2D) for part in model.modules())
    assert "Scan" not in kinds
    lr = image(9, 14, 2)
    with torch.no_grad():
        got = onnx.runner(tmp_path / "m.onnx")({"lr": lr, "base": zero_fill(lr, 2)})
        torch.testing.assert_close(got, model(lr), atol=1e-5, rtol=0)


@pytest.mark.long
def test_an_onnx_file_for_tiles_takes_base(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = small(skip="zero-fill")
    done = export(model, tmp_path / "m.onnx", format="onnx", inputs="lr,base")
    lr = image(9, 14)
    with torch.no_grad():
        got = onnx.runner(tmp_path / "m.onnx")({"lr": lr, "base": zero_fill(lr, 2)})
        torch.testing.assert_close(got, model(lr), atol=1e-5, rtol=0)
    assert list(json.loads(done.facts["inputs"])) == ["lr", "base"]


def test_weights_for_the_slice_direction_describe_their_use() -> None:
    """The metadata contain the training data; with the `units` they name, the file computes what `isotropic` does."""
    recipe = {"data": {"kind": "thick", "ratio": [2.0, 6.0], "boxcar": 0.25}}
    model = small(scale=1, patch=2)
    model.provenance.update(recipe=recipe, spacings_mm=[0.7, 1.2])
    facts = deformmamba.export._facts(model, None, 8, "lr", "off")
    told = json.loads(facts["slice_direction"])
    assert told["axis"] == "h"
    assert told["ratios"] == [2.0, 6.0]
    assert told["thickness"] == [0.8, 1.2]  # the default of the data set
    assert told["profiles"] == {"gaussian": 0.75, "boxcar": 0.25}
    assert told["slice_distances_mm"] == [1.4, 7.2]
    section = scan(20, 18, 1) - 40
    low, high = robust_range(section)
    units = torch.tensor([low, high - low, whole_slice.NO_FLOOR])
    with torch.no_grad():
        got = WholeSlice(model, "off").eval()(torch.from_numpy(section)[:, None], units)
        wanted = model(torch.from_numpy((section - low) / (high - low))[:, None]) * (high - low) + low
    np.testing.assert_allclose(got.numpy(), wanted.numpy(), rtol=0, atol=SHARE * (high - low))
    plain = deformmamba.export._facts(small(), None, 8, "lr", "off")
    assert json.loads(plain["slice_direction"]) is None


def test_the_licence_follows_the_file_and_the_name_holds_no_folder() -> None:
    model, entry = small(), weights_entry("ixi-4x")
    for source, sha256, provenance, name, licence in (
        ("ixi-4x", entry["sha256"], {}, "ixi-4x", entry["license"]),
        ("/home/anna/copy.safetensors", entry["sha256"], {}, "copy.safetensors", entry["license"]),
        ("runs/mine/best.safetensors", "0" * 64, {"license": "CC0-1.0"}, "best.safetensors", "CC0-1.0"),
        ("org/repo@123", "0" * 64, {"hub": "org/repo@123"}, "org/repo@123", ""),
        (None, None, {}, "", ""),
    ):
        model.source, model.sha256, model.provenance = source, sha256, provenance
        facts = deformmamba.export._facts(model, None, 8, "lr", "off")
        assert (facts["name"], facts["licence"]) == (name, licence)


@pytest.mark.skipif("ONEDNN_MAX_CPU_ISA" in os.environ, reason="OpenVINO does not run with oneDNN's older instructions")
@pytest.mark.parametrize(("patch", "channels"), [(4, 16), (2, 3)])
def test_the_patch_embedding_is_right_in_bfloat16(tmp_path: Path, patch: int, channels: int) -> None:
    """A convolution with kernel = stride = 4 and 16 channels gives wrong numbers in OpenVINO on CPUs with AMX."""
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    layer = PatchEmbed(channels, 40, patch)
    path = tmp_path / "embed.onnx"
    path.write_bytes(onnx_file(onnx._patch_embed, layer, ["b", channels, "h", "w"]))
    image = torch.randn(2, channels, 3 * patch, 5 * patch)
    wanted = layer(image).detach()
    # layer norm makes all values about 1; bfloat16 has 8 bits
    for precision, atol in (("f32", 1e-5), ("bf16", 0.1)):
        got = openvino.Compiled(path, {"INFERENCE_PRECISION_HINT": precision})({"x": image})
        torch.testing.assert_close(got, wanted, atol=atol, rtol=0)


@pytest.mark.long
def test_an_openvino_file_gives_what_upscale_gives(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    model = small(skip="zero-fill")
    done = export(model, tmp_path / "m.xml", format="openvino", consistency="off")
    assert done.difference < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.bin", "m.xml"]
    stack = scan(11, 16, 1)
    got = openvino.runner(tmp_path / "m.xml")({"lr": torch.from_numpy(stack[:, None]), "units": torch.zeros(3)})
    wanted = upscale(model, stack, axis=0, consistency="off")
    np.testing.assert_allclose(got[:, 0].numpy(), wanted, atol=1e-5 * stack.max())


@pytest.mark.slow
def test_a_signal_does_not_end_a_process_that_ran_openvino(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    export(small(skip="zero-fill"), tmp_path / "m.xml", format="openvino", consistency="off")
    script = f"""
import faulthandler, signal, torch
from pathlib import Path
from deformmamba.export import openvino

faulthandler.enable()  # has a signal stack of its own, as under pytest and in notebooks
signal.signal(signal.SIGINT, lambda number, frame: print("received", flush=True))
path = Path({str(tmp_path / "m.xml")!r})
inputs = dict(lr=torch.rand(1, 1, 16, 16), units=torch.zeros(3))
first, second = openvino.runner(path), openvino.runner(path)
first(inputs), second(inputs)
del first
del second
third = openvino.runner(path)
signal.raise_signal(signal.SIGINT)
del third
signal.raise_signal(signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "received\nreceived\n"), done.stderr


@pytest.mark.parametrize(("h", "w", "scale"), [(8, 6, 2), (9, 6, 3), (7, 9, 4), (12, 16, 4)])
def test_real_matrices_are_the_fourier_transforms(h: int, w: int, scale: int) -> None:
    """In float64, both agree up to rounding."""
    generator = torch.Generator().manual_seed(h)
    x = torch.randn(2, 1, h, w, generator=generator, dtype=torch.float64)
    hr = torch.randn(2, 1, scale * h, scale * w, generator=generator, dtype=torch.float64)
    rows, columns = (whole_slice.axis(n, scale, x) for n in (h, w))
    close = partial(torch.testing.assert_close, atol=1e-12, rtol=0)
    close(whole_slice.zero_fill(x, rows, columns), zero_fill(x, scale))
    real, imaginary = whole_slice.lowpass(hr, rows, columns, scale)
    close(torch.complex(real, imaginary), lowpass(hr, scale))
    gate = edges.cut_edges(x)
    close(whole_slice.smooth_part(x, gate), edges.smooth_part(x, gate=gate))
    close(whole_slice.cubic(x, rows, columns), edges.cubic(x, scale))
    signed = data_consistency(hr, x, scale, magnitude=False)
    close(hr + whole_slice.back_projected(x - real, torch.zeros_like(x), rows, columns), signed)


@pytest.mark.slow
def test_a_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test breaks the exporter: it scans the columns as rows."""
    monkeypatch.setattr(pt2, "_transposed", lambda x, height, width: x)
    (tmp_path / "m.pt2").write_bytes(b"yesterday's")
    with pytest.raises(
        ExportError, match=r"m\.pt2: the exported DeformMambaSR differs from the model by [\d.e-]+, more"
    ):
        export(
            small(deform=False, context=False), tmp_path / "m.pt2",
            format="pt2", size=(5, 4), inputs="lr,base", tolerance=1e-5,
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]
    assert (tmp_path / "m.pt2").read_bytes() == b"yesterday's"


def test_a_model_that_gives_nan_is_refused(tmp_path: Path) -> None:
    model = small(deform=False, context=False, directions=1)
    model.project.bias.data.fill_(float("nan"))
    for inputs in ("lr", "lr,base"):
        with pytest.raises(ExportError, match="DeformMambaSR gives NaN or infinite values on slices of a real scan"):
            export(model, tmp_path / "m.pt2", format="pt2", size=(5, 4), inputs=inputs)
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deformmamba.export, "_write", lambda *arguments: arguments[3].touch())
    monkeypatch.setattr(pt2, "runner", lambda path: lambda inputs: torch.zeros(1))
    model = small(drop_path=0.5).double().train()
    with pytest.raises(ExportError):
        export(model, tmp_path / "m.pt2", format="pt2")
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.float64}


class Unexportable(SRModel):
    """A model that branches on values, which no graph can represent."""

    def __init__(self, *, scale: int = 2, intensity: str = "p99.9") -> None:
        super().__init__(scale=scale, intensity=intensity)

    def forward(self, lr: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        big = lr.repeat_interleave(2, -1).repeat_interleave(2, -2)
        return big * 2 if lr.mean() > 0.5 else big


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "tflite"}, "unknown export format 'tflite'; formats: onnx, openvino, pt2"),
        *(
            (
                {"format": "pt2", "size": size},
                rf"size is {re.escape(repr(size))}; it must be \(h, w\) of 4 to 16384 each",
            )
            for size in ((8,), (8, 8, 8), 8, (8.5, 8), "88", (None, 8))
        ),
        *(
            ({"format": "pt2", "tolerance": share}, f"tolerance is {share}; it must be a share of the intensity scale")
            for share in (0, -1, 1, float("nan"))
        ),
        ({"format": "pt2", "inputs": "lr,base", "consistency": "object"}, 'a file with inputs "lr,base" contains the'),
        ({"format": "pt2", "size": (0, 4)}, r"size is \(0, 4\); it must be \(h, w\) of 4 to 16384 each"),
        ({"format": "pt2", "size": (8, 20000)}, r"size is \(8, 20000\); it must be \(h, w\) of 4 to 16384 each"),
        ({"format": "pt2", "inputs": "base"}, 'inputs is \'base\'; it must be "lr", "lr,units" or "lr,base"'),
        ({"format": "pt2", "consistency": "always"}, 'consistency must be "exact", "object" or "off"'),
        (
            {"format": "pt2", "variant": "linear-attention"},
            "variant is 'linear-attention'; it must be \"scan\", or with",
        ),
        pytest.param(
            {"format": "pt2", "size": (4, 4)}, "torch .* cannot export Unexportable to pt2: ", marks=pytest.mark.slow
        ),
    ],
)
def test_what_cannot_be_exported_is_one_line(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        export(Unexportable(), tmp_path / "m", **arguments)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ExportError, match="there is no folder"):
        export(Unexportable(), tmp_path / "none" / "m", format="pt2")
    with pytest.raises(ExportError, match=r"m\.pt2: format is 'onnx', whose files end in \.onnx"):
        export(Unexportable(), tmp_path / "m.pt2", format="onnx")
    with pytest.raises(ExportError, match=r"m\.PT2: format is 'onnx', whose files end in \.onnx"):
        export(Unexportable(), tmp_path / "m.PT2", format="onnx")
    with pytest.raises(ExportError, match=r"an OpenVINO file must end in \.xml"):
        export(Unexportable(), tmp_path / "m.XML", format="openvino")
    with pytest.raises(ExportError, match="/dev/null is not a regular file; choose another name"):
        export(Unexportable(), "/dev/null", format="pt2")
    with pytest.raises(ExportError, match="is a folder; give the name of a file in it"):
        export(Unexportable(), tmp_path, format="pt2")
    for name in ("a\0.pt2", "a\0/b.pt2", "a" * 300 + ".pt2", "a" * 300 + "/b.pt2", "\ud800\0.pt2"):
        with pytest.raises(ExportError, match=r"a file cannot have this name: .*; choose another one") as caught:
            export(Unexportable(), tmp_path / name, format="pt2")
        assert str(caught.value).isprintable()


def test_a_model_that_extends_edges_needs_as_many_pixels(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"size is \(7, 9\); it must be \(h, w\) of 8 to 16384 each"):
        export(small(skip="zero-fill-robust", normalise="slice"), tmp_path / "m", format="pt2", size=(7, 9))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (torch.nn.Linear(1, 1), {}, "the model is a Linear; give a model of deformmamba or the name of weights"),
        (None, {}, "the model is a NoneType; give"),
        (Unexportable(), {"path": None}, "export: path must be a text or a path, not None"),
        (Unexportable(), {"tolerance": "1e-4"}, "export: tolerance must be a number, not '1e-4'"),
        (Unexportable(), {"format": 3}, "export: format must be a text, not 3"),
        (SRCNN(scale=2).to("meta"), {}, 'on the device "meta" weights have no values'),
    ],
)
def test_arguments_of_a_wrong_type_are_one_line(model: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidType, match=re.escape(message)):
        export(model, **{"path": "m.pt2", "format": "pt2", **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "portable_program: module must be an instance of Module, not None"),
        ((torch.relu, (torch.ones(2),)), "portable_program: module must be an instance of Module, not a builtin"),
        ((torch.nn.ReLU(), [torch.ones(2)]), "args must be a tuple of the inputs, such as (x,), not a list"),
        ((torch.nn.ReLU(), torch.ones(2)), "args must be a tuple of the inputs, such as (x,), not a Tensor"),
        ((torch.nn.ReLU(), (), [torch.ones(2)]), "kwargs must be an instance of dict or None, not a list"),
    ],
)
def test_what_a_portable_program_is_made_of_is_checked(arguments: Any, message: str) -> None:
    with pytest.raises(InvalidType, match=re.escape(message)) as caught:
        deformmamba.export.portable_program(*arguments)
    assert "\n" not in str(caught.value)


def test_the_reason_of_a_failed_export_is_the_first_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.onnx raises it: colours and advice around the reason."""

    def fails(*_: object, **__: object) -> None:
        try:
            raise LookupError("No ONNX function found for aten.new_zeros")
        except LookupError as error:
            raise RuntimeError("\x1b[96mThis is step 3/3\x1b[0m\nNext steps:\n- ...") from error

    monkeypatch.setattr(deformmamba.export, "portable_program", fails)
    with pytest.raises(ExportError) as caught:
        export(SRCNN(scale=2), tmp_path / "m.pt2", format="pt2", size=(8, 8))
    assert str(caught.value).endswith(
        "cannot export SRCNN to pt2: LookupError: No ONNX function found for aten.new_zeros"
    )


@pytest.mark.long
def test_zero_filling_is_exported_without_complex_numbers(tmp_path: Path) -> None:
    assert export(ZeroFill(scale=2), tmp_path / "m.onnx", format="onnx").difference < 1e-5


@torch.no_grad()
def test_zero_filling_of_a_whole_slice_uses_real_matrices() -> None:
    lr = image(9, 8)
    model = ZeroFill(scale=2)
    got = WholeSlice(model, "off")(lr, torch.tensor([0, 1, whole_slice.NO_FLOOR]))
    assert_close(got, model(lr))
    traced = torch.fx.experimental.proxy_tensor.make_fx(WholeSlice(model, "off"))(lr, torch.zeros(3))
    assert "fft" not in traced.code


@pytest.mark.slow
def test_an_export_does_not_depend_on_the_default_device(tmp_path: Path) -> None:
    torch.set_default_device("meta")
    try:
        done = export(ZeroFill(scale=2), tmp_path / "m.pt2", format="pt2", size=(8, 8))
    finally:
        torch.set_default_device(None)
    assert done.difference < 1e-5


class OwnSkip(Unexportable):
    skip = "blurred"


def test_what_a_whole_slice_cannot_contain_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="OwnSkip has the skip 'blurred'; a file for whole slices computes"):
        export(OwnSkip(), tmp_path / "m.pt2", format="pt2")
    with pytest.raises(ExportError, match='takes 3 channels; a file for whole slices takes one, use inputs "lr,base"'):
        export(small(in_channels=3), tmp_path / "m.pt2", format="pt2")


def test_a_folder_that_cannot_be_written_stops_the_export_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(deformmamba.export.tempfile, "TemporaryFile", refused)
    monkeypatch.setattr(deformmamba.export, "_images", None)  # nothing is computed
    with pytest.raises(
        ExportError, match=r"m\.pt2: cannot write to its folder: Permission denied; choose another folder"
    ):
        export(SRCNN(scale=2), tmp_path / "m.pt2", format="pt2")


@pytest.mark.parametrize("format", deformmamba.export.FORMATS)
@pytest.mark.parametrize("reason", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_export_that_stops_leaves_the_former_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, reason: BaseException
) -> None:
    """A full disk, and ctrl-C, in the middle of writing."""
    monkeypatch.setattr(deformmamba.export, "NEEDS", dict.fromkeys(deformmamba.export.FORMATS, ()))
    monkeypatch.setattr(onnx, "newest_opset", lambda: 99)
    path = tmp_path / f"m{deformmamba.export.ENDINGS[format]}"
    for name in (path, path.with_suffix(".bin")):
        name.write_bytes(b"yesterday's")

    def write(*arguments: Any) -> None:
        temporary: Path = arguments[3]
        temporary.write_bytes(b"half")
        if format == "openvino":
            temporary.with_suffix(".bin").write_bytes(b"half")
        raise reason

    monkeypatch.setattr(deformmamba.export, "_write", write)
    with pytest.raises(ExportError if isinstance(reason, OSError) else KeyboardInterrupt) as caught:
        export(SRCNN(scale=2), path, format=format)
    assert not isinstance(reason, OSError) or str(caught.value) == f"{path}: cannot be written: No space left on device"
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert kept == {path.name: b"yesterday's", "m.bin": b"yesterday's"}


@pytest.mark.parametrize("there", [True, False])
def test_both_files_of_a_pair_are_new_or_both_are_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """A signal comes between the two renames."""
    first, second = tmp_path / "m.xml", tmp_path / "m.bin"
    before = {path.name: f"old {path.name}" for path in ((first, second) if there else ())}
    for name, text in before.items():
        (tmp_path / name).write_text(text)

    def written() -> None:
        with atomic.renamed_pair(first, second) as names:
            for name in names:
                name.write_text("new")

    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if target == first:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
    monkeypatch.setattr(os, "replace", replace)
    written()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"m.xml": "new", "m.bin": "new"}


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ExportError, match=r"ONNX needs .*onnxruntime; install it with: pip install 'deformmamba\[export\]'"
    ):
        export(small(), tmp_path / "m.onnx", format="onnx")


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, file = tmp_path / "small.safetensors", tmp_path / "small.pt2"
    model = small(deform=False, context=False, directions=1)
    write_checkpoint(
        weights, class_name="DeformMambaSR", config=model.config, tensors=model.state_dict(), provenance={}
    )
    arguments = ["export", "--format", "pt2", "--inputs", "lr,base", "--model", str(weights), "-o"]
    assert main([*arguments, str(file), "--size", "5", "4"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{file}: small as pt2, input size 5x4, batch 1"
    assert second.startswith("  largest difference from the model on 5x4 pixels of a real scan: ")
    assert file.is_file()
    assert main([*arguments, str(tmp_path / "none" / "x.pt2")]) == 2
    assert "there is no folder" in capsys.readouterr().err
