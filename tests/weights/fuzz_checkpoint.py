"""Gives damaged checkpoints to the loader. For any damage, it must load a valid model or raise WeightsError.

Run: python tests/weights/fuzz_checkpoint.py --n 100000

Mutant i of a seed is always the same file, so `--start i --n 1` repeats a failure, and a long run can be split.
Prints the number of loaded mutants, and the distinct lines of our code that refused the others. At the first other
outcome, or if memory grows by more than MAX_GROWTH, the run keeps the file and ends with exit code 1.
"""

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deformmamba.models import MODELS, SRModel, from_pretrained
from deformmamba.weights import WeightsError

TINY: dict[str, Any] = {"scale": 2, "dims": [8, 12], "depths": [1, 1], "patch": 2, "stem_channels": 4, "d_state": 2}
MAX_GROWTH = 500_000  # KiB


@dataclass
class Tally:
    n: int = 0
    loaded: int = 0
    places: Counter[str] = field(default_factory=Counter)
    longest: int = 0  # length of the longest message, in characters
    grown: int = 0  # growth of memory in KiB

    def __str__(self) -> str:
        return (
            f"{self.n} mutants: {self.loaded} loaded, the rest refused at {len(self.places)} places, in one line of at "
            f"most {self.longest} characters; memory grew by {self.grown} KiB"
        )


class Crash(Exception):
    """The loader did something that it must not do. The message names the mutant and its file."""


def fuzz(folder: Path, *, n: int, seed: int = 0, start: int = 0) -> Tally:
    """Loads mutants start to start + n - 1 of `seed`, written into `folder`.

    Raises:
        Crash: at the first that neither loads a valid model nor raises a WeightsError of one line of ASCII.
    """
    tally = Tally()
    originals = _originals(folder)
    path = folder / "mutant.safetensors"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(start, start + n):
        data = originals[i // 4 % len(originals) if i % 4 == 0 else 0]
        path.write_bytes(Mutator(data, f"{seed}-{i}")())
        tally.n += 1
        try:
            model = from_pretrained(path)
            _check(isinstance(model, SRModel) and not model.training, "it loaded something else")
            _check(all(t.isfinite().all() for t in model.state_dict().values()), "it loaded what is not finite")
            tally.loaded += 1
        except WeightsError as error:
            message = str(error).replace(str(folder), "")
            tally.places[_place(error)] += 1
            tally.longest = max(tally.longest, len(message))
            _keep(i, path, "its message is not one line of ASCII", message.isascii() and message.isprintable())
            _keep(i, path, f"its message has {len(message)} characters", len(message) < 1000)
        except BaseException as error:
            _keep(i, path, f"{type(error).__name__}: {error}", isinstance(error, KeyboardInterrupt), error)
            raise
        tally.grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        _keep(i, path, f"memory grew by {tally.grown} KiB", tally.grown < MAX_GROWTH)
    return tally


def _check(good: bool, message: str) -> None:
    if not good:
        raise AssertionError(message)


def _keep(i: int, path: Path, why: str, good: bool, error: BaseException | None = None) -> None:
    if not good:
        kept = path.rename(path.with_name(f"mutant-{i}.safetensors"))
        raise Crash(f"mutant {i}, {kept}: {why}") from error


def _originals(folder: Path) -> list[bytes]:
    """Small checkpoints: first the network of the paper, then the models that are small by default."""
    torch.manual_seed(0)
    models = [MODELS["DeformMambaSR"](**TINY)]
    models += [MODELS[name](scale=2) for name in ("Bicubic", "BSpline", "ZeroFill", "SRCNN")]
    path = folder / "original.safetensors"
    files = []
    for model in models:
        model.save_pretrained(path, provenance={"trained_on": ["noise"], "seed": 0})
        _check(isinstance(from_pretrained(path), type(model)), "the unmutated file loads")
        files.append(path.read_bytes())
    return files


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def join(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + body


class Mutator:
    """Damage to a checkpoint: bytes, the header's length, the header's JSON, and the JSON inside it."""

    ODD: tuple[Any, ...] = (
        *(None, True, False, 0, 1, -1, 2, 3, 7, 63, 64, 65, 2**16, 2**16 + 1, 2**31, 2**63, 10**30, 0.5, -1e308, 1e-9),
        *("", "a", "\n\0\ud800", "A" * 5000, "euler", "zoh", "zero-fill", "F64", "I32", [], [0], [[]], [8, 12], {}),
        *({"a": 1}, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, *MODELS),
    )

    def __init__(self, data: bytes, seed: str) -> None:
        self.data = data
        self.random = random.Random(seed)
        self.n_header = int.from_bytes(data[:8], "little")

    def __call__(self) -> bytes:
        r = self.random
        kinds = [self.flip, self.splice, self.cut, self.length, self.header, self.header, self.config, self.config]
        return r.choice(kinds)()

    def place(self) -> int:
        """The index of a random byte: with equal probability in the length, the header or the data."""
        r = self.random
        low, high = r.choice([(0, 8), (8, 8 + self.n_header), (8 + self.n_header, len(self.data))])
        return r.randrange(low, max(high, low + 1)) % len(self.data)  # a model without weights has no data

    def flip(self) -> bytes:
        data = bytearray(self.data)
        for _ in range(self.random.choice([1, 1, 2, 8, 64])):
            data[self.place()] ^= 1 << self.random.randrange(8)
        return bytes(data)

    def splice(self) -> bytes:
        a, b, n = self.place(), self.place(), self.random.choice([0, 1, 4, 8, 100])
        return self.data[:a] + self.data[b : b + n] + self.data[a + self.random.choice([0, n, 1]) :]

    def cut(self) -> bytes:
        data = self.data[: self.place()]
        return data + self.random.randbytes(self.random.choice([0, 0, 1, 9, 1000]))

    def length(self) -> bytes:
        n = self.random.choice([0, 1, 2, self.n_header - 1, self.n_header + 1, 2**22, 2**32, 2**64 - 1])
        return n.to_bytes(8, "little") + self.data[8:]

    def header(self) -> bytes:
        header, body = split(self.data)
        for _ in range(self.random.choice([1, 1, 2, 5])):
            header = self.change(header)
        return join(header, body)

    def config(self) -> bytes:
        """Damage inside the metadata's JSON; header and tensors stay valid, so it reaches a model's constructor."""
        header, body = split(self.data)
        key = self.random.choice(["config", "config", "config", "provenance"])
        value = json.loads(header["__metadata__"][key])
        for _ in range(self.random.choice([1, 1, 2, 5])):
            value = self.change(value)
        text = json.dumps(value)
        if self.random.random() < 0.1:
            text = text.replace(self.random.choice(list(text)), self.random.choice(["", "[", "NaN", "9" * 400]), 1)
        header["__metadata__"][key] = text
        return join(header, body)

    def change(self, value: Any) -> Any:
        """`value` with one part, at any depth, replaced, removed, doubled or renamed."""
        r = self.random
        if isinstance(value, dict) and value and r.random() < 0.95:
            key = r.choice(list(value))
            if key != "__metadata__" and "__metadata__" in value and r.random() < 0.3:
                key = "__metadata__"
            action = r.random()
            if action < 0.6:
                return {**value, key: self.change(value[key])}
            if action < 0.7:
                return {k: v for k, v in value.items() if k != key}
            if action < 0.8:
                return {(k + "x" if k == key else k): v for k, v in value.items()}
            if action < 0.9:
                return {**value, "new": value[key]}
            other = r.choice(list(value))
            return {**value, key: value[other], other: value[key]}
        if isinstance(value, list) and value and r.random() < 0.8:
            i = r.randrange(len(value))
            action = r.random()
            if action < 0.6:
                return [*value[:i], self.change(value[i]), *value[i + 1 :]]
            return value[:i] + value[i + 1 :] if action < 0.8 else value[:i] + value[i:] * r.choice([2, 2, 40])
        if isinstance(value, int) and not isinstance(value, bool) and r.random() < 0.6:
            return value + r.choice([-4, -1, 1, 4, 8, value])
        return r.choice(self.ODD)


def _place(error: WeightsError) -> str:
    """The place where a file was refused: module.function:line of our code, for the innermost exception."""
    place = ""
    cause: BaseException | None = error
    while cause is not None:
        frames = traceback.extract_tb(cause.__traceback__)
        ours = [frame for frame in frames if f"deformmamba{os.sep}" in frame.filename]
        place = f"{Path(ours[-1].filename).stem}.{ours[-1].name}:{ours[-1].lineno}" if ours else place
        cause = cause.__context__
    return place


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=100_000, help="how many mutants (default: 100000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="the first mutant's number")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        tally = fuzz(folder, n=args.n, seed=args.seed, start=args.start)
    except Crash as crash:
        print(crash, file=sys.stderr)
        return 1
    print(tally)
    for where, n in tally.places.most_common():
        print(f"{n:8d}  {where}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
