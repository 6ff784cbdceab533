"""Finding volumes, splitting them by subject, and cutting patches at the right positions."""

import math

import nibabel
import numpy as np
import pytest
import torch
from tolerances import assert_close

from deformmamba.data import patches as data
from deformmamba.data.patches import PatchDataset, Scan, find_scans, load_slices, subjects
from deformmamba.physics.degradations import GaussianBlur, Subsample, parse
from deformmamba.physics.kspace import degrade, zero_fill
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
        (
            "sub-00\tsub-00/ses-1/anat/T2w.nii.gz\ttrain\nsub-01\t./sub-00/ses-1/anat/T2w.nii.gz\ttest",
            "line 3: ./sub-00/ses-1/anat/T2w.nii.gz is in line 2 too; list each file once",
        ),
    ],
)
def test_a_wrong_index_is_refused(folder, row, message):
    (folder / "volumes.tsv").write_text(f"participant_id\tfile\tsplit\n{row}\n")
    with pytest.raises(VolumeError, match=message):
        find_scans(folder)


def test_a_folder_without_volumes_is_refused(tmp_path):
    with pytest.raises(VolumeError, match="no volume found"):
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
    assert dataset.spacings == pytest.approx((2, 2 * 40 / 26))  # 40 / 1.5, rounded to a multiple of the scale


def test_lr_hr_and_base_lie_on_one_origin_aligned_grid(dataset):
    for sample in dataset:
        lr, hr, base, _ = sample
        assert (lr.shape, hr.shape, base.shape) == ((1, 8, 8), (1, 16, 16), (1, 16, 16))
        assert_close(base[:, ::2, ::2], lr)  # zero-filling keeps the samples
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


def test_inverted_samples_are_the_negatives_of_the_others(tmp_path, phantom):
    scan = Scan(write(tmp_path / "a.nii.gz", phantom[:40]), "a", "train", "T2")
    settings: dict = {"scale": 2, "patch": 20, "length": 40, "flips": False}
    plain, all_of_them, some = (PatchDataset([scan], **settings, invert=share) for share in (0.0, 1.0, 0.5))
    for index in range(3):  # the patch is the whole slice, so no position is drawn
        assert_close(all_of_them[index].hr, (1 - plain[index].hr).clamp(min=0))
    turned = [not torch.equal(some[index].hr, plain[index].hr) for index in range(40)]
    assert 10 < sum(turned) < 30


def test_lesions_are_bright_and_dark_and_lie_in_tissue(tmp_path, phantom):
    head = np.pad(np.tile(phantom[:40], (3, 3, 1)), ((20, 20), (20, 20), (0, 0)))
    scan = Scan(write(tmp_path / "a.nii.gz", head), "a", "train", "T2")
    settings: dict = {"scale": 2, "patch": 80, "length": 20, "flips": False}
    plain, ill, some = (PatchDataset([scan], **settings, lesions=share) for share in (0.0, 1.0, 0.5))
    change = torch.stack([ill[index].hr - plain[index].hr for index in range(20)])
    tissue, air = change[..., 20:140, 20:140], change[..., :10]
    assert tissue.max() > 0.2
    assert tissue.min() < -0.2
    assert 0.01 < (tissue.abs() > 0.05).float().mean() < 0.2
    assert tissue.mean().abs() < 0.2 * tissue.abs().mean()
    assert air.abs().max() < 1e-3
    assert 4 < sum(not torch.equal(some[index].hr, plain[index].hr) for index in range(20)) < 16


def test_groups_are_drawn_by_their_share(tmp_path, phantom):
    scans = [
        Scan(write(tmp_path / "a.nii", phantom), "a", "train", "bright"),
        Scan(write(tmp_path / "b.nii", phantom[::-1, ::-1]), "b", "train", "dark"),
        Scan(write(tmp_path / "c.nii", phantom), "c", "train", "never"),
    ]
    dataset = PatchDataset(scans, scale=2, patch=8, length=1, weights={"bright": 3, "dark": 1})
    assert dataset.shares.tolist() == [0.75, 1.0]
    assert len(dataset.groups) == 2


def test_a_sample_says_which_slice_it_is_of(tmp_path, phantom):
    shades = np.stack([phantom[:32, :32, 3], phantom[:32, :32, 3].T], -1) + 300.0
    paths = [write(tmp_path / f"{name}.nii.gz", shades + 500 * i) for i, name in enumerate("ab")]
    made = PatchDataset(
        [Scan(path, path.name, "train", "") for path in paths], scale=2, patch=16, length=20, flips=False, seed=3
    )
    for index in range(20):
        file, k = made.describe(index).split(", slice ")
        expected = (shades + 500 * ["a.nii.gz", "b.nii.gz"].index(file))[..., int(k)]
        hr = made[index].hr[0].numpy()
        np.testing.assert_allclose(hr / hr.max(), expected / expected.max(), rtol=1e-5)
    assert len({made.describe(index) for index in range(20)}) == 4


def test_a_patch_larger_than_the_slices_is_refused(tmp_path, phantom):
    scan = Scan(write(tmp_path / "a.nii", phantom), "a", "train", "T2")
    with pytest.raises(VolumeError, match="smaller than an HR patch"):
        PatchDataset([scan], scale=2, patch=32, length=1)


def mixed_sizes(tmp_path, phantom):
    """Slices of 48x40 with pixels of 1 mm, and of 20x18 with pixels of 2 mm."""
    small = phantom[::2, ::2][2:22, 1:19]
    scans = [
        Scan(write(tmp_path / "large.nii", phantom, (1, 1, 3)), "a", "train", "T2"),
        Scan(write(tmp_path / "small.nii", small, (2, 2, 3)), "b", "train", "T2"),
    ]
    return scans


def test_half_of_the_samples_are_coarser(tmp_path, phantom, monkeypatch):
    dataset = PatchDataset(mixed_sizes(tmp_path, phantom), scale=2, patch=8, length=300, coarsest=3.0)
    sizes = []
    resize = data.resize

    def watched(hr, size):
        sizes.append((tuple(hr.shape), size))
        return resize(hr, size)

    monkeypatch.setattr(data, "resize", watched)
    for sample in dataset:
        assert sample.lr.shape == (1, 8, 8)
    assert 100 < len(sizes) < 200
    reached = max(2 * max(b / a for b, a in zip(*one, strict=True)) * (2 if max(one[0]) == 20 else 1) for one in sizes)
    assert 0.9 * dataset.spacings[1] < reached <= dataset.spacings[1]
    factors = [max(before) / max(after) for before, after in sizes]
    assert min(factors) < 1.2
    assert max(f for (before, _), f in zip(sizes, factors, strict=True) if max(before) == 48) > 2
    for before, after in sizes:
        assert min(after) >= 16  # the patch
        if min(after) > 16:  # pixels stay square up to the rounding to a multiple of the scale
            assert before[0] / after[0] == pytest.approx(before[1] / after[1], rel=0.13)


@pytest.mark.slow
def test_a_patch_larger_than_a_coarse_slice_goes_on_at_the_opposite_edge(tmp_path, phantom):
    scan = Scan(write(tmp_path / "a.nii.gz", phantom), "a", "train", "T2")  # 48x40
    dataset = PatchDataset([scan], scale=2, patch=20, length=40, coarsest=2.0, flips=False)
    size = dataset._coarse_size(48, 40, 1.2)
    assert min(size) < 40
    assert min(dataset._coarse_size(48, 40, 9.0)) == 2 * 16  # at least 16 LR pixels remain
    wrapped = 0
    for index, sample in enumerate(dataset):
        drawn, factor, _ = dataset._draw(index)
        h, w = dataset._coarse_size(48, 40, factor)
        if factor == 1 or min(h, w) >= 40:
            continue
        wrapped += 1
        hr = data.resize(drawn.image / drawn.unit, (h, w)).abs()
        lr = dataset.degradation(hr)
        assert sample.hr.shape == (1, 40, 40)
        assert_close(sample.hr[0, :, : 40 - w], sample.hr[0, :, w:])
        # the patch is a part of the periodically continued slice, at the same position in LR and HR
        places = [
            (y, x)
            for y in range(h // 2)
            for x in range(w // 2)
            if torch.allclose(lr.roll((-y, -x), (0, 1))[:16, :16], sample.lr[0, :16, :16], atol=1e-6)
        ]
        assert len(places) == 1
        y, x = places[0]
        rolled = hr.roll((-2 * y, -2 * x), (0, 1))[: min(h, 40), : min(w, 40)]
        assert_close(sample.hr[0, : rolled.shape[0], : rolled.shape[1]], rolled)
    assert wrapped > 5


def test_spacings_are_those_that_samples_can_have(tmp_path, phantom):
    scans = mixed_sizes(tmp_path, phantom)
    options = {"scale": 2, "patch": 8, "length": 1}
    assert PatchDataset(scans, **options).spacings == (2, 4)
    # slices of 48x40 pixels of 1 mm, and of 20x18 of 2 mm: 16x16 pixels is the coarsest, whatever `coarsest` is
    assert PatchDataset(scans[:1], **options, coarsest=9.0).spacings == pytest.approx((2, 2 * 48 / 16))
    assert PatchDataset(scans[1:], **options, coarsest=9.0).spacings == pytest.approx((4, 2 * 2 * 20 / 16))
    assert PatchDataset(scans[:1], **options, coarsest=1.1).spacings == pytest.approx((2, 2 * 48 / 42))
    # a smaller patch allows coarser pixels
    smaller = PatchDataset(scans[:1], scale=2, patch=4, length=1, coarsest=9.0)
    assert smaller.spacings == pytest.approx((2, 2 * 48 / 8))


@pytest.mark.slow
def test_jitter_takes_its_share_of_the_samples(tmp_path, phantom):
    scan = Scan(write(tmp_path / "a.nii.gz", phantom), "a", "train", "T2")
    options = {"scale": 2, "patch": 8, "length": 200}
    plain = PatchDataset([scan], **options)
    other = "k-space:output=real"
    jittered = PatchDataset([scan], **options, jitter={other: 0.3, "k-space >> rician:snr=20": 0.2})
    drawn = [jittered._degradation(jittered._draw(index)[2]) for index in range(200)]
    assert 40 < drawn.count(parse(other, scale=2)) < 80
    assert 20 < drawn.count(parse("k-space >> rician:snr=20", scale=2)) < 60
    assert 70 < drawn.count(plain.degradation) < 130
    for a, b in zip(jittered[3], jittered[3], strict=True):
        assert torch.equal(a, b)
    noisy = PatchDataset([scan], **options, jitter={"k-space >> noise:snr=20": 1.0})
    noise, clean = (torch.stack([s.lr - s.hr[:, ::2, ::2] for s in made]).var() for made in (noisy, plain))
    assert (noise - clean) ** 0.5 == pytest.approx(1 / 20, rel=0.2)


@pytest.mark.parametrize(
    ("jitter", "message"),
    [
        ({"area": 0.1}, "to the half-pixel grid; wanted 2 and origin"),
        ({"noise:snr=3": 0.1}, "shrinks by 1"),
        ({"k-space": 0.7, "k-space >> noise:snr=30": 0.4}, "their sum must be at most 1"),
        ({"k-space": -0.1}, "their sum must be at most 1"),
        ({"nonsense": 0.1}, "nonsense"),
    ],
)
def test_jitter_that_does_not_fit_is_refused(tmp_path, phantom, jitter, message):
    scan = Scan(write(tmp_path / "a.nii.gz", phantom), "a", "train", "T2")
    with pytest.raises(ValueError, match=message):
        PatchDataset([scan], scale=2, patch=8, length=1, jitter=jitter)


@pytest.mark.parametrize("degradation", ["area", "k-space:output=real", GaussianBlur(sigma=1) >> Subsample(scale=2)])
def test_any_degradation_makes_the_low_resolution(tmp_path, phantom, degradation):
    scan = Scan(write(tmp_path / "a.nii.gz", phantom), "a", "train", "T2")
    options = {"scale": 2, "patch": 18, "length": 4, "flips": False}
    dataset = PatchDataset([scan], degradation=degradation, **options)
    made = parse(degradation, scale=2) if isinstance(degradation, str) else degradation
    assert dataset.degradation == made
    for sample in dataset:
        lr = made(dataset.groups[0][0].image / dataset.groups[0][0].unit)
        assert lr.shape == (24, 20)
        found = made(sample.hr[0])[4:-4, 4:-4]  # without the edges of the patch, where the slice continues
        torch.testing.assert_close(
            sample.lr[0, 4:-4, 4:-4], found, rtol=0, atol=0.12 if "k-space" in str(made) else 1e-5
        )
        assert_close(sample.base[:, ::2, ::2], sample.lr)


def test_noise_is_drawn_anew_for_each_sample_and_follows_the_seed(tmp_path, phantom):
    scan = Scan(write(tmp_path / "a.nii.gz", phantom[:, :, :1]), "a", "train", "T2")
    options = {"scale": 2, "patch": 20, "length": 9, "flips": False}
    clean, noisy = (
        PatchDataset([scan], **options, degradation=text) for text in ("k-space", "k-space >> noise:snr=25")
    )
    noise = [a.lr - b.lr * clean.groups[0][0].unit / noisy.groups[0][0].unit for a, b in zip(noisy, clean, strict=True)]
    assert np.mean([one.std().item() for one in noise]) == pytest.approx(1 / 25, rel=0.15)
    assert not torch.allclose(noise[0], noise[1], atol=0.01)
    assert torch.equal(noisy[3].lr, noisy[3].lr)


def test_a_degradation_of_another_scale_or_name_is_refused(tmp_path, phantom):
    scan = Scan(write(tmp_path / "a.nii.gz", phantom), "a", "train", "T2")
    for degradation, message in (
        ("area:scale=4", "shrinks by 4; wanted 2"),
        ("blurry", r"unknown name 'blurry' \(did you mean 'blur'\?\); degradations"),
    ):
        with pytest.raises(ValueError, match=message):
            PatchDataset([scan], scale=2, patch=8, length=1, degradation=degradation)


def test_cropping_to_a_multiple_is_said(tmp_path, phantom, capsys):
    scans = [Scan(write(tmp_path / f"{k}.nii", phantom[: 48 - k, :40]), str(k), "train", "T2") for k in (0, 1, 2)]
    dataset = PatchDataset(scans, scale=4, patch=8, length=1, progress=True)
    assert {tuple(one.image.shape) for one in dataset.groups[0]} == {(48, 40), (44, 40)}
    assert "2 of 3 volumes were cropped at their ends to a multiple of 4 pixels" in "".join(capsys.readouterr())


def test_volumes_of_nearly_empty_slices_teach_nothing(tmp_path):
    array = np.zeros((48, 48, 3))
    array[0, 0] = 1
    scan = Scan(write(tmp_path / "a.nii", array), "a", "train", "T2")
    with pytest.raises(VolumeError, match="every slice is nearly empty"):
        PatchDataset([scan], scale=2, patch=8, length=1)


def test_links_are_followed_and_circles_are_not(tmp_path, phantom):
    write(tmp_path / "elsewhere" / "sub-9" / "T2w.nii.gz", phantom[:16, :16])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sub-9").symlink_to(tmp_path / "elsewhere" / "sub-9")
    (tmp_path / "elsewhere" / "sub-9" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "broken.nii.gz").symlink_to(tmp_path / "gone")
    with pytest.warns(UserWarning, match=r"1 file left out: broken.nii.gz: a link to a file that is not there"):
        assert [scan.subject for scan in find_scans(tmp_path / "data")] == ["sub-9"]


def test_a_damaged_manifest_is_one_line(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": "deformmamba-slices-1", "complete": true}')
    with pytest.raises(VolumeError, match="damaged: no list of volumes"):
        find_scans(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": -8}, "patch is -8; wanted a number of 1 or more"),
        ({"gain": math.inf}, "gain is inf"),
        ({"contrast": 0.0}, "contrast is 0.0; wanted a number of 1 or more"),
        ({"lesions": math.nan}, "lesions is nan; wanted a number from 0 to 1"),
        ({"weights": {"T2": -1.0}}, "the weight of T2 is -1.0"),
        ({"weights": {"T2": 0.0}}, "all weights are 0"),
        ({"weights": {"T2": 0.0, "T1": 1.0}}, r"groups that have samples \(T2\) all have the weight 0"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, phantom, change, message):
    scan = Scan(write(tmp_path / "a.nii.gz", phantom), "a", "train", "T2")
    with pytest.raises(ValueError, match=message):
        PatchDataset([scan], **({"scale": 2, "patch": 8, "length": 1} | change))
