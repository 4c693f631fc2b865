"""What calibration measured of a store's neurons on a text: an LMDB file beside the catalogue, of this store alone.

Keys are `meta`, `settings` and one per array. Every value lies behind a SHA-256 of key and value. A finished
calibration is written in one transaction into a fresh file, which is then renamed into place. A calibration under way
keeps its state in a file of its own (`PARTIAL_FILE`), which outlives the process.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policies.precision import Recipe
from tiercache.errors import StoreError, UsageError
from tiercache.store import catalog
from tiercache.store.planestore import PlaneStore

FILE = "calibration.mdb"
PARTIAL_FILE = "calibration.partial.mdb"
SCHEMA = 1
Array = np.ndarray


@dataclass(frozen=True)
class Setting:
    """One measured way to run the neurons.

    Attributes:
        share: of int8's bytes of the neurons that it may read, a token.
        rank: planes that every neuron's ranking reads.
        recipes: one for each block.
        read_bytes: what it reads of the neurons, a token.
        kl: from the exact model (int8 everywhere), nats a token.
        entropy: of its own predictions, nats a token (M2Cache's measure).
        perplexity, exact_perplexity: on the calibration text.
        top1: share of tokens for which it has the exact model's likeliest next token.
    """

    share: float
    rank: int
    recipes: tuple[Recipe, ...]
    read_bytes: int
    kl: float
    entropy: float
    perplexity: float
    exact_perplexity: float
    top1: float

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Setting":
        """As read."""
        recipes = tuple(Recipe(**{**recipe, "shares": tuple(recipe["shares"])}) for recipe in plain["recipes"])
        return cls(**{**plain, "recipes": recipes})


@dataclass(frozen=True)
class Calibration:
    """See the module.

    Attributes:
        meta: store's digest and model, text's name, digest and tokens, precision of the other matrices.
        norms: of the down columns, fp32 [blocks, neurons].
        frequency: in which share of the tokens each neuron was among the more important half, fp32 [blocks, neurons].
        losses: squared error of each block's output at int3, int4 and int8 relative to the residual stream's, fp64
            [blocks, 3].
        settings: by share, then by rank.
        arrays: what else was measured (thresholds, co-activation, unions, traces), by name.
    """

    meta: Mapping[str, Any]
    norms: Array
    frequency: Array
    losses: Array
    settings: tuple[Setting, ...]
    arrays: Mapping[str, Array]

    def save(self, path: Path) -> None:
        """Write it to `path`, all or nothing."""
        arrays = {"norms": self.norms, "frequency": self.frequency, "losses": self.losses, **self.arrays}
        values = {
            "meta": json.dumps(dict(self.meta), sort_keys=True).encode(),
            "settings": json.dumps([asdict(setting) for setting in self.settings]).encode(),
            **{f"array/{name}": packed(array) for name, array in arrays.items()},
        }
        beside = path.with_name(path.name + ".new")
        catalog.write_values(beside, values, "begin again with --restart")
        # the digest first: between the two, the old file is refused and nothing lost
        catalog.digest_file(beside).replace(catalog.digest_file(path))
        beside.replace(path)

    @classmethod
    def load(cls, store: PlaneStore, path: Path | None = None) -> "Calibration":
        """The calibration of `store`; raises UsageError where there is none.

        Raises StoreError where it is damaged, or of another store or model.
        """
        path = path or store.folder / FILE
        if not path.is_file():
            raise UsageError(
                f"{store.folder} is not calibrated, and mixed mode must know what it loses; first run: "
                f"tiercache calibrate {store.folder} --text FILE"
            )
        try:
            values = catalog.read_values(path)
        except (StoreError, ValueError) as error:
            raise StoreError(f"{path} is damaged, or was not written to the end; calibrate again") from error
        try:
            meta = json.loads(values["meta"])
            _refuse_foreign(meta, store, path)
            arrays = {key[6:]: unpacked(value) for key, value in values.items() if key.startswith("array/")}
            settings = tuple(Setting.from_dict(plain) for plain in json.loads(values["settings"]))
            own = [arrays.pop(name) for name in ("norms", "frequency", "losses")]
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{path} cannot be read ({error!r}); calibrate again") from error
        return cls(meta, own[0], own[1], own[2], settings, arrays)

    def choose(self, *, share: float | None, max_loss: float | None, ranks: Sequence[int] = (1, 2, 3)) -> Setting:
        """The setting of least measured loss within `share`, or the one that reads least within `max_loss`.

        `share` is of int8's bytes of the neurons, `max_loss` bounds the measured KL in nats a token, and ranking may
        read as many planes as one of `ranks`. Raises UsageError where no measured setting does.
        """
        having = [setting for setting in self.settings if setting.rank in ranks]
        fit = [s for s in having if share is None or s.share <= share + 1e-9]
        fit = [s for s in fit if max_loss is None or s.kl <= max_loss]
        if not having:
            raise UsageError(f"no calibrated setting ranks with at most {max(ranks)} planes; calibrate again")
        if not fit:
            least, best = min(s.share for s in having), min(s.kl for s in having)
            bounds = [] if share is None else [f"reads at most {share:.3g} of int8's bytes"]
            bounds += [] if max_loss is None else [f"loses at most {max_loss:g} nats a token"]
            raise UsageError(
                f"no calibrated setting {' and '.join(bounds)}; settings begin at {least:.3g} of the bytes, and the "
                f"least measured loss is {best:.2g}; give bytes_per_token={least:.3g} or more, or "
                f"max_loss={best:.2g} or more"
            )
        return min(fit, key=lambda s: (s.read_bytes, s.kl) if share is None else (s.kl, s.read_bytes))


def _refuse_foreign(meta: Mapping[str, Any], store: PlaneStore, path: Path) -> None:
    own = store.contents.meta
    if meta["schema"] != SCHEMA:
        raise StoreError(f"{path} has format version {meta['schema']}, this tiercache reads {SCHEMA}; calibrate again")
    if meta["identity"] != own["identity"]:
        raise StoreError(
            f"{path} was calibrated for another model ({meta['model']}) than that of {store.folder} "
            f"({own['model_type']}); calibrate again"
        )
    if meta["store"] != store.digest:
        raise StoreError(f"{path} was calibrated for another store of this model than {store.folder}; calibrate again")


def packed(array: Array) -> bytes:
    """An array as bytes."""
    made = io.BytesIO()
    np.save(made, array, allow_pickle=False)
    return made.getvalue()


def unpacked(value: bytes) -> Array:
    """The array that was packed; raises ValueError where it is none."""
    try:
        array: Array = np.load(io.BytesIO(value), allow_pickle=False)
    except EOFError as error:
        raise ValueError("an array of no bytes") from error
    return array
