"""Stands in for a calibration where there is nothing to learn: weights that are random."""

import numpy as np

from policies.precision import Recipe, fitted_recipe
from tiercache.engine import mixed_plan
from tiercache.errors import UsageError
from tiercache.store.calibration import Calibration, Setting
from tiercache.store.planestore import PlaneStore


def calibration_of_random_weights(store: PlaneStore, share: float) -> Calibration:
    """A calibration of weights that nobody measured: one plain recipe, every neuron alike."""
    blocks = store.blocks()
    sizes, neurons = mixed_plan.sizes_of(blocks[0], store), blocks[0].rows
    recipe = fitted_recipe(Recipe("product", 1, sizes.inward, (0.1, 0.5, 0.0)), share, neurons, sizes)
    recipe = recipe or fitted_recipe(Recipe("gate", 1, 1, (0.05, 0.5, 0.0)), share, neurons, sizes)
    if recipe is None:
        raise UsageError(f"no recipe reads at most {share} of int8's bytes; ask for more")
    setting = Setting(share, 1, (recipe,) * len(blocks), 0, *([float("nan")] * 5))
    table = np.zeros((len(blocks), neurons), np.float32)
    losses = np.tile([1.0, 0.1, 0.0], (len(blocks), 1))
    meta = {"text": {"name": "nothing (random weights)"}, "precision": "int8"}
    return Calibration(meta, table + 1, table, losses, (setting,), {})
