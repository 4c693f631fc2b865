"""Every command and every block of Python of the pages (`documented.PAGES`) is run, each page from top to bottom.

A new page needs nothing but words that the tables below know: what stands for a folder or a file (`WORDS`), options
that make a command short (`SHORTER`), and what is only parsed, with the reason (`PARSED`).
"""

import importlib.util
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import documented
import gguf_toys
import pytest
import quantized_toys
import torch
import transformers
import typer
from documented import HOUSE, PAGES, Block
from test_cli import call, save_model, save_tokenizer
from typer.testing import CliRunner

import tiercache
from tiercache.cli import app
from tiercache.commands.profiler import profile

# What a command's words stand for here; {folder} is the page's own, with a checkpoint and a store in it.
WORDS = {
    **dict.fromkeys(("MODEL", "CHECKPOINT", "path-or-hub-id"), "{folder}/checkpoint"),
    **dict.fromkeys(("STORE", "path/to/store"), "{folder}/store"),
    **dict.fromkeys(("FILE", "some-text-like-yours.txt"), "{folder}/text.txt"),
    "path/to/config.json": "{folder}/checkpoint/config.json",
    "model.Q4_K_M.gguf": "{folder}/model.Q4_K_M.gguf",  # a toy, in an encoding that the gguf package can write
    "Llama-3.1-8B-Instruct-AWQ": "{folder}/awq",
    "FOLDER": "{folder}",
    "NAME": "spare",
    "...": "def read_lines(path):\n",
    # A region of main memory stands in for a card, and a shape of 70B takes seconds to trace.
    "22GiB": "256MiB",
    "48GiB": "512MiB",
    "llama-2-70b": "tiny",
    "tinyllama-1.1b": "tiny",
}
# Options that are added, where a command would take long or ask.
SHORTER = {
    "tiercache convert": ("--tokens", "1024"),
    "tiercache calibrate": ("--restart", "--tokens", "256", "--window", "64", "--measure-tokens", "64"),
    "tiercache quality": ("--tokens", "256", "--window", "64"),
    "tiercache cache remove": ("--yes",),
}
# Commands that are parsed and not run: what they contain, and why.
PARSED = {
    "tiercache bench": "takes minutes; tests/test_bench_*.py run them on small shapes",
    "tiercache-profile probe": "takes minutes on a quiet machine; see tests/test_probe.py",
    "tiercache-profile validate": "takes minutes; see tests/test_probe.py",
    "--gpu this": "wants what a probe measured; see tests/test_probe.py",
    "tiercache serve": "serves until it is ended; see tests/test_serve_command.py",
    "jupyter lab": "serves until it is ended; tests/test_notebooks.py runs the notebooks",
}
# A page whose examples another test runs, which has what they want.
ELSEWHERE = {"docs/serving.md": "tests/test_serve_command.py, against a server"}
APPS = {"tiercache": app, "tiercache-profile": profile}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its store and a text, and checkpoints that are quantised, for copying."""
    folder = tmp_path_factory.mktemp("docs")
    save_model(folder / "checkpoint", layers=2)
    save_tokenizer(folder / "checkpoint", chats=True)
    gguf_toys.write(gguf_toys.build("chat"), folder / "model.Q4_K_M.gguf", gguf_toys.encoded("Q8_0"), chats=True)
    awq = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float16)
    quantized_toys.save_packed(model, folder / "awq", awq, quantized_toys.awq, bits=4, groups=4, symmetric=False)
    save_tokenizer(folder / "awq", chats=True)
    (folder / "text.txt").write_text(Path(__file__).read_text(encoding="utf-8")[:3000], encoding="utf-8")
    for command in (("convert", folder / "checkpoint"), ("calibrate",)):
        shorter = SHORTER[f"tiercache {command[0]}"]
        options = ("--text", folder / "text.txt") if command[0] == "calibrate" else ()
        assert call(*command, folder / "store", *options, *shorter).exit_code == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page is tried: the working folder, with a cache folder of its own."""
    shutil.copytree(made, tmp_path / "page")
    home, kernels = tmp_path / "home", Path(tiercache.config.environment.home_folder()) / "kernels"
    shutil.copytree(made / "store", home / "stores" / "spare")
    (home / "kernels").symlink_to(kernels.resolve())
    monkeypatch.setenv("TIERCACHE_HOME", str(home))
    monkeypatch.chdir(tmp_path / "page")
    return tmp_path / "page"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_runs(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = namespace(folder)
    for block in documented.blocks(page):
        where = f"{page}:{block.line}"
        if page in ELSEWHERE:
            parse_ours(block)
        elif block.language == "python":
            exec(compile(replaced(block.text, folder), where, "exec"), names)
        elif block.language in documented.SHELLS:
            for words in block.commands():
                run(words, folder, where, monkeypatch)
        else:  # what a program prints, or reads
            assert block.language in ("json", "toml", "text"), f"{where}: is this {block.language!r} to be run?"


def parse_ours(block: Block) -> None:
    if block.language in documented.SHELLS:
        for words in block.commands():
            if words[0] in APPS:
                parsed(words)


def namespace(folder: Path) -> dict[str, Any]:
    """What a page may take for granted: the library, and a prompt's tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "checkpoint")
    ids = tokenizer("def read_lines(path):\n", return_tensors="pt")
    return {"tiercache": tiercache, "torch": torch, "tokenizer": tokenizer, "ids": ids, "__name__": "page"}


def replaced(text: str, folder: Path) -> str:
    """Strings that are words of the table by what they stand for."""
    for word, meant in WORDS.items():
        text = text.replace(f'"{word}"', repr(meant.format(folder=folder)))
    return text


def run(words: list[str], folder: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command, or parse it where the table says so; its exit code is 0."""
    given = None
    if "|" in words:  # what a shell's own program writes is what ours reads
        place = words.index("|")
        given = subprocess.run(words[:place], capture_output=True, text=True, check=True).stdout
        words = words[place + 1 :]
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        monkeypatch.setenv(*words[0].split("=", 1))
        words = words[1:]
    shown = " ".join(words)
    meant = [WORDS.get(word, word).format(folder=folder) for word in words]
    parse = PARSERS.get(words[0])
    assert parse is not None, f"{where}: no test knows the program {words[0]!r}"
    parse(meant)
    if words[0] not in APPS or any(part in shown for part in PARSED):
        return
    for begin, options in SHORTER.items():
        if shown.startswith(begin):
            meant += [option for option in options if option not in meant]
    done = CliRunner(env={"NO_COLOR": "1"}).invoke(APPS[words[0]], meant[1:], input=given)
    assert done.exit_code == 0, f"{where}: {shown}\n{done.stderr}"


def parsed(words: list[str]) -> None:
    """Let typer read a command of ours; whatever it does not know is an error."""
    command: Any = typer.main.get_command(APPS[words[0]])
    context = command.make_context(words[0], words[1:])
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)


def has_target(words: list[str]) -> None:
    subprocess.run(["make", "-n", *words[1:]], cwd=HOUSE, check=True, capture_output=True)


def has_files(words: list[str]) -> None:
    assert all((HOUSE / word).exists() for word in words[1:] if not word.startswith("-")), words


def has_module(words: list[str]) -> None:
    if words[1] == "-m":
        assert importlib.util.find_spec(words[2]) is not None, words
    else:
        assert (HOUSE / words[1]).is_file(), words


def has_extra(words: list[str]) -> None:
    extras = tomllib.loads((HOUSE / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert words[1] in ("install", "download"), words
    asked = {name for word in words for found in re.findall(r"\[([\w,-]+)\]", word) for name in found.split(",")}
    assert asked <= extras.keys(), words


# What reads a program's words; of other programs than ours this is all that is tried, for the reason beside it.
PARSERS: dict[str, Callable[[list[str]], None]] = {
    **dict.fromkeys(APPS, parsed),
    "make": has_target,  # installs, tests and measures
    "pytest": has_files,  # this is what runs
    "python": has_module,  # the benchmarks take minutes to hours
    "pip": has_extra,  # asks the network
    "jupyter": lambda words: has_files(words[1:]),  # serves until it is ended; tests/test_notebooks.py runs notebooks
}


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.answers() for block in documented.blocks(page))])
def test_answers_are_what_is_printed(page: str) -> None:
    """Of predictions by data sheets, which are the same everywhere; with the models that are named."""
    for block in documented.blocks(page):
        for words, lines in block.answers():
            assert words[:2] == ["tiercache-profile", "predict"], "what else prints the same everywhere?"
            told = CliRunner(env={"NO_COLOR": "1"}).invoke(profile, words[1:]).stderr.splitlines()
            printed = [line for line in told if not line.endswith(" s so far")]  # on a slow machine it says that
            assert printed[: len(lines)] == lines, f"{page}:{block.line}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_sentences_exist(page: str) -> None:
    for words in documented.mentioned(page):
        if words[0] in APPS:
            exists(words)
        else:
            PARSERS[words[0]](words)


def exists(words: list[str]) -> None:
    """Each command and option that is named is one; what else a command needs may be left out within a sentence."""
    command: Any = typer.main.get_command(APPS[words[0]])
    rest = words[1:]
    while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
        assert rest[0] in command.commands, words
        command, rest = command.commands[rest[0]], rest[1:]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known, words


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", documented.text_of(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (HOUSE / page).parent / path if path else HOUSE / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in set(anchors(file.read_text(encoding="utf-8"))), f"{page}: {target}"


def anchors(text: str) -> Iterator[str]:
    """Of headings, as GitHub makes them."""
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_a_pipe_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = Block("", "printf 'a\\nb' | tiercache run MODEL --prompt - --max-new-tokens 1\n", 1).commands()
    run(words, folder, "here", monkeypatch)


@pytest.mark.parametrize(
    "text",
    [
        "tiercache run MODEL --no-such-option",
        "tiercache verify NOWHERE",
        "make no-such-target",
        "python -m no_such_module",
        "pip install 'tiercache[no-such-extra]'",
        "pytest tests/test_no_such.py",
        "no-such-program",
        "tiercache-profile frobnicate",
    ],
)
def test_a_wrong_command_is_found(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = Block("", text, 1).commands()
    with pytest.raises((AssertionError, subprocess.CalledProcessError, typer.BadParameter.__base__)):  # type: ignore[arg-type]
        run(words, folder, "here", monkeypatch)


def test_commands_are_read_as_a_shell_does() -> None:
    text = "a 'b c'  # no\n\nd && e \\\n    f\n"
    assert list(Block("", text, 1).commands()) == [["a", "b c"], ["d"], ["e", "f"]]
    console = Block("console", "$ a b\nan answer\n$ c\n", 1)
    assert list(console.commands()) == [["a", "b"], ["c"]]
    assert console.answers() == [(["a", "b"], ["an answer"])]
