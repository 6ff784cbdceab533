"""Which files in a folder count as scans for training and scoring, and how files with several volumes are read."""

import json

import nibabel
import numpy as np
import pytest

from deformmamba import evaluate
from deformmamba.data.patches import PatchDataset
from deformmamba.data.prepare import plan_folder, prepare
from deformmamba.data.prepared import read_prepared
from deformmamba.data.scans import Scan, find_scans, load_slices
from deformmamba.models import ZeroFill
from deformmamba.physics.degradations import parse
from deformmamba.volume import VolumeError


def write(path, array, intent=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(np.asarray(array), np.diag([1, 1, 3, 1]))
    if intent:
        image.header.set_intent(intent)
    nibabel.save(image, path)
    return path


@pytest.fixture
def folder(tmp_path, phantom):
    for subject in ("sub-1", "sub-2"):
        write(tmp_path / subject / "anat" / f"{subject}_T2w.nii.gz", phantom)
    own = tmp_path / "sub-1" / "anat"
    write(own / "sub-1_dseg.nii.gz", phantom)
    write(own / "sub-1_desc-brain_mask.nii.gz", (phantom > 100).astype(np.uint8))
    write(own / "sub-1_regions.nii.gz", phantom, intent="label")
    write(own / "sub-1_part-phase_T2w.nii.gz", phantom)
    write(own / "sub-1_lesions.nii.gz", (phantom > 700).astype(np.int16))
    write(own / "sub-1_desc-sr_T2w.nii.gz", phantom)
    (own / "sub-1_desc-sr_T2w.json").write_text(json.dumps({"GeneratedBy": [{"Name": "deformmamba"}]}))
    write(tmp_path / "derivatives" / "sub-1" / "sub-1_T2w.nii.gz", phantom)
    return tmp_path


NAMES = ["sub-1/anat/sub-1_T2w.nii.gz", "sub-2/anat/sub-2_T2w.nii.gz"]


def test_masks_labels_phases_and_own_outputs_are_left_out_with_the_reason(folder):
    reasons = {}
    scans = find_scans(folder, passed=lambda path, reason: reasons.update({path.name: reason}))
    assert [scan.path.relative_to(folder).as_posix() for scan in scans] == NAMES
    assert len(reasons) == 7
    assert "mask" in reasons["sub-1_lesions.nii.gz"]
    assert "label" in reasons["sub-1_regions.nii.gz"]
    assert "phase" in reasons["sub-1_part-phase_T2w.nii.gz"]
    assert "output of this package" in reasons["sub-1_desc-sr_T2w.nii.gz"]
    with pytest.warns(UserWarning, match=r"7 files left out: derivatives/sub-1.* and 2 more"):
        assert len(find_scans(folder)) == 2


def test_bold_and_diffusion_of_a_bids_data_set_are_left_out(folder, phantom):
    for kind in ("func", "dwi"):
        write(folder / "sub-1" / kind / "sub-1_bold.nii.gz", np.stack([phantom, phantom], -1))
    write(folder / "sub-3" / "ses-1" / "fmap" / "sub-3_epi.nii.gz", phantom)
    reasons = {}
    scans = find_scans(folder, passed=lambda path, reason: reasons.update({path.parent.name: reason}))
    assert [scan.path.relative_to(folder).as_posix() for scan in scans] == NAMES
    for kind in ("func", "dwi", "fmap"):
        assert reasons[kind] == f"a scan in {kind}/ of a BIDS data set; volumes.tsv can list it"
    assert len(find_scans(folder / "sub-1" / "func")) == 1


def test_a_list_may_name_scans_elsewhere(tmp_path, phantom):
    elsewhere = write(tmp_path / "elsewhere" / "a.nii", phantom)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "volumes.tsv").write_text(f"participant_id\tfile\tsplit\nsub-01\t{elsewhere}\ttrain\n")
    prepare(plan_folder(tmp_path / "in"), tmp_path / "out")
    assert len(find_scans(tmp_path / "out")) == 1


def test_what_cannot_be_replaced_here_is_not_offered(tmp_path, phantom):
    broken = phantom.copy()
    broken[0, 0, 0] = np.nan
    path = write(tmp_path / "in" / "sub-01.nii", broken)
    with pytest.raises(VolumeError, match=r"voxels are NaN or infinite; replace them and save the file$"):
        load_slices(path)
    with pytest.raises(VolumeError, match=r"NaN or infinite; replace them and save the file; repair or remove"):
        prepare(plan_folder(tmp_path / "in"), tmp_path / "out", skip_unusable=False)


def test_signs_are_kept_in_scores_and_refused_in_training(tmp_path, phantom):
    """A scan in units of its standard deviation: scores are those of the scan with an offset."""
    plain = write(tmp_path / "plain.nii", phantom)
    signed = write(tmp_path / "signed.nii", (phantom - phantom.mean()) / phantom.std())
    model = ZeroFill(scale=2)
    (wanted,) = evaluate(model, [plain])
    with pytest.warns(UserWarning, match=r"signed.nii: the scan has negative .*output=real is used instead"):
        (found,) = evaluate(model, [signed])
    assert found["nmse"] * np.square(phantom - phantom.mean()).sum() == pytest.approx(
        wanted["nmse"] * np.square(phantom).sum(),
        rel=0.3,  # a magnitude folds the ringing in air
    )
    with pytest.warns(UserWarning, match="signed.nii: the scan has negative voxels, and .* gives magnitudes"):
        evaluate(model, [signed], degradation=parse("k-space >> rician:snr=30", scale=2))
    with pytest.raises(VolumeError, match=r"signed.nii: \d+ % of its voxels are negative, and this training"):
        PatchDataset([Scan(signed, "a", "train", "")], scale=2, patch=8, length=1)


def test_a_preparation_lists_what_it_left_out(folder, tmp_path_factory):
    manifest = prepare(plan_folder(folder), tmp_path_factory.mktemp("out") / "slices")
    assert [row["source"] for row in manifest["volumes"]] == NAMES
    assert len(manifest["skipped"]) == 7
    assert all(row["reason"] for row in manifest["skipped"])


def test_endings_are_those_of_the_reader(tmp_path, phantom):
    write(tmp_path / "sub-1.nii", phantom)
    (tmp_path / "sub-1.nii").rename(tmp_path / "sub-1.NII")
    nibabel.save(nibabel.MGHImage(phantom.astype(np.float32), np.eye(4)), tmp_path / "sub-2.mgh")
    assert [scan.path.name for scan in find_scans(tmp_path)] == ["sub-1.NII", "sub-2.mgh"]


def test_every_volume_of_a_file_with_several_counts(tmp_path, phantom):
    path = write(tmp_path / "sub-1_bold.nii.gz", np.stack([phantom, phantom * 2, phantom[::-1]], -1))
    (scan,) = find_scans(tmp_path, val=0, test=0)
    slices = load_slices(scan).array
    wanted = [np.moveaxis(array, 2, 0) for array in (phantom, phantom * 2, phantom[::-1])]
    np.testing.assert_allclose(slices, np.concatenate(wanted), rtol=1e-6)
    assert len(PatchDataset([scan], scale=2, patch=8, length=1).groups[0]) == 18
    assert evaluate(ZeroFill(scale=2), [scan])[0]["slices"] == 18
    manifest = prepare(plan_folder(tmp_path, val=0, test=0), tmp_path / "out")
    assert manifest["volumes"][0]["slices"] == 18
    assert len(read_prepared(tmp_path / "out" / manifest["volumes"][0]["file"]).slices) == 18
    with pytest.raises(VolumeError, match="holds 3 prepared volumes; use all slices of these"):
        prepare(plan_folder(tmp_path, slices="central:2"), tmp_path / "some", skip_unusable=False)
    assert path.is_file()


def test_noise_depends_on_the_scan_and_not_on_its_name(tmp_path, phantom):
    paths = [write(tmp_path / name / "T2.nii.gz", array) for name, array in (("a", phantom), ("b", phantom[::-1]))]
    paths.append(write(tmp_path / "c" / "other name.nii.gz", phantom))
    seen = {}

    class Watched(ZeroFill):
        def forward(self, lr, base=None):
            return super().forward(lr)

    degradation = parse("k-space >> noise:snr=10", scale=2)
    for path in paths:
        visit = lambda scan, hr, sr: seen.update({scan.path.parent.name: sr - degradation.scale * 0})  # noqa: E731
        evaluate(Watched(scale=2), [path], degradation=degradation, visit=visit)
    assert np.array_equal(seen["a"], seen["c"])
    clean = {}
    for path in paths[:2]:
        visit = lambda scan, hr, sr: clean.update({scan.path.parent.name: sr})  # noqa: E731
        evaluate(Watched(scale=2), [path], degradation=parse("k-space", scale=2), visit=visit)
    noise = [(seen[name] - clean[name]).flatten() for name in "ab"]
    assert abs(np.corrcoef(*noise)[0, 1]) < 0.1


def test_scans_given_one_by_one_have_the_subjects_of_their_folders(tmp_path, phantom):
    paths = [write(tmp_path / name, phantom) for name in ("anna/T1.nii", "anna/T2.nii", "ben/T1.nii")]
    rows = evaluate(ZeroFill(scale=2), paths)
    assert [row["subject"] for row in rows] == ["anna", "anna", "ben"]
    assert evaluate(ZeroFill(scale=2), [Scan(paths[0], "x", "", ""), paths[2]])[0]["subject"] == "x"


def test_a_preparation_leaves_out_empty_scans_and_offers_only_what_it_has(tmp_path, phantom):
    holes = phantom.astype(np.float32)
    holes[3, 3, 1] = np.nan
    for number, array in enumerate((phantom, holes, np.zeros(phantom.shape, np.float32)), 1):
        write(tmp_path / "scans" / f"sub-{number}_T2w.nii.gz", array)
    manifest = prepare(plan_folder(tmp_path / "scans"), tmp_path / "out")
    assert [row["subject"] for row in manifest["volumes"]] == ["sub-1"]
    reasons = [row["reason"] for row in manifest["skipped"]]
    assert "NaN or infinite; replace them and save the file" in reasons[0]
    assert "--nan" not in reasons[0]
    assert reasons[1] == "sub-3_T2w.nii.gz: all voxels of its slices are 0"


def test_a_preparation_takes_scans_in_folders_with_long_names(tmp_path, phantom):
    folder = tmp_path / "scans" / "sub-1" / ("1." + "2" * 100) / ("1." + "3" * 100)
    write(folder / "a_very_long_name_of_a_series.nii.gz", phantom)
    write(folder / "a_very_long_name_of_a_series_too.nii.gz", phantom)
    manifest = prepare(plan_folder(tmp_path / "scans"), tmp_path / "out")
    names = {row["file"] for row in manifest["volumes"]}
    assert len(names) == 2
    assert all((tmp_path / "out" / name).is_file() and len(name) <= 255 for name in names)
