"""Upscales a scan and writes an HTML report: `python examples/upscale_a_volume.py scan.nii.gz sharper.nii.gz`.

Does the same as `deformmamba upscale scan.nii.gz -o sharper.nii.gz --report sharper.html`, from Python.
"""

import sys
from pathlib import Path

from deformmamba import from_pretrained, upscale_file

source, target = map(Path, sys.argv[1:])
model = from_pretrained("ixi-4x")
done = upscale_file(model, source, target, report=target.with_name(target.name.split(".")[0] + ".html"), progress=True)
print(f"{target}: {done.shape}, voxels of {[round(mm, 3) for mm in done.place.spacing]} mm, {done.seconds:.1f} s")
