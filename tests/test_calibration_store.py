"""Calibrations on disk: what is written comes back, damage and strangers are refused by name; choosing a setting."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mixed_oracle import calibration

import tiercache
from policies.precision import Recipe
from tiercache.errors import StoreError, UsageError
from tiercache.store import catalog
from tiercache.store.calibration import FILE, SCHEMA, Calibration, Setting, packed, unpacked
from tiercache.store.planestore import PlaneStore

RECIPE = Recipe("product", 2, 2, (0.1, 0.3, 0.2))
Folders = Callable[..., Path]


@pytest.fixture
def store(plane_store: Folders, tmp_path: Path) -> PlaneStore:
    """A copy, so that files may be put beside it."""
    shutil.copytree(plane_store("llama"), tmp_path / "store")
    return PlaneStore.open(tmp_path / "store")


def setting(share: float, rank: int, kl: float, read_bytes: int = 100) -> Setting:
    recipe = Recipe("gate", rank, 1, (0.1, 0.2, 0.0))
    return Setting(share, rank, (recipe, RECIPE, recipe), read_bytes, kl, 1.25, 2.5, 2.25, 0.875)


def full(store: PlaneStore) -> Calibration:
    made = calibration(store.folder, RECIPE)
    arrays = {"trace/0/0": np.arange(12, dtype=np.int32).reshape(3, 4), "empty": np.zeros((0, 5)), "one": np.float64(3)}
    return dataclasses.replace(made, settings=(setting(0.5, 1, 0.2), setting(0.5, 2, 0.1)), arrays=arrays)


def test_what_is_written_comes_back(store: PlaneStore) -> None:
    made = full(store)
    made.save(store.folder / FILE)
    found = Calibration.load(store)
    assert (found.meta, found.settings) == (made.meta, made.settings)
    for name in ("norms", "frequency", "losses"):
        one, other = getattr(found, name), getattr(made, name)
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
    assert found.arrays.keys() == made.arrays.keys()
    for name, array in made.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert np.array_equal(found.arrays[name], array)
    assert PlaneStore.open(store.folder).verify().extents > 0, "the store is what it was"


def test_saving_replaces_and_leaves_nothing_beside(store: PlaneStore) -> None:
    made = full(store)
    before = {path.name for path in store.folder.iterdir()}
    for kl in (0.1, 0.2):
        dataclasses.replace(made, settings=(setting(0.5, 1, kl),)).save(store.folder / FILE)
        assert Calibration.load(store).settings[0].kl == kl
    assert {path.name for path in store.folder.iterdir()} - before == {FILE, "calibration.sha256"}


def test_the_same_calibration_gives_the_same_bytes(store: PlaneStore, tmp_path: Path) -> None:
    for name in ("one.mdb", "two.mdb"):
        full(store).save(tmp_path / name)
    assert (tmp_path / "one.mdb").read_bytes() == (tmp_path / "two.mdb").read_bytes()


def test_none_is_a_usage_error_with_the_command(store: PlaneStore) -> None:
    with pytest.raises(UsageError, match=rf"tiercache calibrate {store.folder} --text"):
        Calibration.load(store)
    with (
        pytest.raises(UsageError, match="tiercache calibrate"),
        tiercache.offload(store.folder, precision="int8", mode="mixed", bytes_per_token=0.5),
    ):
        pass


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.8, 0.999])
def test_a_flipped_bit_anywhere_is_found(share: float, store: PlaneStore) -> None:
    path = store.folder / FILE
    full(store).save(path)
    flip(path, int(share * path.stat().st_size))
    with pytest.raises(StoreError, match=FILE) as refusal:
        Calibration.load(store)
    assert "calibrate again" in str(refusal.value), "converting again would not help"


def test_a_file_cut_short_or_without_its_digest(store: PlaneStore) -> None:
    path = store.folder / FILE
    full(store).save(path)
    whole = path.read_bytes()
    for data in (b"", whole[:100], whole[:-4096]):
        path.write_bytes(data)
        with pytest.raises(StoreError, match="calibrate again"):
            Calibration.load(store)
    path.write_bytes(whole)
    Calibration.load(store)
    catalog.digest_file(path).unlink()
    with pytest.raises(StoreError, match="calibrate again"):
        Calibration.load(store)


def test_a_crash_between_the_two_files_loses_nothing_silently(
    store: PlaneStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = store.folder / FILE, full(store)
    made.save(path)
    rename = Path.replace

    def crash(self: Path, target: Path) -> Path:
        if target.suffix == ".mdb":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            dataclasses.replace(made, settings=(setting(0.5, 1, 0.9),)).save(path)
    with pytest.raises(StoreError, match="calibrate again"):
        Calibration.load(store)
    made.save(path)
    assert Calibration.load(store).settings == made.settings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"identity": "another"}, ["another model", "gpt2", "llama"]),
        ({"store": "0" * 64}, ["another store of this model"]),
        ({"schema": SCHEMA + 1}, [f"version {SCHEMA + 1}", f"reads {SCHEMA}"]),
    ],
)
def test_strangers_are_refused_by_name(change: dict, words: list[str], store: PlaneStore) -> None:
    made = full(store)
    dataclasses.replace(made, meta={**made.meta, "model": "gpt2", **change}).save(store.folder / FILE)
    with pytest.raises(StoreError) as refusal:
        Calibration.load(store)
    for word in (*words, "calibrate again"):
        assert word in str(refusal.value)


def test_the_store_of_another_group_size_or_model(plane_store: Folders, store: PlaneStore, tmp_path: Path) -> None:
    for name, group, word in (("llama", 32, "another store of this model"), ("gpt2", 64, "another model")):
        place = tmp_path / f"{name}{group}"
        shutil.copytree(plane_store(name, group), place)
        full(store).save(place / FILE)
        with (
            pytest.raises(StoreError, match=word),
            tiercache.offload(place, precision="int8", mode="mixed", max_loss=1.0),
        ):
            pass


@pytest.mark.parametrize(
    "change",
    [
        {"settings": None},
        {"settings": b"[{}]"},
        {"settings": b"[7]"},
        {"settings": b"{"},
        {"meta": b"{}"},
        {"meta": None},
        {"array/norms": None},
        {"array/losses": b"no array"},
        {"array/losses": b""},
        {"array/frequency": packed(np.zeros(3))[:-5]},
    ],
    ids=str,
)
def test_sealed_nonsense_is_a_store_error(change: dict, store: PlaneStore) -> None:
    path = store.folder / FILE
    full(store).save(path)
    values = {**catalog.read_values(path), **change}
    catalog.write_values(path, {name: value for name, value in values.items() if value is not None})
    with pytest.raises(StoreError, match="calibrate again"):
        Calibration.load(store)


def test_shares_that_are_no_division_are_refused(store: PlaneStore) -> None:
    path = store.folder / FILE
    full(store).save(path)
    values = catalog.read_values(path)
    settings = json.loads(values["settings"])
    settings[0]["recipes"][0]["shares"] = [0.9, 0.9, 0.9]
    catalog.write_values(path, {**values, "settings": json.dumps(settings).encode()})
    with pytest.raises(StoreError, match="no division"):
        Calibration.load(store)


def test_arrays_are_never_pickles() -> None:
    with pytest.raises(ValueError, match="Object arrays"):
        packed(np.array([{}], dtype=object))
    for value in (b"", b"x", packed(np.arange(3))[:20]):
        with pytest.raises(ValueError, match=r"."):
            unpacked(value)


# Choosing.

SETTINGS = (
    setting(0.25, 1, 0.4, 25),
    setting(0.25, 2, 0.5, 24),
    setting(0.5, 1, 0.2, 50),
    setting(0.5, 2, 0.1, 49),
    setting(0.75, 1, 0.1, 75),
    setting(0.75, 2, 0.3, 70),
)


def choose(share: float | None, max_loss: float | None, **ranks: object) -> Setting:
    known = Calibration({}, np.zeros((0, 0)), np.zeros((0, 0)), np.zeros((0, 3)), SETTINGS, {})
    return known.choose(share=share, max_loss=max_loss, **ranks)


@pytest.mark.parametrize(
    ("share", "max_loss", "ranks", "place"),
    [
        (0.25, None, (1, 2), 0),
        (0.3, None, (1, 2), 0),
        (0.5, None, (1, 2), 3),
        (1.0, None, (1, 2), 3),  # of equal losses the one that reads less
        (0.75, None, (1,), 4),
        (0.5, None, (1,), 2),
        (0.25, None, (2,), 1),
        (None, 0.5, (1, 2), 1),
        (None, 0.4, (1, 2), 0),
        (None, 0.25, (1, 2), 3),
        (None, 0.1, (1,), 4),
        (0.75, 0.1, (1, 2), 3),
        (0.25 - 1e-12, None, (1, 2), 0),  # a share that was a size before
    ],
)
def test_choice(share: float | None, max_loss: float | None, ranks: tuple[int, ...], place: int) -> None:
    assert choose(share, max_loss, ranks=ranks) == SETTINGS[place]


@pytest.mark.parametrize(
    ("share", "max_loss", "ranks", "word"),
    [(0.2, None, (1, 2), "0.25"), (None, 0.05, (1, 2), "0.1"), (0.3, 0.3, (1, 2), "0.3"), (0.5, None, (3,), "rank")],
)
def test_nothing_to_choose(share: float | None, max_loss: float | None, ranks: tuple[int, ...], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        choose(share, max_loss, ranks=ranks)
