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
PAGE = ("index.html", "style.css", "app.js", "files.js", "nifti.js", "dicom.js", "volume.js", "view.js", "worker.js")
PACKAGES = ("onnxruntime-web", "@niivue/niivue")
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.mjs")


def build(out: Path, names: list[str], files: Path | None = None) -> None:
    """Fills the folder `out`. `files`: a folder with NAME.onnx of earlier exports, which are not exported again."""
    out.mkdir(parents=True, exist_ok=True)
    if not all((HERE / "node_modules" / name).is_dir() for name in PACKAGES):
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=HERE, check=True)
    runtime = HERE / "node_modules" / "onnxruntime-web"
    for name in PAGE:
        shutil.copyfile(HERE / name, out / name)
    for name in RUNTIME:
        shutil.copyfile(runtime / "dist" / name, out / name)
    viewer = (HERE / "node_modules" / "@niivue" / "niivue" / "dist" / "index.js").read_text("utf-8")
    (out / "niivue.js").write_text(viewer.replace("//# sourceMappingURL=index.js.map", ""), "utf-8")
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
    """The parts of the folder with their licences. NiiVue's file includes most of the packages that it depends on."""
    lines = ["Deform-Mamba page and package: Apache-2.0"]
    lines += [f"Weights {entry['name']}: {entry['licence']}" for entry in entries]
    # these two packages come without the text
    own = {"@niivue/niivue": "niivue-licence.txt", "onnxruntime-web": "onnxruntime-licence.txt"}
    texts = [(name, (HERE / file).read_text("utf-8")) for name, file in own.items()]
    lock = json.loads((HERE / "package-lock.json").read_text("utf-8"))
    for path, facts in lock["packages"].items():
        folder = HERE / path
        if not path or facts.get("dev") or not folder.is_dir():  # the page itself; not part of it; for other systems
            continue
        name = path.removeprefix("node_modules/")
        lines.append(f"{name} {facts['version']}: {facts['license']}")
        texts += [(name, file.read_text("utf-8")) for file in sorted(folder.glob("LICENSE*"))]
    return "\n".join(lines) + "\n" + "".join(f"\n--- {name}\n\n{text.strip()}\n" for name, text in texts)


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
