"""A head phantom: an image with known ground truth, for demonstrations where no scan may be shared."""

import numpy as np

from deformmamba.annotations import check_seed


def head(size: int = 256, seed: int = 0) -> np.ndarray:
    """An axial slice of a head as T2 weighting would show it, drawn from ellipses and random folds; not anatomy.

    Bright fluid in folds and ventricles, grey and white matter with a smooth texture, dark skull, a rim of fat, and
    three small bright spots. Edges are one pixel wide, as partial volumes leave them.

    Args:
        size: rows and columns.
        seed: of the folds and the texture.

    Returns:
        (size, size), float64, from 0 to about 1; air is 0.
    """
    random = np.random.default_rng(check_seed(seed))
    over = 2  # drawn twice as fine and averaged, so that edges hold partial volumes
    n = size * over
    y, x = np.meshgrid(*[np.linspace(-1, 1, n)] * 2, indexing="ij")
    angle, radius = np.arctan2(y / 0.9, x / 0.72), np.hypot(y / 0.9, x / 0.72)

    def wave(lowest: int, highest: int, strength: float) -> np.ndarray:
        """A closed curve around the head: its radius, as a sum of random waves."""
        k = np.arange(lowest, highest)
        phase = random.uniform(0, 2 * np.pi, len(k))
        height = strength * random.normal(size=len(k)) / np.sqrt(len(k))
        return np.tensordot(height, np.cos(k[:, None, None] * angle + phase[:, None, None]), 1)

    def ellipse(row: float, column: float, height: float, width: float, turn: float = 0.0) -> np.ndarray:
        v, u = y - row, x - column
        a, b = v * np.cos(turn) - u * np.sin(turn), v * np.sin(turn) + u * np.cos(turn)
        return (a / height) ** 2 + (b / width) ** 2 < 1

    def smooth(width: float) -> np.ndarray:
        """Random texture of a given width in pixels, mean 0 and deviation 1."""
        f = np.fft.fftfreq(n)
        gauss = np.exp(-2 * (np.pi * width * over) ** 2 * (f[:, None] ** 2 + f**2))
        made = np.fft.ifft2(np.fft.fft2(random.normal(size=(n, n))) * gauss).real
        return made / made.std()

    outline = 0.95 + wave(2, 6, 0.01)
    brain = 0.82 + wave(2, 8, 0.012)
    cortex = brain - 0.06 + wave(8, 40, 0.03)
    white = cortex - 0.07 + wave(10, 36, 0.03)
    image = np.where(radius < outline, 0.45, 0.0)  # skin and fat
    image = np.where(radius < outline - 0.05, 0.05, image)  # skull
    image = np.where(radius < brain, 0.95, image)  # fluid
    image = np.where(radius < cortex, 0.55 + 0.02 * smooth(2), image)  # grey matter
    image = np.where(radius < white, 0.36 + 0.015 * smooth(3), image)  # white matter
    image = np.where((np.abs(x) < 0.008) & (radius < brain) & (np.abs(y) > 0.3), 0.9, image)  # between the halves
    for side in (-1, 1):
        image = np.where(ellipse(0.02, side * 0.26, 0.2, 0.07, side * 0.15), 0.52, image)  # basal ganglia
        image = np.where(ellipse(-0.2, side * 0.1, 0.2, 0.045, side * -0.35), 0.97, image)  # ventricles, front
        image = np.where(ellipse(0.32, side * 0.16, 0.18, 0.05, side * 0.45), 0.97, image)  # and back
    image = np.where(ellipse(0.02, 0, 0.12, 0.015), 0.95, image)  # third ventricle
    for row, column, width in ((-0.42, 0.3, 0.025), (0.18, -0.42, 0.018), (0.28, 0.3, 0.03)):
        image = np.where(ellipse(row, column, width, width), 0.85, image)  # spots
    return image.reshape(size, over, size, over).mean((1, 3))
