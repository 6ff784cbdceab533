"""Builds the page that runs the network in a browser: a folder of static files.

Run: python web/build.py [-o build/web] [--weights ixi-4x ixi-2x]

Needs Node's npm and the extra `export`. Afterwards the folder contains everything that the page loads.
"""

import argparse
import json
import shutil
import subprocess
from pathlib import Path

import deformmamba
from deformmamba.export import export, smallest_side
from deformmamba.export.whole_slice import NO_FLOOR
from deformmamba.volume.inspection import FAR_SPACING
from deformmamba.weights import list_weights, weights_entry

HERE = Path(__file__).parent
PAGE = ("index.html", "style.css", "app.js", "volume.js", "worker.js")
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.mjs")


def build(out: Path, names: list[str], files: Path | None = None) -> None:
    """Fills the folder `out`. `files`: a folder with NAME.onnx of earlier exports, which are not exported again."""
    out.mkdir(parents=True, exist_ok=True)
    if not (HERE / "node_modules" / "onnxruntime-web").is_dir():
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=HERE, check=True)
    runtime = HERE / "node_modules" / "onnxruntime-web"
    for name in PAGE:
        shutil.copyfile(HERE / name, out / name)
    for name in RUNTIME:
        shutil.copyfile(runtime / "dist" / name, out / name)
    entries = []
    for name in names:
        model = deformmamba.from_pretrained(name)
        path = out / f"{name}.onnx"
        if files is not None and (files / path.name).is_file():
            shutil.copyfile(files / path.name, path)
        else:
            export(model, path, format="onnx", inputs="lr,units")
        entry = weights_entry(name)
        entries.append(
            {
                "name": name,
                "scale": model.scale,
                "summary": entry["summary"],
                "licence": entry["license"],
                "sha256": model.sha256,
                "spacings_mm": model.provenance.get("spacings_mm"),
                "minimum_size": smallest_side(model),
                "any_intensity": model.any_intensity,
                "share": 1.0 if model.intensity == "max" else float(model.intensity.removeprefix("p")) / 100,
                "no_floor": NO_FLOOR,
                "far_spacing": FAR_SPACING,
            }
        )
    (out / "weights.json").write_text(json.dumps(entries, indent=1), "utf-8")
    (out / "licences.txt").write_text(_licences(entries), "utf-8")


def _licences(entries: list[dict[str, object]]) -> str:
    """The parts in the folder and their licences."""
    lines = ["Deform-Mamba page and package: Apache-2.0"]
    lines += [f"Weights {entry['name']}: {entry['licence']}" for entry in entries]
    package = HERE / "node_modules" / "onnxruntime-web"
    facts = json.loads((package / "package.json").read_text("utf-8"))
    lines += [f"{facts['name']} {facts['version']}: {facts['license']}, Copyright (c) Microsoft Corporation"]
    for path in sorted(package.glob("LICENSE*")):
        lines += ["", path.read_text("utf-8")]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=HERE.parent / "build" / "web")
    parser.add_argument(
        "--weights", nargs="+", default=[entry["name"] for entry in list_weights() if entry["scale"] > 1]
    )
    parser.add_argument("--exported", type=Path, help="a folder of earlier exports, NAME.onnx, to take over")
    args = parser.parse_args()
    build(args.output, args.weights, args.exported)
    print(f"{args.output}: open it with a web server, for example: python -m http.server -d {args.output}")


if __name__ == "__main__":
    main()
