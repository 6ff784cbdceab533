"""Upscales a scan and writes an HTML report: `python examples/upscale_a_volume.py scan.nii.gz sharper.nii.gz`.

Does the same as `deformmamba upscale scan.nii.gz -o sharper.nii.gz --report sharper.html`, from Python.
"""

import argparse
from pathlib import Path

from deformmamba import from_pretrained, upscale_file

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("scan", type=Path)
parser.add_argument("output", type=Path)
args = parser.parse_args()
model = from_pretrained("ixi-4x")
report = args.output.with_name(args.output.name.split(".")[0] + ".html")
done = upscale_file(model, args.scan, args.output, report=report, progress=True)
print(f"{args.output}: {done.shape}, voxels of {[round(mm, 3) for mm in done.place.spacing]} mm, {done.seconds:.1f} s")
