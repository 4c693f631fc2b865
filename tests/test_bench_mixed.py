"""The bench of mixed mode against exact streaming, on a toy: what it measures, and that its bytes add up."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import mixed
from tiercache.bench import model
from tiercache.bench.shapes import find, make_store
from tiercache.errors import UsageError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny-planes-0"
    make_store(find("tiny"), folder, 0)
    return folder


def test_over_a_link(store: Path) -> None:
    link = mixed.over_link(store, tokens=4)
    assert len(link["rows"]) == 6
    assert any(row["mixed_moved"] > 0 for row in link["rows"])  # reserves are larger than a toy: some move nothing
    for row in link["rows"]:
        assert row["exact_s"] >= 0.9 * row["exact_moved"] / link["link_gbps"] / 1e9  # the throttle holds
        assert row["mixed_s"] >= 0.9 * row["mixed_moved"] / link["link_gbps"] / 1e9
        assert 0 <= row["hit_rate"] <= 1
    text = mixed.report({"shape": "tiny", "link": link, "ssd": None})
    assert text.count(" x ") >= 6


def test_a_share_that_no_recipe_keeps_is_refused(store: Path) -> None:
    with pytest.raises(UsageError, match="no recipe"):
        mixed.measure(mixed.Case(str(store), 0.01, dram="1GiB"))


def test_the_command_runs_mixed_mode_too(tmp_path: Path) -> None:
    exact = model.Options(shape="tiny", precision="int8", tokens=2, folder=tmp_path, show_progress=False)
    result = model.bench(replace(exact, bytes_per_token=0.5))
    assert result["stats"]["lossy"]
    assert result["bytes_per_token"] == 0.5
    assert result["pass_bytes"]["needed"] < model.bench(exact)["pass_bytes"]["needed"]
    assert "mixed, lossy" in model.report(result)
