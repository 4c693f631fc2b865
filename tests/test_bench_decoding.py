"""`python -m benchmarks.decoding`: a turn of one precision, and what all turns come to."""

from pathlib import Path

import pytest

from benchmarks import decoding
from benchmarks.real import peer
from tiercache.errors import EnvironmentUnsupportedError


def test_a_turn_tells_both_speeds(pico_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    asked = {
        "precision": "int8",
        "checkpoint": "none",
        "store": str(pico_store),
        "threads": 1,
        "tokens": 5,
        "end": 2047,
        "prompts": [[5, 6, 7], [8, 9, 10, 11]],
    }
    found = decoding._alone(asked)
    assert found.keys() == {"tokens_per_s", "prefill_tokens_per_s"}
    assert min(found.values()) > 0
    with pytest.raises(EnvironmentUnsupportedError, match="int8 fails"):
        decoding._alone(asked | {"store": "/nowhere"})


def test_medians_are_held_against_the_peer() -> None:
    rows = {
        "llama.cpp": [{"tokens_per_s": each, "prefill_tokens_per_s": 100.0} for each in (40.0, 50.0, 90.0)],
        "int4": [{"tokens_per_s": each, "prefill_tokens_per_s": 300.0} for each in (45.0, 10.0, 40.0)],
    }
    found = decoding.medians(rows)
    assert found["llama.cpp"]["of_peer"] == 1
    assert found["int4"] == {"tokens_per_s": 40.0, "prefill_tokens_per_s": 300.0, "of_peer": 0.8}


def test_a_peer_that_is_not_there_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ModuleNotFoundError(\"No module named 'llama_cpp'\")")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[1]}")
    assert "make peers" in peer.llamacpp(tmp_path / "none.gguf", [[1, 2]], 2, 0)["left_out"]
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('a library is missing')")
    with pytest.raises(EnvironmentUnsupportedError, match="a library is missing"):
        peer.llamacpp(tmp_path / "none.gguf", [[1, 2]], 2, 0)
