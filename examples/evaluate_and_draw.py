"""Models compared on a scan, and the paper's figure 2: `python examples/evaluate_and_draw.py scan.nii.gz figure.png`.

The scan is the truth. It is first degraded by a factor of four, as by a scanner that measures less of k-space.
`deformmamba evaluate ixi-4x --data scan.nii.gz --figure figure.png` does the same.
"""

import argparse

from deformmamba import from_pretrained
from deformmamba.evaluation.compare import compare
from deformmamba.models import Bicubic, ZeroFill
from deformmamba.pictures.figures import comparison

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("scan")
parser.add_argument("figure")
args = parser.parse_args()
models = {"bicubic": Bicubic(scale=4), "zero-filled k-space": ZeroFill(scale=4), "ixi-4x": from_pretrained("ixi-4x")}
found = compare(models, [args.scan], against="zero-filled k-space", show=True)
print(found.table())
assert found.shown is not None
comparison(found.shown.hr, found.shown.results, args.figure, spacing=found.shown.spacing, title=found.shown.title)
