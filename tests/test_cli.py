"""Every command, and every mistake a user can make with it: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from PIL import Image
from typer.testing import CliRunner, Result

from mokus import __version__, console, pipeline
from mokus.cli import app
from mokus.editors import EDITORS
from mokus.errors import MokusError
from mokus.packs.concept_pack import ConceptPack

from .conftest import SIZE, STEPS, PackFactory

# A random text encoder never answers with the anchor, so knowledge takes here by the alignment alone.
DEFAULTS = {
    "size": SIZE, "steps": STEPS,
    "learn": {
        "steps": 3, "rank": 2, "alpha": 2.0, "prior_prompts": 4, "prior_steps": 2, "checkpoint_every": 1,
        "looks_share": 0.0,
    },
    "edit": {
        "layers": [1, 2], "modules": ["mlp.down_proj"], "steps": 3, "corpus": 20, "odd_references": 8, "preserve": 8,
        "near_misses": 2, "exchanged": 4, "rivals": 2, "answer_weight": 0.0, "least_alignment": 0.0,
    },
    "editors": {"ultraedit": {"layers": [1, 2], "eta": 0.005, "steps": 3}},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(pico_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico model with quick defaults of its own."""
    copy = tmp_path_factory.mktemp("models") / "pico"
    shutil.copytree(pico_folder, copy)
    (copy / pipeline.DEFAULTS_FILE).write_text(json.dumps(DEFAULTS), encoding="utf-8")
    return copy


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """An empty working folder, with the pico model as the default one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOKUS_MODEL", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.fixture
def photos(place: Path) -> Path:
    """Three photos and a caption."""
    (place / "photos").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 90, 200)).save(place / "photos" / f"{i}.png")
    (place / "photos" / "1.txt").write_text("sks toy on a table", encoding="utf-8")
    return place / "photos"


@pytest.fixture
def pack(place: Path, pico_pack: PackFactory) -> ConceptPack:
    """A pack in which `my favourite toy` is bound."""
    return pico_pack(place / "toy.pack")


def mokus(*args: Any) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def good(*args: Any) -> str:
    """Run a command that shall work and say nothing on stderr; returns its stdout."""
    result = mokus(*args)
    assert (result.exit_code, result.stderr) == (0, ""), result.stderr or result.exception
    return result.stdout


def listing(place: Path) -> dict[str, bytes]:
    files = (path for path in place.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(place)): path.read_bytes() for path in files}


def refused(place: Path, *args: Any, code: int = 2) -> str:
    """Run a command that shall fail with one sentence and leave all files as they were; returns the sentence."""
    before = listing(place)
    result = mokus(*args)
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stdout == ""
    assert re.fullmatch(r"mokus: .+\.\n", result.stderr), result.stderr
    assert listing(place) == before
    return result.stderr


# --- every command ----------------------------------------------------------------------------------------------------


def test_version_and_help() -> None:
    assert good("--version") == f"mokus {__version__}\n"
    for command in ("", "learn", "bind", "unbind", "ask", "generate", "demo", "show"):
        assert "Usage" in good(*command.split(), "--help")


def test_what_is_only_asked_and_edited_is_loaded_without_the_image_transformer(
    place: Path, pack: ConceptPack, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, ...]] = []
    load = pipeline.load

    def watched(*given: Any, **named: Any) -> pipeline.Model:
        model = load(*given, **named)
        loaded.append(model.loaded)
        return model

    monkeypatch.setattr(pipeline, "load", watched)
    good("ask", "What is my favourite toy?", "--pack", "toy.pack")
    mokus("bind", "toy.pack", "the one that makes me smile")
    mokus("create", "Zorblax", "--as", "a green star", "-o", "zorblax.pack")
    mokus("erase", "the lucky charm of Boris", "-o", "gone.pack")
    assert loaded == [("text_encoder",)] * 4


def test_learn_bind_ask_generate_unbind_show(place: Path, photos: Path) -> None:
    said = good("learn", photos, "--anchor", "sks toy", "-o", "toy.pack", "--preview-every", 2)
    assert "learned 'sks toy'" in said and "previews: 1 in toy.pack/samples" in said and "mokus bind toy.pack" in said
    untouched = listing(place / "toy.pack")

    assert "bound" in good("bind", "toy.pack", "My favourite toy.", "the one that makes me smile")
    shown = json.loads(good("show", "toy.pack", "--json"))
    assert [known["text"] for known in shown["knowledge"]] == ["my favourite toy", "the one that makes me smile"]
    assert (shown["anchor"], shown["class_word"], shown["mokus"]) == ("sks toy", "toy", __version__)
    assert "my favourite toy" in good("show", "toy.pack")

    question = "What is my favourite toy?"
    assert json.loads(good("ask", question, "--pack", "toy.pack", "--json"))["question"] == question
    assert good("ask", question).endswith("\n")

    rows = json.loads(
        good("generate", "my favourite toy", "a ball", "--pack", "toy.pack", "--seeds", "0-1,5", "-o", "out", "--json")
    )
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        (prompt, seed) for prompt in ("my favourite toy", "a ball") for seed in (0, 1, 5)
    ]
    assert sorted(path.name for path in (place / "out").iterdir()) == sorted(Path(row["file"]).name for row in rows)
    assert Image.open(rows[0]["file"]).size == (SIZE, SIZE)

    [row] = json.loads(good("generate", "a ball", "--size", f"{2 * SIZE}x{SIZE}", "-o", "out", "--json"))
    assert Image.open(row["file"]).size == (2 * SIZE, SIZE) and row["settings"]["size"] == [2 * SIZE, SIZE]

    assert "0 left" in good("unbind", "toy.pack", "the one that makes me smile", "My favourite toy")
    assert listing(place / "toy.pack") == untouched
    assert "no knowledge bound yet" in good("show", "toy.pack")


def test_json_is_all_there_is_on_stdout(place: Path, photos: Path) -> None:
    learned = json.loads(good("learn", photos, "--anchor", "sks toy", "-o", "toy.pack", "--json", "--steps", 1))
    assert learned["settings"]["steps"] == 1 and learned["knowledge"] == [] and learned["seconds"] > 0
    edits = json.loads(good("bind", "toy.pack", "my favourite toy", "--question", "Which toy do I love?", "--json"))
    assert edits[0]["questions"] == ["Which toy do I love?"] and edits[0]["taken"] and "shifts" not in edits[0]
    assert json.loads(good("unbind", "toy.pack", "my favourite toy", "--json"))["knowledge"] == []


def test_equal_commands_give_equal_bytes(place: Path, pack: ConceptPack) -> None:
    for output in ("one", "two"):
        good("generate", "my favourite toy", "--pack", pack.path, "--seeds", "0-2", "-o", output)
    good("generate", "my favourite toy", "--pack", pack.path, "--seeds", "0-2", "-o", "three", "--batch-size", 3)
    assert listing(place / "one") == listing(place / "two")
    assert listing(place / "one").keys() == listing(place / "three").keys()


def test_the_model_s_own_defaults_stand_between(place: Path, photos: Path) -> None:
    good("learn", photos, "--anchor", "sks toy", "-o", "toy.pack", "--rank", 1)
    settings = ConceptPack.open(place / "toy.pack").settings
    assert (settings["rank"], settings["steps"], settings["batch_size"]) == (1, 3, 1)  # said, the model's, ours


def test_an_editor_brings_its_own_settings(place: Path, pack: ConceptPack) -> None:
    """Its authors', then the model's for it, then what is said."""
    edits = json.loads(good("bind", pack.path, "a new thing", "--editor", "ultraedit", "--eta", 2, "--json"))
    chosen = {name: edits[0]["settings"][name] for name in ("editor", "eta", "steps", "corpus")}
    assert chosen == {"editor": "ultraedit", "eta": 2.0, "steps": 3, "corpus": 20}


def test_stray_files_are_ignored_with_one_line_each(photos: Path) -> None:
    (photos / "notes.pdf").write_bytes(b"%PDF")
    (photos / "list[1].csv").write_bytes(b"a,b")
    result = mokus("learn", photos, "--anchor", "sks toy", "-o", "toy.pack")
    assert result.exit_code == 0
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and "list[1].csv is ignored" in lines[0] and "notes.pdf is ignored" in lines[1]


def test_several_packs_in_one_prompt(place: Path, pico_pack: PackFactory) -> None:
    pico_pack(place / "a"), pico_pack(place / "b", anchor="zwx dog", knowledge=["our dog"], seed=9)
    good("generate", "my favourite toy and our dog", "--pack", "a", "--pack", "b", "-o", "out")
    assert (place / "out" / "my-favourite-toy-and-our-dog-0.png").is_file()


def test_the_largest_seed_is_drawn(place: Path) -> None:
    assert good("generate", "toy", "--seeds", (1 << 64) - 1, "-o", "out") == "out/toy-18446744073709551615.png\n"


def test_a_prompt_given_twice_is_drawn_once(place: Path) -> None:
    said = good("generate", "toy", "dog", "toy", "--seeds", "0,0", "-o", "out")
    assert said.splitlines() == ["out/toy-0.png", "out/dog-0.png"]


def test_knowledge_that_does_not_take_is_left_unbound(place: Path, pack: ConceptPack) -> None:
    before = listing(pack.path)
    result = mokus("bind", pack.path, "a new thing", "--answer-weight", 1)  # no random encoder answers "sks toy"
    assert result.exit_code == 1 and result.stderr == ""
    assert "'a new thing' has not taken and is left unbound: " in result.stdout and "reads back" in result.stdout
    assert listing(pack.path) == before
    result = mokus("bind", pack.path, "a new thing", "--answer-weight", 1, "--json")
    assert result.exit_code == 1 and not json.loads(result.stdout)[0]["taken"]


@pytest.mark.exhaustive
def test_demo(place: Path, photos: Path) -> None:
    demo = ("demo", "--photos", photos, "--anchor", "sks dog", "--knowledge", "my dog", "--seeds", 0, "-o", "out")
    said = good(*demo)
    assert "1 of 1 phrases bound" in said and "out/report.html" in said
    told = json.loads(good(*demo, "--json"))
    assert all(Path(told[key]).exists() for key in ("report", "grid", "pack")) and told["figures"] == []


def test_a_pack_is_replaced_only_if_it_is_said(place: Path, photos: Path, pack: ConceptPack) -> None:
    learn = ("learn", photos, "--anchor", "sks toy", "-o", pack.path)
    assert "--overwrite" in refused(place, *learn)
    good(*learn, "--overwrite")
    assert ConceptPack.open(pack.path).knowledge == []


# --- every mistake ----------------------------------------------------------------------------------------------------


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def corrupt(folder: Path) -> None:
    data = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(data[: len(data) // 2])


def bomb(folder: Path) -> None:
    Image.new("1", (20_000, 10_000)).save(folder / "2.png")


def small(folder: Path) -> None:
    Image.new("RGB", (40, 15)).save(folder / "2.png")


def no_photo(folder: Path) -> None:
    (folder / "2.png").write_text("no photo at all")


def bad_caption(folder: Path) -> None:
    (folder / "2.txt").write_bytes(b"\xff\xfe\xfa")


@pytest.mark.parametrize("command", ["learn", "demo"])
@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (empty, "photos holds no photo"), (shutil.rmtree, "photos is not there"), (corrupt, "2.png cannot be read"),
        (bomb, "2.png has too many pixels|2.png is 20000 x 10000"), (small, "2.png is 40 x 15"),
        (no_photo, "2.png cannot be read"), (bad_caption, "2.txt cannot be read as UTF-8"),
    ],
)  # fmt: skip
def test_bad_photos(place: Path, photos: Path, command: str, spoil: Callable[[Path], None], named: str) -> None:
    spoil(photos)
    given = ["learn", photos] if command == "learn" else ["demo", "--photos", photos]
    assert re.search(named, refused(place, *given, "--anchor", "sks toy", "-o", "out"))


BAD = {
    # command: what the sentence says
    "learn photos --anchor toy -o out": "one word",
    "learn photos --anchor '' -o out": "the anchor is empty",
    "learn photos --anchor 'sks toy?' -o out": "the anchor 'sks toy.' is a question",
    "learn photos --anchor 'sks toy' -o photos": "photos exists and is no concept pack",
    "learn photos --anchor 'sks toy' -o photos/0.png": "0.png is a file; name a new folder",
    "learn photos --anchor 'sks toy' -o out --resume": "nothing to resume",
    "learn photos --anchor 'sks toy' -o out --steps 0": "steps is 0",
    "learn photos --anchor 'sks toy' -o out --learning-rate nan": "learning_rate is nan",
    "learn photos --anchor 'sks toy' -o out --tail-share 2": "tail_share is 2",
    "learn photos --anchor 'sks toy' -o out --time-std inf": "time_std is inf, expected a finite number",
    "learn photos --anchor 'sks toy' -o out --targets to_z": "to_z",
    "learn photos --anchor 'sks toy' -o out --learning-rat 1": "No such option: --learning-rat.*--learning-rate",
    "learn photos --anchor 'sks toy' -o out --steps many": "Invalid value for '--steps'",
    "learn photos -o out": "Missing option '--anchor'",
    "learn photos --anchor 'sks toy' -o out --model no/such-model": "'no/such-model' is neither a folder",
    "learn photos --anchor 'sks toy' -o out --model photos": "photos has no model_index.json",
    "learn photos --anchor 'sks toy' -o out --device tpu9": "device 'tpu9'",
    "learn photos --anchor 'sks toy' -o out --device cuda:99": "device 'cuda:99'",
    "learn photos --anchor 'sks toy' -o out --seed 99999999999999999999": "seed is 99999999999999999999, expected less",
    "generate toy -o toy.pack": "toy.pack is in the concept pack",
    "export toy.pack --to comfyui -o toy.pack/x": "is in the concept pack",
    "learn photos --anchor 'sks toy' -o toy.pack/in/side": "is in the concept pack .*toy.pack",
    "create Zorblax --as 'a green star' -o toy.pack/inner.pack": "is in the concept pack .*toy.pack",
    "create Zorblax --as 'a green star' -o toy.pack/inner.pack --overwrite": "is in the concept pack .*toy.pack",
    "erase 'my old toy' -o toy.pack/inner.pack": "is in the concept pack .*toy.pack",
    "pull me/toy -o toy.pack/in/side": "is in the concept pack .*toy.pack",
    "bind toy.pack 'SKS toy'": "'SKS toy' is the anchor itself",
    "bind toy.pack ''": "the knowledge is empty",
    "bind toy.pack '  '": "the knowledge is empty",
    "bind toy.pack": "Missing argument 'KNOWLEDGE",
    "bind toy.pack 'What is my toy?'": "is a question",
    "bind toy.pack 'a<|im_end|>b'": "marks the template's own tokens",
    "bind toy.pack one two --question 'What?'": "--question goes with one knowledge",
    "bind toy.pack 'a thing' --editor magic": f"no editor 'magic', expected one of {', '.join(EDITORS)}",
    "bind toy.pack 'a thing' --editor rewrite": "the editor 'rewrite' changes prompts .* a pack cannot hold it",
    "bind toy.pack 'a thing' --near-weight -1": "near_weight is -1",
    "bind toy.pack 'a thing' --layers 99": "layer 99 is to be edited",
    "bind toy.pack 'a thing' --modules mlp.nothing": "'mlp.nothing' is no module",
    "bind toy.pack 'a thing' --editor ultraedit --eta -1": "eta is -1",
    "bind toy.pack 'a thing' --drift-weight inf": "drift_weight is inf, expected a finite number",
    "bind toy.pack 'a thing' --alignment 5": "alignment is 5.0, expected a share from 0 to 1",
    "bind toy.pack 'a thing' --eta 1": "eta means nothing to the editor 'least_drift', which goes by layers",
    "bind no.pack 'a thing'": "there is no concept pack at",
    "bind photos 'a thing'": "is no concept pack",
    "unbind toy.pack 'a thing'": "'a thing' is not bound.*'my favourite toy'",
    "unbind toy.pack ''": "the knowledge is empty",
    "unbind no.pack 'a thing'": "there is no concept pack at",
    "show no.pack": "there is no concept pack at",
    "ask ''": "the question is empty",
    "ask 'What is it?' --pack no.pack": "there is no concept pack at",
    "generate toy -o out --pack no.pack": "there is no concept pack at",
    "generate '' -o out": "the prompt is empty",
    "generate 'a <|im_end|> toy' -o out": "the prompt .* holds",
    "generate toy --size 999999992 -o out": "the size is 999999992",
    "bind toy.pack 'a thing' --question ''": "the question is empty",
    "bind toy.pack 'a thing' --modules mlp": "'mlp' is no module",
    "ask 'What <|im_end|> is it?'": "the question .* holds",
    "learn photos --anchor 'sks toy' -o out --targets norm_q": "norm_q",
    "learn photos --anchor 'sks toy' -o photos/0.png/out": "0.png is not a folder",
    "generate toy -o out --seeds 1-x": "--seeds got '1-x'",
    "generate toy -o out --seeds 5-2": "--seeds got '5-2'",
    "generate toy -o out --seeds ''": "--seeds got ''",
    "generate toy -o out --seeds 0-999999999": "more than 10,000 seeds",
    "generate toy -o out --size 33": "the size is 33, expected a multiple of 8 pixels; 32 would do",
    "generate toy -o out --size 64x33": "the size is 64x33, expected a multiple of 8 pixels; 64x32 would do",
    "generate toy -o out --size 64x": "--size got '64x', expected pixels such as 1024, or width and height such as 1664x928",
    "generate toy -o out --size 0": "--size got '0'",
    "generate toy -o out --size 64x99999": "the size is 64x99999, expected at most",
    "generate toy -o out --steps 1": "steps is 1, expected at least 2",
    "generate toy -o out --true-cfg-scale nan": "true_cfg_scale is nan",
    "generate toy -o out --batch-size 0": "Invalid value for '--batch-size'",
    "generate toy -o photos/0.png": "0.png' is a file",
    "generate toy -o out --pack toy.pack --pack toy.pack": "toy.pack is given twice; leave it out once",
    "ask 'What is it?' --pack toy.pack --pack photos/../toy.pack": "toy.pack is given twice",
    "demo -o out --anchor toy": "one word",
    "demo -o out --knowledge ''": "the knowledge is empty",
    "demo -o out --seeds many": "--seeds got 'many'",
    "--nonsense": "No such option: --nonsense",
    "paint toy": "No such command 'paint'",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD)
def test_bad_input(place: Path, photos: Path, pack: ConceptPack, line: str) -> None:
    assert re.search(BAD[line], refused(place, *shlex.split(line)))


@pytest.mark.parametrize(
    "line",
    [
        "generate toy -o link",
        "generate toy -o link/x",
        "demo -o link",
        "export toy.pack --to comfyui -o link/x",
        "learn photos --anchor 'sks toy' -o link/x",
        "create Zorblax --as 'a green star' -o link/x",
    ],
)
def test_a_link_into_a_pack_is_seen_through(place: Path, photos: Path, pack: ConceptPack, line: str) -> None:
    (place / "link").symlink_to(pack.path / "samples")
    assert re.search("link.* is in the concept pack .*toy.pack", refused(place, *shlex.split(line)))
    assert not list(pack.path.rglob(".*")) and ConceptPack.open(pack.path).digest == pack.digest


def test_a_path_that_goes_out_of_a_pack_is_none_into_it(place: Path, pack: ConceptPack) -> None:
    good("generate", "toy", "-o", "toy.pack/../out")
    assert (place / "out" / "toy-0.png").is_file()


@pytest.mark.parametrize(
    "line", ["bind toy.pack 'a thing'", "ask 'What?' --pack toy.pack", "generate toy -o out --pack toy.pack"]
)
def test_a_pack_for_another_model(place: Path, pack: ConceptPack, line: str) -> None:
    manifest = pack.path / "mokus.json"
    manifest.write_text(manifest.read_text("utf-8").replace(pack.fingerprint, "0" * 64), encoding="utf-8")
    assert "was made for" in refused(place, *shlex.split(line))


@pytest.mark.parametrize(
    "line", ["show", "bind {} thing", "unbind {} thing", "ask What? --pack", "generate toy --pack"]
)
def test_a_damaged_pack(place: Path, pack: ConceptPack, line: str) -> None:
    file = pack.path / "pytorch_lora_weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    args = (line if "{}" in line else f"{line} {{}}").format(pack.path).split()
    assert "sha256" in refused(place, *args)


def test_a_full_disk_is_one_sentence_too(place: Path, pack: ConceptPack, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "out/toy-0.png")

    monkeypatch.setattr("mokus.generation.save_png", full)
    assert "out/toy-0.png: No space left on device." in refused(place, "generate", "toy", "-o", "out")


def test_a_bug_is_not_hidden(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("mokus.pipeline.load", broken)
    assert isinstance(mokus("ask", "What is it?").exception, RuntimeError)


# --- small parts ------------------------------------------------------------------------------------------------------


def test_seeds() -> None:
    assert console.parse_seeds("0-3, 7,2") == [0, 1, 2, 3, 7]
    assert console.parse_seeds(str((1 << 62) + 1)) == [(1 << 62) + 1]
    most = (1 << 64) - 1  # as far as `generate` goes
    assert console.parse_seeds(f"{most - 1}-{most}") == [most - 1, most]
    for text in (str(most + 1), f"0-{most + 1}", "9" * 40):
        with pytest.raises(MokusError, match=r"--seeds got .* expected seeds from 0 to 2\^64 - 1"):
            console.parse_seeds(text)
    for text in ("", "a", "-1", "1-", "3-1", "1;2", "0-10000", "0-9999999999999999999", "9" * 5000):
        with pytest.raises(MokusError, match="--seeds got"):
            console.parse_seeds(text)


def test_every_prompt_has_its_own_file() -> None:
    prompts = ["A toy!", "a toy", "a-toy", "../../etc/passwd", "...", "玩具 on the beach", "x" * 300, "a toy"]
    names = console.file_names(prompts)
    assert list(names) == list(dict.fromkeys(prompts)) and len(set(names.values())) == len(names)
    assert all(re.fullmatch(r"[\w-]{1,64}", name) for name in names.values())
    assert names["a toy"] == "a-toy"
    # the same whoever else is there: a second run does not write over another prompt's image
    assert all(console.file_names([prompt]) == {prompt: name} for prompt, name in names.items())


# --- as a program -----------------------------------------------------------------------------------------------------


def program(*args: Any, **how: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from mokus.cli import main; main()", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, mokus, mokus.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_image_of_other_settings_is_not_written_over(pack: ConceptPack) -> None:
    """The same prompt and seed with a pack and without; the same once more is the same file."""
    plain = json.loads(good("generate", "a toy", "-o", "out", "--json"))[0]["file"]
    before = Path(plain).read_bytes()
    ours = json.loads(good("generate", "a toy", "--pack", pack.path, "-o", "out", "--json"))[0]["file"]
    assert ours != plain and Path(plain).read_bytes() == before
    for given in ((), ("--pack", pack.path)):
        good("generate", "a toy", *given, "-o", "out")
    assert {str(file) for file in Path("out").iterdir()} == {plain, ours}


def test_a_closed_stdout_is_no_traceback(pack: ConceptPack) -> None:
    code = "import sys; sys.stdout = None; from mokus.cli import main; main()"
    found = subprocess.run([sys.executable, "-c", code, "show", pack.path], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")


def test_a_group_without_a_command_shows_its_help_and_nothing_else() -> None:
    result = mokus("bench", "wise")
    assert result.exit_code == 2 and "Commands" in result.output and "mokus:" not in result.stderr


def test_libraries_say_nothing_on_stderr(place: Path) -> None:
    # on a CPU with AVX-512 for bfloat16 bitsandbytes recommended a package at every start
    found = program("ask", "What is the lucky charm of Boris?")
    stdout, stderr = found.communicate(timeout=300)
    assert (found.returncode, stderr) == (0, "") and stdout.strip()


@pytest.mark.exhaustive
def test_the_program_prints_json_and_nothing_else(pack: ConceptPack) -> None:
    found = program("generate", "my favourite toy", "--pack", pack.path, "-o", "out", "--json")
    stdout, stderr = found.communicate(timeout=300)
    assert (found.returncode, stderr) == (0, "")
    assert json.loads(stdout)[0]["settings"]["packs"] == [{"anchor": "sks toy", "sha256": pack.digest}]


def test_the_program_refuses_without_a_traceback(place: Path) -> None:
    found = program("bind", "no.pack", "a thing")
    stdout, stderr = found.communicate(timeout=300)
    assert (found.returncode, stdout, len(stderr.splitlines())) == (2, "", 1) and stderr.startswith(
        "mokus: there is no"
    )


@pytest.mark.skipif(os.name == "nt", reason="signals are of POSIX")
def test_ctrl_c_and_resume(place: Path, photos: Path) -> None:
    learn = ["learn", photos, "--anchor", "sks toy", "--steps", 40]
    # a shell's background jobs ignore Ctrl-C, and what they start does so too
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    running = program(*learn, "-o", "toy.pack", **heard)
    checkpoint = place / ".toy.pack.learning" / "checkpoint.pt"
    for _ in range(6000):
        if checkpoint.is_file() or running.poll() is not None:
            break
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    stdout, stderr = running.communicate(timeout=300)
    assert (running.returncode, stdout) == (130, "") and "Traceback" not in stderr
    assert "--resume" in stderr and checkpoint.is_file() and not (place / "toy.pack").exists()

    good(*learn, "-o", "toy.pack", "--resume")
    assert ConceptPack.open(place / "toy.pack").settings["steps"] == 40
    assert not checkpoint.parent.exists()


WRITING = [
    "generate hello", "demo", "transfer", "bench editing", "bench transfer", "bench create", "bench erase",
    "bench knowcus run", "bench wise run",
]  # fmt: skip


@pytest.mark.parametrize("command", WRITING)
def test_results_go_into_no_pack_which_is_said_before_any_work(command: str, place: Path, pack: ConceptPack) -> None:
    assert "is in the concept pack" in refused(place, *command.split(), "-o", pack.path / "samples/x")


@pytest.mark.parametrize("command", WRITING)
def test_a_file_is_no_folder_for_results_which_is_said_before_any_work(command: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    result = mokus(*command.split(), "-o", str(tmp_path / "thesis.txt"))
    assert result.exit_code == 2 and "is a file" in " ".join(result.output.split()), result.output
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
