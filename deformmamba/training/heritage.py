"""What trained weights inherit from the weights that their training started from."""

from collections.abc import Mapping
from typing import Any

from deformmamba.weights import terms_of

# facts about the initial weights that also hold for the trained weights
INHERITED = ("consistency", "license", "acknowledgements")


def inherited_facts(sha256: str | None, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Consistency, licence and acknowledgements of weights, as far as they are known.

    `sha256`: of their file; the manifest has the licences of published files.
    """
    stated = {key: provenance[key] for key in INHERITED if key in provenance}
    return stated | terms_of(sha256, provenance)


def predecessors(sha256: str | None, provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The provenance of weights and of all their predecessors, oldest first."""
    kept = ("name", "steps", "batch", "seed", "spacings_mm", "recipe")
    before = provenance.get("init")
    own = {"sha256": sha256, **{key: provenance[key] for key in kept if key in provenance}}
    return [*(before if isinstance(before, list) else []), own]


def heritage(model: object) -> dict[str, Any]:
    """What the header of trained weights states about the file that `model` was loaded from; empty without one."""
    sha256, provenance = getattr(model, "sha256", None), getattr(model, "provenance", None)
    if not isinstance(sha256, str) or not isinstance(provenance, Mapping):
        return {}
    return {**inherited_facts(sha256, provenance), "init": predecessors(sha256, provenance)}
