"""Splits by subject: shares, small data sets, and the tables in which users define splits."""

import pytest

from deformmamba.data.scans import find_scans
from deformmamba.data.splits import by_count, by_share, read_splits, read_table
from deformmamba.volume import VolumeError


@pytest.mark.parametrize("n", range(2, 30))
@pytest.mark.parametrize("seed", range(5))
def test_two_subjects_or_more_always_train_and_validate(n, seed):
    split = by_share([f"s{k}" for k in range(n)], val=0.1, test=0.1, seed=seed)
    counts = [[*split.values()].count(name) for name in ("train", "val", "test")]
    assert counts[0] >= 1
    assert counts[1] >= 1
    assert counts[2] >= (n > 2)


def test_shares_are_those_asked_for():
    names = [f"s{k}" for k in range(2000)]
    split = [*by_share(names, val=0.3, test=0.2).values()]
    assert split.count("val") == pytest.approx(600, abs=60)
    assert split.count("test") == pytest.approx(400, abs=60)
    assert {*by_share(names[:9], val=0.0, test=0.0).values()} == {"train"}
    assert {*by_share(names[:9], val=1.0, test=0.0).values()} == {"val"}
    assert {*by_share(names[:9], val=0.0, test=1.0).values()} == {"test"}


def test_published_counts_leave_one_to_validate():
    for n in range(2, 12):
        split = [*by_count([f"s{k}" for k in range(n)], (368, 92), 0.1)[0].values()]
        assert "train" in split
        assert "val" in split
        assert ("test" in split) == (n > 2)


@pytest.mark.parametrize(
    "shares", [{"val": 1.5}, {"val": -0.1}, {"test": 2.0}, {"val": 0.6, "test": 0.6}, {"val": float("nan")}]
)
def test_shares_out_of_range_are_refused(tmp_path, shares):
    with pytest.raises(ValueError, match="wanted"):
        find_scans(tmp_path, **shares)


HEADER = "participant_id\tfile\tsplit\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + "sub-1\ta.nii\n", "line 2: the cell split is empty; fill it"),
        (HEADER + "\nsub-1\ta.nii\ttrain\nsub-2\t\ttrain\n", "line 4: the cell file is empty"),
        (HEADER + "\ta.nii\ttrain\n", "line 2: the cell participant_id is empty"),
        (HEADER + "sub-1\ta.nii\ttrain\tmore\n", "line 2: 4 cells, but 3 columns"),
        (HEADER + "sub-1\tgone.nii\ttrain\n", "line 2: missing file gone.nii of sub-1"),
        (HEADER + "sub-1\ta.nii\tlearn\n", "line 2: split 'learn' of sub-1"),
        ("file\tsplit\na.nii\ttrain\n", "no column 'participant_id'"),
        ("", "no column 'participant_id'"),
        (HEADER, "no volume found"),
        (HEADER + "sub-1\ta.nii\tn/a\n", "line 2: the cell split is empty"),
        ("participant_id\tfile\tfile\tsplit\nsub-1\ta.nii\tb.nii\ttrain\n", "several columns are named 'file'"),
        (
            HEADER.strip() + '\tnote\nsub-1\ta.nii\ttrain\tx\nsub-2\ta.nii\ttrain\t"5 mm\nsub-3\ta.nii\ttest\tx\n',
            "line 3: a cell in quotation marks continues in the next line",
        ),
    ],
)
def test_a_table_with_a_hole_is_one_line_that_names_it(tmp_path, text, message):
    (tmp_path / "a.nii").write_bytes(b"")
    (tmp_path / "volumes.tsv").write_text(text)
    with pytest.raises(VolumeError, match=message):
        find_scans(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_of_a_spreadsheet_is_read(tmp_path, encoding, end):
    (tmp_path / "a.nii").write_bytes(b"")
    text = HEADER + " sub-1 \ta.nii\ttrain\n\t\t\n"
    (tmp_path / "volumes.tsv").write_bytes(text.replace("\n", end).encode(encoding))
    (scan,) = find_scans(tmp_path)
    assert (scan.subject, scan.split) == ("sub-1", "train")
    assert next(read_table(tmp_path / "volumes.tsv", ["split"]))[1]["file"] == "a.nii"


def test_a_missing_value_of_bids_is_no_part_of_a_group(tmp_path):
    (tmp_path / "a.nii").write_bytes(b"")
    (tmp_path / "volumes.tsv").write_text(
        'participant_id\tfile\tsplit\tcontrast\tanatomy\nsub-1\t"a.nii"\ttrain\tn/a\tbrain\n'
    )
    assert find_scans(tmp_path)[0].group == "brain"


def test_semicolons_and_commas_separate_too(tmp_path):
    for mark in ",;\t":
        (tmp_path / "splits.csv").write_text(f"subject{mark}split\nA{mark}test\n")
        assert read_splits(tmp_path / "splits.csv", ["A"]) == {"A": "test"}
    with pytest.raises(VolumeError, match="cannot be read"):
        read_splits(tmp_path / "none.csv", ["A"])


def test_a_table_that_names_subjects_takes_no_expression(tmp_path):
    (tmp_path / "a.nii").write_bytes(b"")
    (tmp_path / "volumes.tsv").write_text(HEADER + "sub-1\ta.nii\ttrain\n")
    with pytest.raises(ValueError, match=r"volumes.tsv already assigns the subjects"):
        find_scans(tmp_path, subject="a")
