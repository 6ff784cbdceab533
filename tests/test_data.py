"""Finding volumes, splitting them by subject, and cutting patches that lie where they should."""

import nibabel
import numpy as np
import pytest
import torch

from deformmamba.data import PatchDataset, Scan, find_scans, load_slices, subjects
from deformmamba.kspace import degrade, zero_fill
from deformmamba.volume import VolumeError


def write(path, array, spacing=(1, 1, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.asarray(array, np.float32), np.diag([*spacing, 1])), path)
    return path


@pytest.fixture
def folder(tmp_path, phantom):
    for subject in range(20):
        for session in (1, 2):
            write(tmp_path / f"sub-{subject:02d}" / f"ses-{session}" / "anat" / "T2w.nii.gz", phantom[:16, :16])
    return tmp_path


def test_a_folder_is_split_by_subject_and_a_new_subject_moves_no_other(folder, phantom):
    before = find_scans(folder, val=0.3, test=0.2)
    assert len(before) == 40
    assert len(subjects(before)) == 20
    assert {scan.split for scan in before} == {"train", "val", "test"}
    for subject in subjects(before):
        assert len({scan.split for scan in before if scan.subject == subject}) == 1
    write(folder / "sub-new" / "T2w.nii.gz", phantom[:16, :16])
    after = {scan.path: scan.split for scan in find_scans(folder, val=0.3, test=0.2)}
    assert all(after[scan.path] == scan.split for scan in before)
    assert [s.split for s in find_scans(folder, seed=1)] != [s.split for s in find_scans(folder)]


def test_an_index_decides_where_there_is_one(folder):
    rows = ["participant_id\tfile\tsplit\tcontrast\tanatomy"]
    rows += [f"sub-{i:02d}\tsub-{i:02d}/ses-1/anat/T2w.nii.gz\t{'test' if i else 'train'}\tT2\tbrain" for i in range(3)]
    (folder / "volumes.tsv").write_text("\n".join(rows))
    scans = find_scans(folder)
    assert [(s.subject, s.split, s.group) for s in scans] == [
        ("sub-00", "train", "T2 brain"), ("sub-01", "test", "T2 brain"), ("sub-02", "test", "T2 brain")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("sub-00\tsub-00/ses-1/anat/T2w.nii.gz\tlater", "split 'later' of sub-00"),
        ("sub-00\tgone.nii.gz\ttrain", "missing file gone.nii.gz"),
        (
            "sub-00\tsub-00/ses-1/anat/T2w.nii.gz\ttrain\nsub-00\tsub-00/ses-2/anat/T2w.nii.gz\ttest",
            "in test and train",
        ),
    ],
)
def test_a_wrong_index_is_refused(folder, row, message):
    (folder / "volumes.tsv").write_text(f"participant_id\tfile\tsplit\n{row}\n")
    with pytest.raises(VolumeError, match=message):
        find_scans(folder)


def test_a_folder_without_volumes_is_refused(tmp_path):
    with pytest.raises(VolumeError, match="no volume there"):
        find_scans(tmp_path)
    with pytest.raises(VolumeError, match="no such folder"):
        find_scans(tmp_path / "gone")
    with pytest.raises(VolumeError, match="no scan to train on"):
        PatchDataset([], scale=2, length=1)


def test_slices_are_cropped_at_their_ends_to_a_multiple(tmp_path, phantom):
    slices, spacing = load_slices(write(tmp_path / "a.nii", phantom[:47, :38], spacing=(1, 1.5, 3)), 4)
    assert spacing == (1, 1.5)
    assert slices.shape == (6, 44, 36)
    np.testing.assert_array_equal(slices, np.moveaxis(phantom[:44, :36], 2, 0))


@pytest.fixture
def dataset(tmp_path, phantom):
    scan = Scan(write(tmp_path / "a.nii.gz", phantom), "a", "train", "T2")
    return PatchDataset([scan], scale=2, patch=8, length=40, contrast=1.5, gain=1.5, coarsest=1.5, seed=3)


def test_samples_depend_on_seed_and_index_alone(dataset):
    for index in (0, 7):
        for a, b in zip(dataset[index], dataset[index], strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(dataset[0].hr, dataset[1].hr)
    with pytest.raises(IndexError):
        dataset[40]
    assert dataset.spacings == (2, 3)


def test_lr_hr_and_base_lie_on_one_origin_aligned_grid(dataset):
    for sample in dataset:
        lr, hr, base = sample
        assert (lr.shape, hr.shape, base.shape) == ((1, 8, 8), (1, 16, 16), (1, 16, 16))
        torch.testing.assert_close(base[:, ::2, ::2], lr)  # zero-filling passes through the samples
        error = (hr - base).abs().mean()
        assert error < (hr - base.roll(1, -1)).abs().mean()
        assert error < (hr - base.roll(1, -2)).abs().mean()


def test_patches_are_cut_from_slices_that_were_degraded_whole(tmp_path, phantom):
    scan = Scan(write(tmp_path / "a.nii.gz", phantom), "a", "train", "T2")
    dataset = PatchDataset([scan], scale=2, patch=8, length=20, flips=False)
    whole = torch.from_numpy(np.moveaxis(phantom, 2, 0).copy())
    scale = float(np.percentile(degrade(whole, 2), 99.9))
    lr = degrade(whole / scale, 2)
    windows = lr.unfold(1, 8, 1).unfold(2, 8, 1)
    bases = zero_fill(lr, 2).unfold(1, 16, 2).unfold(2, 16, 2)
    for sample in dataset:
        distance = (windows - sample.lr[0]).abs().amax((-2, -1))
        where = divmod(int(distance.argmin()), distance[0].numel())
        position = divmod(where[1], distance.shape[2])
        assert distance.min() < 1e-2
        torch.testing.assert_close(sample.base[0], bases[where[0], *position], rtol=0.02, atol=0.02)


def test_groups_are_drawn_by_their_share(tmp_path, phantom):
    scans = [
        Scan(write(tmp_path / "a.nii", phantom), "a", "train", "bright"),
        Scan(write(tmp_path / "b.nii", phantom[::-1, ::-1]), "b", "train", "dark"),
        Scan(write(tmp_path / "c.nii", phantom), "c", "train", "never"),
    ]
    dataset = PatchDataset(scans, scale=2, patch=8, length=1, weights={"bright": 3, "dark": 1})
    assert dataset.shares.tolist() == [0.75, 1.0]
    assert len(dataset.groups) == 2


def test_a_patch_larger_than_the_slices_is_refused(tmp_path, phantom):
    scan = Scan(write(tmp_path / "a.nii", phantom), "a", "train", "T2")
    with pytest.raises(VolumeError, match="smaller than a patch"):
        PatchDataset([scan], scale=2, patch=32, length=1)
