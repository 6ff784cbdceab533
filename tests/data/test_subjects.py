"""The subject of each scan: common folder layouts, and scans that must stay in one split."""

import warnings
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from deformmamba.cli.evaluate import chosen
from deformmamba.data.links import links
from deformmamba.data.scans import find_scans, named_scans
from deformmamba.data.subjects import name_subjects, patient_id
from deformmamba.errors import InvalidArgument
from deformmamba.volume import VolumeError

ROOT = Path("/data/mine")

# layout: (its scans, the subject of each)
LAYOUTS = {
    "a folder a patient": ("patient1/T1.nii.gz patient1/T2.nii.gz patient2/T1.nii.gz", "patient1 patient1 patient2"),
    "first names": ("anna/T1.nii.gz anna/T2.nii.gz ben/T1.nii.gz", "anna anna ben"),
    "below one folder": ("x/anna/tirm_foo.nii x/anna/bla.nii x/ben/tirm_foo.nii", "anna anna ben"),
    "one flat folder": ("s/patient01_T1.nii s/patient01_T2.nii s/patient02_T1.nii", "patient01 patient01 patient02"),
    "hyphens": ("P001-T1.nii P001-T2.nii P002-T1.nii", "P001 P001 P002"),
    "nothing between": ("P1T1.nii P1T2.nii P2T1.nii", "P1 P1 P2"),
    "contrast first": ("T1_anna.nii T2_anna.nii T1_ben.nii", "anna anna ben"),
    "contrast folders": ("T1/anna.nii.gz T2/anna.nii.gz T1/ben.nii.gz", "anna anna ben"),
    "sessions": ("P001/ses-1/T1.nii P001/ses-2/T1.nii P002/ses-1/T1.nii", "P001 P001 P002"),
    "years": ("alice/2021/T1.nii alice/2022/T1.nii bob/2021/T1.nii", "alice alice bob"),
    "dates": ("2021-03-04_anna.nii 2021-05-04_anna.nii 20210304_ben.nii", "anna anna ben"),
    "visits": ("anna_v1.nii anna_v2.nii ben_v1.nii", "anna anna ben"),
    "visits as folders": ("anna-baseline/T1.nii anna-followup/T1.nii ben-baseline/T1.nii", "anna anna ben"),
    "visits on top": ("baseline/anna_T1.nii followup/anna_T1.nii baseline/ben_T1.nii", "anna anna ben"),
    "runs": ("anna_1.nii anna_2.nii ben_1.nii", "anna anna ben"),
    "upper and lower case": ("Anna/T1.nii anna/T2.nii BEN/T1.nii", "Anna Anna BEN"),
    "zeros": ("Patient 1/T1.nii,patient_01/T2.nii,Patient 2/T1.nii", "Patient1 Patient1 Patient2"),
    "hospitals": ("siteA/patient1/T1.nii siteA/patient2/T1.nii siteB/patient3/T1.nii", "patient1 patient2 patient3"),
    "numbers": ("001/T1.nii 001/T2.nii 002/T1.nii", "001 001 002"),
    "numbers and no folder": ("001_T1.nii 001_T2.nii 002_T1.nii", "001 001 002"),
    "patient, study, series": ("anna/study1/series1 anna/study1/series2 ben/study1/series1", "anna anna ben"),
    "different names": ("patient_A/T1.nii patient_A/T2.nii patient_B/FLAIR.nii", "A A B"),
    "image numbers": ("anna/IM_001.nii anna/IM_002.nii ben/IM_003.nii", "anna anna ben"),
    "FreeSurfer": ("bert/mri/T1.mgz bert/mri/orig.mgz ernie/mri/T1.mgz", "bert bert ernie"),
    "BraTS": (
        "b/BraTS20_Training_001/BraTS20_Training_001_t1.nii b/BraTS20_Training_001/BraTS20_Training_001_t2.nii "
        "b/BraTS20_Training_002/BraTS20_Training_002_t1ce.nii",
        "001 001 002",
    ),
    "HCP": ("100307/T1w/T1w.nii.gz 100307/3T/100307_3T_T2w.nii.gz 200109/T1w/T1w.nii.gz", "100307 100307 200109"),
    "IXI": ("Guys/IXI002-Guys-0828-T2.nii HH/IXI013-HH-1212-T2.nii HH/IXI013-HH-1212-T1.nii", "IXI002 IXI013 IXI013"),
    "TCGA": ("TCGA-02-0003/T1.nii TCGA-02-0003/T2.nii TCGA-02-0006/T1.nii", "TCGA-02-0003 TCGA-02-0003 TCGA-02-0006"),
    "OASIS": ("OAS1_0001_MR1_mpr-1.nii OAS1_0001_MR2_mpr-1.nii OAS1_0002_MR1.nii", "OAS1_0001 OAS1_0001 OAS1_0002"),
    "ADNI": ("ADNI_002_S_0295_MR.nii ADNI_002_S_0295_x.nii ADNI_005_S_0300.nii", "002_S_0295 002_S_0295 005_S_0300"),
    "a name of nobody": ("series1/T1.nii series2/T1.nii", "mine mine"),
}  # fmt: skip


# layouts of the scans of four people in conditions, of which p is the person, c the condition and k a contrast
CROSSED = [
    "{c}/{p}.nii",
    "{c}/{p}_T{k}.nii",
    "{c}/{p}/T{k}.nii",
    "{c}_{p}.nii",
    "{c}_{p}/T{k}.nii",
    "{c}/{p}_{c}.nii",
    "{p}_{c}_T{k}.nii",
    "{p}/{c}.nii",
    "{p}/{c}/T{k}.nii",
    "{p}/{c}_{p}.nii",
]
KNOWN = """ses-01,ses-02 Visit.1,Visit.2 TimePoint_1,TimePoint_2 left,right preop,postop before,after wk0,wk12 mo0,mo6
    native,registered first,second basal,control acute,chronic test,retest raw,n4 avant,apres vorher,nachher"""
UNKNOWN = "qqq,zzz raw,zzz ketamine,saline kyoto,osaka a,b 01,02 2021,2022 2021-03,2022-05 drive1,drive2"


def crossed(layout, conditions, people):
    """The found subjects of each person's scans."""
    scans = {
        ROOT / layout.format(c=condition.replace(".", " "), p=person, k=k): person
        for condition in conditions.split(",")
        for person in people
        for k in (1, 2)
    }
    found = name_subjects([*scans], ROOT).names
    return {person: {found[path] for path in scans if scans[path] == person} for person in people}


@pytest.mark.parametrize("conditions", f"{KNOWN} {UNKNOWN}".split())
@pytest.mark.parametrize("layout", CROSSED)
def test_a_condition_is_not_a_subject(layout, conditions):
    people = ("anna", "ben", "carl", "dora")
    assert crossed(layout, conditions, people) == {person: {person} for person in people}


@pytest.mark.parametrize("conditions", ["qqq,zzz", "qqq,zzz,yyy", "a,b"])
@pytest.mark.parametrize("people", [("anna", "ben"), ("MS01", "MS02"), ("001", "002")], ids=" ".join)
@pytest.mark.parametrize("layout", CROSSED)
def test_people_who_look_like_conditions_are_one_subject(layout, people, conditions):
    assert crossed(layout, conditions, people) in ({p: {"mine"} for p in people}, {p: {p} for p in people})


# layout in which a person must not become two subjects: (its scans, the subject of each)
JOINED = {
    "a number like a year": ("2001_01.nii 2001_02.nii 2002_01.nii", "2001 2001 2002"),
    "a number like a year, sessions": ("2001_s1_T2.nii 2001_s2_T2.nii 2002_s1_T2.nii", "2001 2001 2002"),
    "a folder like a year": ("2001/01.nii 2001/02.nii 2002/01.nii", "2001 2001 2002"),
    "a number like a year, a contrast": ("1001_01.nii 2001_01.nii 2001_T1.nii", "1001 2001 2001"),
    "years": ("2021_anna.nii 2022_anna.nii 2021_ben.nii", "anna anna ben"),
    "exams by their time, without a person": (
        " ".join(f"DICOM_{c}_{t}_{n}.nii" for t in (20190101101010, 20190202111111) for c, n in (("t1", 3), ("t2", 5))),
        "mine mine mine mine",
    ),
    "a letter for the visit": ("101a.nii 101b.nii 102a.nii 102b.nii", "101 101 102 102"),
    "a visit after the number": ("M01V1.nii M01V2.nii M02V1.nii M02V2.nii", "M01 M01 M02 M02"),
    "a contrast after the name": ("annaT1.nii annaFLAIR.nii benT1.nii benFLAIR.nii", "anna anna ben ben"),
    "a contrast after the number": ("001MPRAGE.nii 001FLAIR.nii 002MPRAGE.nii 002FLAIR.nii", "001 001 002 002"),
    "years and nobody": ("2021/T1.nii 2022/T1.nii", "mine mine"),
    "years and people": ("2021/anna.nii 2022/ben.nii 2021/carl.nii", "anna ben carl"),
    "two each": ("qqq/anna.nii qqq/ben.nii zzz/anna.nii", "mine mine mine"),
    "numbered people": ("qqq/01.nii qqq/02.nii qqq/03.nii zzz/01.nii", "mine mine mine mine"),
    "numbered scans": ("001_1.nii 001_2.nii 001_3.nii 002_1.nii", "001 001 001 002"),
    "a folder a session": ("x1a/anna.nii x1b/anna.nii x2/ben.nii", "anna anna ben"),
    "some without condition": ("anna.nii qqq_anna.nii ben.nii", "anna anna ben"),
    "a control of that number": ("control_01.nii zzz_01.nii control_02.nii zzz_02.nii", "mine mine mine mine"),
    "files without a person": ("anna/T1.nii anna/foo.nii ben/T1.nii ben/foo.nii ben/bar.nii", "anna anna ben ben ben"),
    "sites": ("Guys/anna.nii Guys/ben.nii HH/carl.nii", "anna ben carl"),
    "channels": ("anna_0000.nii anna_0001.nii ben_0000.nii carl_0001.nii dora_0000.nii", "anna anna ben carl dora"),
    "one letter in two Unicode forms": (
        "M\u00fcller_T1.nii Mu\u0308ller_T2.nii Ben_T1.nii",
        "M\u00fcller M\u00fcller Ben",
    ),
    "cases of subjects": (
        "case_01_subject_03.nii case_02_subject_03.nii case_01_subject_04.nii",
        "subject03 subject03 subject04",
    ),
    "numbered channels": ("x_01_0001.nii x_01_0002.nii x_02_0001.nii x_02_0002.nii", "mine mine mine mine"),
}


@pytest.mark.parametrize(("files", "wanted"), JOINED.values(), ids=JOINED)
def test_scans_of_one_person_are_one_subject(files, wanted):
    paths = [ROOT / name for name in files.split()]
    found = name_subjects(paths, ROOT)
    assert [found.names[path] for path in paths] == wanted.split()


NUMBERED = [
    "training01 training02 training03 training04",
    *(f"{word}01 {word}02 {word}03" for word in ("control", "study", "brain", "T")),
    *(f"{word}007 {word}008 {word}012" for word in ("vol", "MR", "scan", "V", "D")),
]


@pytest.mark.parametrize("people", NUMBERED)
@pytest.mark.parametrize("layout", ["{p}_{k:02}_flair.nii", "{p}_{k}.nii", "{p}/{k}.nii", "{p}/{p}_{k}_T2.nii"])
def test_a_word_with_a_number_of_several_digits_may_be_a_person(people, layout):
    scans = {ROOT / layout.format(p=person, k=k): person for person in people.split() for k in (1, 2, 3)}
    found = name_subjects([*scans], ROOT).names
    for person in people.split():
        assert len({found[path] for path in scans if scans[path] == person}) == 1


@pytest.mark.parametrize("layout", ["{p}_{k}.nii", "{p}/{k}.nii", "{p}/scan{k}.nii"])
@pytest.mark.parametrize("people", ["anna ben carl dora", "0001 0002 0003 0004", "P1 P2 P3 P4"])
def test_numbered_scans_of_a_person_are_of_one_subject(layout, people):
    scans = {ROOT / layout.format(p=person, k=k): person for person in people.split() for k in range(1, 6)}
    assert name_subjects([*scans], ROOT).names == scans


@pytest.mark.parametrize(("other", "joined"), [("qqq/ben.nii", True), ("zzz/ben_T1.nii", False)])
def test_the_rule_says_that_scans_were_joined_in_doubt(other, joined):
    paths = [ROOT / name for name in ("qqq/anna.nii", "zzz/anna.nii", other, *(["zzz/ben.nii"] * joined))]
    assert ("one subject" in name_subjects(paths, ROOT).rule) == joined


@pytest.mark.parametrize(("files", "wanted"), LAYOUTS.values(), ids=LAYOUTS)
def test_the_subject_of_a_scan_by_its_path(files, wanted):
    paths = [ROOT / name for name in (files.split(",") if "," in files else files.split())]
    found = name_subjects(paths, ROOT)
    assert [found.names[path] for path in paths] == wanted.split()
    assert not found.certain


def test_a_session_in_the_label_is_no_subject():
    paths = [ROOT / f"sub-{who}ses{k}_T2w.nii" for who in ("01", "02") for k in (1, 2)]
    assert [*name_subjects(paths, ROOT).names.values()] == ["sub-01", "sub-01", "sub-02", "sub-02"]


def test_bids_entities_come_first_and_are_certain():
    paths = [ROOT / name for name in ("sub-01/anat/sub-01_T1w.nii.gz", "sub-02_ses-1_T1w.nii.gz", "SUB-02/T2w.nii.gz")]
    found = name_subjects(paths, ROOT)
    assert [*found.names.values()] == ["sub-01", "sub-02", "sub-02"]
    assert found.certain
    mixed = name_subjects([*paths, ROOT / "patient7.nii"], ROOT)
    assert mixed.names[ROOT / "patient7.nii"] == "patient7"
    assert not mixed.certain


def test_an_expression_decides():
    paths = [ROOT / name for name in ("a1b/x.nii", "a1c/y.nii", "a2b/x.nii")]
    assert [*name_subjects(paths, ROOT, pattern="a[0-9]").names.values()] == ["a1", "a1", "a2"]
    assert [*name_subjects(paths, ROOT, pattern="a([0-9])").names.values()] == ["1", "1", "2"]
    assert name_subjects(paths, ROOT, pattern="a[0-9]").certain
    with pytest.raises(VolumeError, match=r"'b/' finds no subject in a1c/y.nii"):
        name_subjects(paths, ROOT, pattern="b/")
    with pytest.raises(VolumeError, match="not a regular expression"):
        name_subjects(paths, ROOT, pattern="a(")


def test_spellings_that_an_expression_finds_are_joined():
    paths = [ROOT / name for name in ("Patient01_T1.nii", "patient01_T2.nii", "patient1_PD.nii", "patient02_T1.nii")]
    found = name_subjects(paths, ROOT, pattern="(?i)patient[0-9]+")
    assert [*found.names.values()] == ["Patient01", "Patient01", "Patient01", "patient02"]


# layout in which only some scans have a BIDS label: (its scans, the subject of each)
PARTLY_LABELLED = {
    "no hyphen": ("sub-01_T2w.nii sub01_FLAIR.nii sub-02_T2w.nii", "sub-01 sub-01 sub-02"),
    "a name": ("sub-anna/T2w.nii anna_FLAIR.nii sub-ben/T2w.nii", "sub-anna sub-anna sub-ben"),
    "a name in every other path": ("sub-anna/T2w.nii anna_FLAIR.nii anna_T1.nii", "sub-anna sub-anna sub-anna"),
    "names": ("sub-Anna/T2w.nii x/anna/T1.nii x/ben/T1.nii", "sub-Anna sub-Anna ben"),
    "another word": ("sub-01_T2w.nii patient1_T1.nii patient2_T1.nii", "sub-01 sub-01 patient2"),
    "a word in the label": ("sub-P001_T2w.nii P001_T1.nii P002_T1.nii", "sub-P001 sub-P001 P002"),
    "numbers of runs": ("sub-1_T2w.nii anna_1.nii ben_1.nii", "sub-1 anna ben"),
}


@pytest.mark.parametrize(("files", "wanted"), PARTLY_LABELLED.values(), ids=PARTLY_LABELLED)
def test_a_scan_without_a_label_belongs_to_the_labelled_subject_that_it_names(files, wanted):
    paths = [ROOT / name for name in files.split()]
    found = name_subjects(paths, ROOT)
    assert [found.names[path] for path in paths] == wanted.split()
    assert not found.certain


@pytest.mark.parametrize("inside", ["sub-01", "sub-01/anat", "SUB-01/ses-1/anat"])
def test_scans_in_the_folder_of_a_labelled_subject_are_of_this_subject(inside):
    root = ROOT / inside
    found = name_subjects([root / "a.nii", root / "b.nii"], root)
    assert [name.lower() for name in found.names.values()] == ["sub-01", "sub-01"]
    assert found.certain
    assert [scan.subject for scan in named_scans([root / "a.nii", root / "b.nii"])] == [*found.names.values()]


def test_names_in_a_table_are_equal_in_upper_and_lower_case(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.nii").write_bytes(b"")
    rows = "participant_id\tfile\tsplit\nSub-A\ta.nii\ttrain\nsub-a\tb.nii\t"
    (tmp_path / "volumes.tsv").write_text(rows + "train\n")
    assert [scan.subject for scan in find_scans(tmp_path)] == ["Sub-A", "Sub-A"]
    (tmp_path / "volumes.tsv").write_text(rows + "val\n")
    with pytest.raises(VolumeError, match="subject Sub-A is in train and val"):
        find_scans(tmp_path)
    rows = "participant_id\tfile\tsplit\nM\u00fcller\ta.nii\ttrain\nMu\u0308ller\tb.nii\tval\n"
    (tmp_path / "volumes.tsv").write_text(rows, "utf-8")
    with pytest.raises(VolumeError, match=r"subject M.ller is in train and val"):
        find_scans(tmp_path)


def series(folder, patient):
    folder.mkdir(parents=True)
    header = pydicom.Dataset()
    header.PatientID = patient
    header.SOPClassUID, header.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.4", pydicom.uid.generate_uid()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    pydicom.dcmwrite(folder / "1.dcm", header, enforce_file_format=True)
    return folder


def test_series_of_one_patient_id_are_one_subject(tmp_path):
    folders = [
        series(tmp_path / "anna" / "one", "17"),
        series(tmp_path / "ben" / "one", "18"),
        series(tmp_path / "carl" / "one", "17"),  # the same patient as anna
        series(tmp_path / "dora" / "one", "anonymous"),
        series(tmp_path / "emil" / "one", "ANONYMOUS"),
    ]
    assert patient_id(folders[0]) == "17"
    found = name_subjects(folders, tmp_path, patients={folder: patient_id(folder) for folder in folders}).names
    assert found[folders[0]] == found[folders[2]]
    assert len({*found.values()}) == 4


def test_a_patient_id_names_series_whose_path_names_nobody(tmp_path):
    folders = [series(tmp_path / f"series{k}", patient) for k, patient in enumerate(("17", "18", "17"))]
    found = [
        *name_subjects(folders, tmp_path, patients={folder: patient_id(folder) for folder in folders}).names.values()
    ]
    assert found[0] == found[2] != found[1]
    assert "17" not in found[0]


def test_a_patient_is_in_one_split_and_a_warning_lists_the_subjects(tmp_path):
    for patient in range(6):
        for contrast in ("T1", "T2", "FLAIR"):
            path = tmp_path / f"patient{patient}" / f"{contrast}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 2), np.float32), np.eye(4)), path)
    with pytest.warns(UserWarning, match=r"guessed from .*: patient0, patient1.* and 1 more.*--subject REGEX"):
        scans = find_scans(tmp_path)
    splits = {scan.subject: {other.split for other in scans if other.subject == scan.subject} for scan in scans}
    assert len(splits) == 6
    assert all(len(found) == 1 for found in splits.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = find_scans(tmp_path, subject="patient([0-9]+)")
    assert {scan.subject for scan in named} == set("012345")


def written(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.full((40, 40, 40), value, np.float32), np.eye(4)), path)
    return path


def test_links_to_a_scan_and_the_scan_are_one_subject(tmp_path):
    for number, name in enumerate(("anna", "ben", "carl", "dora", "emil", "fred")):
        written(tmp_path / f"{name}_T2.nii", number + 0.5)
    (tmp_path / "gustav_T2.nii").hardlink_to(tmp_path / "anna_T2.nii")
    written(tmp_path / "gustav_T1.nii", 9.5)
    (tmp_path / "hans_T2.nii").symlink_to(tmp_path / "ben_T2.nii")
    reasons = {}
    with pytest.warns(UserWarning, match="guessed from"):
        scans = find_scans(tmp_path, passed=lambda path, reason: reasons.update({path.name: reason}))
    owner = {scan.path.name: scan.subject for scan in scans}
    assert reasons == {
        "gustav_T2.nii": "a link to the file anna_T2.nii",
        "hans_T2.nii": "a link to the file ben_T2.nii",
    }
    assert owner["gustav_T1.nii"] == owner["anna_T2.nii"], "her other scans are of the same subject"
    assert len(set(owner.values())) == 6


def test_links_are_paths_of_one_file(tmp_path):
    first, other, link = (tmp_path / name for name in ("a.nii", "b.nii", "c.nii"))
    for path in (first, other):
        written(path, 0.5)
    link.symlink_to(first)
    assert links([first, other, link, first, tmp_path / "gone.nii", tmp_path]) == {link: first}


def test_a_table_with_one_scan_of_two_subjects_is_refused(tmp_path):
    written(tmp_path / "a.nii", 0.5)
    (tmp_path / "b.nii").hardlink_to(tmp_path / "a.nii")  # a symbolic link is the same file, which is listed once
    table = tmp_path / "volumes.tsv"
    table.write_text("participant_id\tfile\tsplit\nsub-1\ta.nii\ttrain\nsub-2\tb.nii\ttest\n")
    with pytest.raises(VolumeError, match=r"line 3: the file of sub-2 is a link to that of sub-1 in line 2"):
        find_scans(tmp_path)
    table.write_text("participant_id\tfile\tsplit\nsub-1\ta.nii\ttrain\n1\tb.nii\ttrain\n")
    assert len(find_scans(tmp_path)) == 2


def test_a_link_under_another_name_is_not_scored_as_a_second_subject(tmp_path):
    one, two = written(tmp_path / "x" / "sub-1_T2w.nii", 0.5), tmp_path / "y" / "sub-2_T2w.nii"
    two.parent.mkdir()
    two.symlink_to(one)
    with pytest.raises(InvalidArgument, match=r"sub-2_T2w.nii is a link to .*sub-1_T2w.nii"):
        chosen([str(one.parent), str(two.parent)], None, None)
