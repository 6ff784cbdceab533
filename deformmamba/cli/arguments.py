"""Shared parts of the commands: terminal output, common arguments, checks before any computation."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn

from deformmamba.errors import InvalidArgument, did_you_mean

if TYPE_CHECKING:
    from deformmamba.models import SRModel
    from deformmamba.volume import Volume

DEFAULT_MODEL = "ixi-4x"
# of slices that are stacked in this direction of the patient
PLANES = {"R": "sagittal", "L": "sagittal", "A": "coronal", "P": "coronal", "S": "axial", "I": "axial"}
CONSISTENCIES = ("exact", "object", "off")  # those of physics.consistency, which would import torch


def printable(text: str) -> str:
    """One line that any terminal can show: file names may hold newlines, escape codes and broken characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def refuse(message: str, code: int = 2) -> int:
    """Prints an error on stderr and returns the exit code."""
    with suppress(OSError):  # stderr on a full disk: the exit code remains
        print(f"deformmamba: {printable(message)}", file=sys.stderr)
    return code


# an argument of the Python function beside the option of the command: nan="zero" (--nan zero)
_ADVICE = re.compile(r"""(?P<argument>\b[a-z_]+=[\w"']+) \((?P<option>--(?P<name>[a-z-]+)[^)]*)\)""")
# an argument at the start of a message about its value: "to is 0.0; it must be ..."
_WRONG = re.compile(r"^(?:recipe \S+: )?(?:fit: )?(?P<argument>[a-z_]+)(?= is )")


def with_options(message: str, options: Mapping[str, Any]) -> str:
    """Replaces each "argument (--option)" in `message` by the option if the command has it, else by the argument.

    An argument that begins a message about its value becomes the option too.
    """
    wrong = _WRONG.match(message)
    if wrong and options.get(wrong["argument"]) is not None:
        message = f"--{wrong['argument'].replace('_', '-')}{message[wrong.end() :]}"

    def advice(found: "re.Match[str]") -> str:
        known = found["name"].replace("-", "_") in options
        return found["option"] if known else f"in Python {found['argument']}"

    return _ADVICE.sub(advice, message)


_quiet: ContextVar[bool] = ContextVar("deformmamba_quiet", default=False)


@contextmanager
def quiet_if(quiet: bool) -> Iterator[None]:
    """Within the block a quiet command prints no progress and no messages; warnings and errors stay."""
    token = _quiet.set(quiet)
    try:
        yield
    finally:
        _quiet.reset(token)


def is_quiet() -> bool:
    """Whether progress and messages are left out."""
    return _quiet.get()


def say(text: str) -> None:
    """Prints a progress message, which --quiet suppresses. Results of a command are printed with `tell`."""
    if not is_quiet():
        tell(text)


def tell(text: str) -> None:
    """Prints a result, with --quiet too."""
    print(printable(text), flush=True)


def note(text: str) -> None:
    """Announces the next step of a command on stderr; --quiet suppresses it."""
    if not is_quiet():
        with suppress(OSError):
            print(f"deformmamba: {printable(text)}", file=sys.stderr, flush=True)


def load_model(name: str) -> "SRModel":
    from deformmamba.models import from_pretrained

    return from_pretrained(name)


def short(model: str) -> str:
    """The name of a model in a figure or a file name."""
    from deformmamba.inference.provenance import file_name

    return file_name(model).removesuffix(".safetensors")


def device_here(name: str) -> str:
    """The device to run on. "auto" is CUDA if available (a separate GPU for each process on a machine), else the CPU;
    any other name is used, or refused if it is not available."""
    import torch

    if name == "auto":
        if not torch.cuda.is_available():
            return "cpu"
        local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", ""))
        return f"cuda:{int(local) % torch.cuda.device_count()}" if local.isdecimal() else "cuda"
    from deformmamba.tensors import check_device

    try:
        check_device(name, also=("auto",))
    except InvalidArgument as error:
        raise InvalidArgument(f"--{error}") from None
    return name


def check_target(output: str, source: str, *, dtype: str | None = None, figure: bool = False) -> None:
    """Refuses, before anything is computed, a figure or a scan (no DICOM) that cannot be written."""
    from deformmamba.volume import VolumeError, check_output

    if figure:
        from deformmamba.pictures.figures import SUFFIXES

        check_output(output, SUFFIXES)
    else:
        check_output(output, dtype=dtype)
    if os.path.exists(output) and os.path.exists(source) and os.path.samefile(output, source):
        raise VolumeError(f"{output}: the output is the input file; choose another output name")


def series_of(text: str | None) -> int | str | None:
    """--series as in `read_volume`: text with dots is a UID."""
    return int(text) if text is not None and text.isdecimal() else text


def sizes(volume: "Volume", shape: Sequence[int] | None = None) -> str:
    """Voxels and spacing as text; `shape` if it differs from that of the array."""

    def times(numbers: Sequence[float]) -> str:
        return " x ".join(f"{n:.3g}" if isinstance(n, float) else str(n) for n in numbers)

    return f"{times(shape or volume.array.shape)} voxels of {times(volume.spacing)} mm"


def positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, not {text}")
    return number


class Once(argparse.Action):
    """Stores a value, and refuses another one, as from an output that is given both with and without -o."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, None)
        if before not in (None, values):
            parser.error(f"two values for {self.dest}: {before} and {values}; give one")
        setattr(namespace, self.dest, values)


class _Help(argparse.HelpFormatter):
    """argparse's help; each line of the last paragraph starts anew, and the example is one line that can be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n".join(
            line if line.startswith("example: ") else fill(line, width, indent) for line in text.splitlines()
        )


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and a suggestion for a mistyped command, option or choice."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": _Help, **settings})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(refuse(f"{message}{self._suggestion(message)}; see {self.prog} --help"))

    def _suggestion(self, message: str) -> str:
        if choice := re.search(r"invalid choice: '?([^' ]+)'? \(choose from (.*)\)$", message):
            known = [name.strip(" '\"") for name in choice[2].split(", ")]
            return did_you_mean(choice[1], known, written=str)
        unknown = re.match(r"unrecognized arguments: (.*)$", message)
        if unknown or "arguments are required" in message:
            options = [option for action in self._actions for option in action.option_strings]
            words = unknown[1].split() if unknown else [word for word in self._given if word not in options]
            found = (did_you_mean(word.split("=")[0], options, written=str) for word in words if word.startswith("-"))
            return next(filter(None, found), "")
        return ""


COMMON: dict[str, dict[str, Any]] = {
    "--threads": {
        "metavar": "N",
        "help": "number of CPU threads (default: all that the process and its container may use)",
    },
    "--quiet": {
        "action": "store_true",
        "help": "no progress bars and messages; results and warnings are still printed",
    },
    "--verbose": {
        "action": "store_true",
        "help": "also print versions, threads, the backend of the selective scan and the run time",
    },
    "--traceback": {"action": "store_true", "help": "show the Python traceback of an error"},
}


def add_common(parser: argparse.ArgumentParser, *, listed: bool) -> None:
    """The options that every command takes; an option that is not given keeps the value of an outer parser.

    `listed`: whether the parser's help describes them, or only names them in its last line.
    """
    group = parser.add_argument_group("every command takes") if listed else parser
    for name, options in COMMON.items():
        own = options if listed else {**options, "help": argparse.SUPPRESS}
        if name == "--threads":
            own = {**own, "type": positive}
        group.add_argument(name, default=argparse.SUPPRESS, **own)
    if not listed:
        common = f"every command also takes {', '.join(COMMON)}; see deformmamba --help"
        parser.epilog = f"{parser.epilog}\n{common}" if parser.epilog else common


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], text: str, example: str
) -> argparse.ArgumentParser:
    """A parser for `deformmamba NAME`, which calls `run` (None is exit code 0); `text` is its one line of help."""
    made: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", epilog=f"example: deformmamba {example}"
    )
    made.set_defaults(run=run, parser=made)
    return made


def add_reading(parser: argparse.ArgumentParser, *, many: bool = False) -> None:
    """The arguments of a command that makes one scan from another; `many`: also from each scan of a folder."""
    add_source(parser, many=many)
    # the output may also follow the input; if it does not, the value of -o is kept
    parser.add_argument(
        "output", metavar="OUTPUT", nargs="?", action=Once, default=argparse.SUPPRESS, help="the same as -o OUTPUT"
    )
    parser.add_argument(
        "-o",
        "--output",
        dest="output",
        action=Once,
        metavar="OUTPUT",
        help="output file: .nii, .nii.gz, .mgh or .mgz, replaced if it exists. A folder (FOLDER/ if it "
        "is new): the file name is derived from the input's. DICOM input: also a folder for a new series",
    )
    parser.add_argument("--dtype", help="voxel type: float32 (default), float64, int16, uint16, int32 or uint8")


def add_source(parser: argparse.ArgumentParser, *, many: bool = False) -> None:
    """The arguments that select the input; `many`: it may be a folder of scans."""
    kinds = ".nii, .nii.gz, .mgh, .mgz or DICOM file, or folder of one DICOM series"
    parser.add_argument("input", metavar="INPUT", help=kinds + (", or folder of scans" if many else ""))
    parser.add_argument("--volume", type=int, metavar="K", help="volume of a 4-D file or series, counted from 0")
    parser.add_argument("--series", metavar="K", help="DICOM series of a folder, counted from 0, or its UID")
    parser.add_argument("--stack", type=int, metavar="K", help="stack of slices of a localiser, counted from 0")
    parser.add_argument(
        "--nan",
        choices=("refuse", "zero"),
        default="refuse",
        help="NaN and infinite voxels: an error (refuse, default) or 0 (zero)",
    )
    parser.add_argument(
        "--partial", action="store_true", help="read a DICOM folder even if some of its files are empty or damaged"
    )
    parser.add_argument("--axis", type=int, choices=(0, 1, 2), help="axis across the slices (default: from the file)")


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `add_source`, except the axis, for `volume.read_volume`."""
    return {
        "volume": args.volume,
        "series": series_of(args.series),
        "stack": args.stack,
        "nan": args.nan,
        "partial": args.partial,
    }


def output_for(args: argparse.Namespace, kind: str) -> str:
    """The output path from the arguments of `add_reading`.

    For a NIfTI or MGH file and an output that is a folder or ends in /: the input's name with `desc-<kind>` in that
    folder, which is created.

    Raises:
        InvalidArgument: no output.
        VolumeError: the folder cannot be created.
    """
    from deformmamba.inference.cohort import output_name
    from deformmamba.volume.files import MGH_SUFFIXES, NIFTI_SUFFIXES, make_folder

    output: str | None = args.output
    if not output:
        raise InvalidArgument("no output given; give it with -o OUTPUT, or after the input")
    files = (*NIFTI_SUFFIXES, *MGH_SUFFIXES)
    is_folder = output.endswith(("/", os.sep)) or (os.path.isdir(output) and not output.lower().endswith(files))
    if is_folder and os.path.isfile(args.input) and args.input.lower().endswith(files):
        make_folder(output)
        return os.path.join(output, output_name(os.path.basename(args.input), kind))
    return output


def sliced(volume: "Volume", axis: int, given: int | None) -> str:
    """The slice axis and how it was chosen, in a few words."""
    toward = volume.towards[axis] if volume.towards != "?" else ""
    plane = f" ({PLANES[toward]})" if toward else ""
    why = (
        "given by --axis"
        if given is not None
        else "from the file"
        if volume.slices is not None
        else "guessed from the voxel size; --axis N chooses another"
    )
    return f"slices taken along {'ijk'[axis]}{plane}, {why}"


def add_model(parser: argparse.ArgumentParser, *, auto: bool = False) -> None:
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"weights: a name, a path or org/repo (default: {DEFAULT_MODEL})"
        + ("; auto chooses the published weights that fit the scan best" if auto else ""),
    )


def add_subject(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--subject",
        metavar="REGEX",
        help="regular expression that finds the subject in a scan's path below the folder, such as 'patient[0-9]+' "
        "(default: sub-<label>, else guessed from folder and file names)",
    )


def add_running(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command that runs a model."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU if available)")
    parser.add_argument(
        "--consistency",
        choices=CONSISTENCIES,
        help="make the degraded output equal the input: exact; only inside the anatomy, reduced by the noise (object); "
        "or off (default: the best on validation data)",
    )


def running(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `add_running` as settings of `inference.upscale`, with a progress bar."""
    return {"device": device_here(args.device), "consistency": args.consistency, "progress": not is_quiet()}
