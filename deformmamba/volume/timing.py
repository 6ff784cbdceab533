"""The time between the volumes of a DICOM series, from the headers of one slice of each volume.

Sources, in this order: the times at which that slice was acquired; TemporalResolution; RepetitionTime of 2-D
echo-planar imaging. In other sequences one volume takes many repetitions.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

# the note on a time series without a time step
UNKNOWN = "the time between the volumes is unknown or varies, so a NIfTI output states none (its pixdim[4] is 0)"

# Macro, field and unit in seconds of the times of a slice; 0: a time of day. GE's scanners set AcquisitionTime to the
# start of the series, and TriggerTime to the time since then.
_TIMES = (
    ("TemporalPositionSequence", "TemporalPositionTimeOffset", 1.0),
    ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime", 1e-3),
    ("FrameContentSequence", "FrameAcquisitionDateTime", 0),
    ("", "TriggerTime", 1e-3),
    ("", "AcquisitionDateTime", 0),
    ("", "AcquisitionTime", 0),
)
# settings that differ between the volumes of a series that is not one over time
_SETTINGS = (
    ("MRModifierSequence", "InversionTimes"),
    ("", "InversionTime"),
    ("MRTimingAndRelatedParametersSequence", "FlipAngle"),
)
_CLOCK = re.compile(r"(?:\d{8})?(\d\d)(\d\d)(\d\d(?:\.\d+)?)(?:[+-]\d{4})?")
_DAY = 86400.0
# times are rounded by at most this many seconds: by a scanner, and where they have no fraction
_ROUNDED, _WHOLE = 0.011, 1.0
_UNEVEN = 0.02  # part of a step


def field(groups: Sequence[Any], macro: str, name: str) -> Any:
    """A field of a functional group, of the frame or shared; of a classic image, of the data set itself.

    `groups`: those that can hold the fields of a frame; the last is the data set.
    """
    for group in groups:
        found = group if group is groups[-1] else next(iter(group.get(macro) or []), None)
        if found is not None and found.get(name) not in (None, ""):
            return found[name].value
    return None


def is_over_time(volumes: Sequence[Sequence[Any]]) -> bool:
    """Whether the volumes differ in no setting of the sequence; `volumes`: the groups of one slice of each."""
    return all(len({str(field(groups, *setting)) for groups in volumes}) == 1 for setting in _SETTINGS)


def time_step(volumes: Sequence[Sequence[Any]]) -> float:
    """Seconds between the volumes; 0 if unknown or uneven. `volumes`: the groups of one slice of each, in order."""
    stated = _stated(volumes[0])
    uneven = False
    for macro, name, unit in _TIMES:
        times = [_seconds(field(groups, macro, name), unit) for groups in volumes]
        steps = np.diff(np.array(times, dtype=float))
        if not unit:
            steps = (steps + _DAY / 2) % _DAY - _DAY / 2  # midnight
        if not np.isfinite(steps).all() or not steps.any():
            continue
        whole = not unit and all(time == int(time) for time in times if time is not None)
        rounded, measured = _WHOLE if whole else _ROUNDED, float(steps.mean())
        from_even = np.abs(np.cumsum(steps - measured)).max()
        if (steps < 0).any() or measured <= 0 or from_even > max(rounded, _UNEVEN * measured):
            uneven = True
            continue
        # a stated value is more precise
        near = [value for value in stated if abs(value - measured) <= 2 * rounded / len(steps)]
        return near[0] if near else round(measured, 4)
    return stated[0] if stated and not uneven else 0.0


def _stated(groups: Sequence[Any]) -> list[float]:
    """TemporalResolution and the RepetitionTime of 2-D echo-planar imaging in seconds, if given."""
    timing = "MRTimingAndRelatedParametersSequence"
    given = [_seconds(field(groups, "", "TemporalResolution"), 1e-3)]
    sequence = field(groups, "", "ScanningSequence")
    is_epi = field(groups, "", "EchoPlanarPulseSequence") == "YES" or "EP" in (
        [sequence] if isinstance(sequence, str) else sequence or []
    )
    if is_epi and field(groups, "", "MRAcquisitionType") == "2D":
        given.append(_seconds(field(groups, timing, "RepetitionTime"), 1e-3))
    return [value for value in given if value is not None and np.isfinite(value) and value > 0]


def _seconds(value: Any, unit: float) -> float | None:
    """A number in `unit` seconds, or for 0 a time of day; None if it is missing or malformed."""
    if unit:
        try:
            return float(value) * unit
        except (TypeError, ValueError):
            return None
    clock = _CLOCK.fullmatch(str(value).strip())
    return None if clock is None else int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3])
