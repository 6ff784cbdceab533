"""The examples that put a block into somebody else's network run, and what they train gets better."""

import runpy
from pathlib import Path
from statistics import mean

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = ("ss2d_in_a_vit", "deform_in_a_resnet", "context_in_a_unet", "edge_loss_in_a_loop")


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_trains_and_its_loss_falls(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(FOLDER / f"{example}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    losses = names["history"]
    assert mean(losses[-5:]) < 0.7 * mean(losses[:5])
    assert f"after {len(losses)} steps" in said
