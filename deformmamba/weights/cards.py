"""Model cards: what the manifest says of a checkpoint, as people and the Hub read it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

# lists of rows in an entry: title and explanation of the table that each becomes
TABLES = {
    "trained_on": ("Training data", "What the weights were fitted to, with its licences."),
    "scores": (
        "Scores",
        "PSNR in dB / SSIM, averaged over the volumes of a subject and then over subjects, on scans that were not "
        "trained on; protocol volume where none is named. `sd over slices`: standard deviation of the network's scores "
        "over all slices.",
    ),
    "by_subject": ("Scores by subject", "PSNR in dB / SSIM on the groups that the weights are for; protocol volume."),
    "by_spacing": (
        "Scores by voxel size",
        "Each volume was cropped in k-space to `truth mm`, and that degraded to `input mm`; protocol volume; gains are "
        "over zero-filling of the same input.",
    ),
    "out_of_domain": (
        "Other inputs",
        "Scans of other groups, and changes to those of the group that is meant; noise is Rician and on the input. "
        "Protocol volume; gains are over zero-filling of the same input. `degradation` above says what was trained.",
    ),
    "lesions": (
        "Synthetic lesions",
        "Smooth-edged discs, a quarter of the bright tissue's intensity brighter or darker than the tissue that they "
        "are put into before degrading. Recovered: the share of their contrast that comes through. Invented: the "
        "strongest lesion-like contrast that the result of a slice without lesions has beyond the truth, per slice, in "
        "units of a true lesion's.",
    ),
}
_USE = (
    "Research on the super-resolution of MR images that are coarse in the way that the facts below name. Not a medical "
    "device: not for diagnosis, and not for anything that a patient's care depends on."
)
# columns that share a cell, by the title of the column that they become
_MERGED = {
    "subjects / slices": ("subjects", "slices"),
    "network": ("psnr", "ssim"),
    "zero-filling": ("zero_fill_psnr", "zero_fill_ssim"),
    "bicubic": ("bicubic_psnr", "bicubic_ssim"),
    "gain": ("psnr_gain", "ssim_gain"),
    "sd over slices": ("psnr_sd_over_slices", "ssim_sd_over_slices"),
    "recovered: network / zero-filling / bicubic": ("recovered", "zero_fill_recovered", "bicubic_recovered"),
    "invented: network / zero-filling / bicubic": ("invented", "zero_fill_invented", "bicubic_invented"),
}
# decimals of a number, by what its name contains
_DECIMALS = {"psnr": 2, "ssim": 3, "nmse": 4, "recovered": 2, "invented": 2}
# columns that the card leaves to the manifest
_LEFT_OUT = ("nmse_sd_over_slices", "recovered_sd")
# what sources of training data ask to be said, by a part of their name
_ACKNOWLEDGED = {
    "IXI": "IXI data set, brain-development.org, CC BY-SA 3.0.",
    "TCGA": "The results are in part based upon data of the TCGA Research Network (cancer.gov/tcga).",
}
# what has a place of its own in a card; anything else is a line under "Facts"
_PLACED = ("name", "meant_for", "summary", "license", "repo", "revision", "intended_use", "limits", *TABLES)


def card(entry: Mapping[str, Any]) -> str:
    """The model card of a manifest entry: Markdown with the front matter that the Hub reads.

    Lists of rows (`trained_on`, `scores`, `by_spacing`, `out_of_domain`, `lesions`) become tables whose columns are the
    rows' keys; whatever else the entry holds is a line under "Facts", so nothing that the manifest says is lost.
    """
    front = {
        "license": entry.get("license", "other"),
        "library_name": "deformmamba",
        "pipeline_tag": "image-to-image",
        "tags": ["mri", "super-resolution", "safetensors"],
    }
    name, repo = entry["name"], entry.get("repo")
    load = repo if repo and not entry.get("revision") else name
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "---",
        "",
        f"# {name}",
        "",
        *([f"For: {entry['meant_for']}", ""] if entry.get("meant_for") else []),
        *([str(entry["summary"]), ""] if entry.get("summary") else []),
        "```python",
        "import deformmamba",
        "",
        f'model = deformmamba.from_pretrained("{load}")',
        "```",
        "",
        "## Intended use and limits",
        "",
        str(entry.get("intended_use") or _USE),
        *(["", f"Limits: {entry['limits']}"] if entry.get("limits") else []),
        *_acknowledgements(entry.get("trained_on") or []),
        "",
        "## Facts",
        "",
    ]
    for key, value in entry.items():
        if key not in _PLACED and value is not None:
            said = f"{value / 1e6:.2f} MB ({value} bytes)" if key == "size" else _prose(value)
            lines.append(f"- **{key.replace('_', ' ')}**: {said}")
    if "file" in entry and not repo:
        lines.append("- **source**: the file rides in the package; there is no repository on the Hub")
    return "\n".join(lines) + "\n" + tables(entry)


def _acknowledgements(trained_on: Sequence[Any]) -> list[str]:
    """Lines with what the sources of the training data ask to be said."""
    sources = " ".join(str(row.get("source")) for row in trained_on if isinstance(row, Mapping))
    asked = [text for name, text in _ACKNOWLEDGED.items() if name in sources]
    return ["", f"Acknowledgements: {' '.join(asked)}"] if asked else []


def tables(entry: Mapping[str, Any]) -> str:
    """The lists of rows of a manifest entry, or of an assessment, each under its heading with how to read it."""
    lines = []
    for key, (title, text) in TABLES.items():
        if entry.get(key):
            lines += ["", f"## {title}", "", text, "", *_table(entry[key])]
    return "".join(f"{line}\n" for line in lines)


def _table(rows: Sequence[Any]) -> list[str]:
    """Lines of a Markdown table; the columns are the keys of all rows, in the order of their first use.

    Columns of `_MERGED` share a cell; a protocol that all rows share stands in the heading's text instead.
    """
    rows = [row if isinstance(row, Mapping) else {"": row} for row in rows]
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in _LEFT_OUT]
    if {str(row.get("protocol")) for row in rows} == {"volume"}:
        keys.remove("protocol")
    columns: dict[str, tuple[str, ...]] = {}
    for key in keys:
        shared = next((title for title, merged in _MERGED.items() if key in merged and set(merged) <= set(keys)), None)
        columns[shared or key.replace("_", " ")] = _MERGED[shared] if shared else (key,)
    cells = [
        list(columns),
        ["---"] * len(columns),
        *(
            [
                " / ".join(shown for key in merged if (shown := _shown(key, row.get(key, ""))))
                for merged in columns.values()
            ]
            for row in rows
        ),
    ]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]


def _shown(key: str, value: Any) -> str:
    """A value of a table's cell: numbers of one kind with as many decimals everywhere."""
    decimals = next((n for part, n in _DECIMALS.items() if part in key), None)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:.{decimals}f}" if number and decimals is not None else _prose(value)


def _prose(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_shown(str(key), item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_prose, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).split()) if value is not None else ""
