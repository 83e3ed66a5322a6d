"""A pack gives back what was put in, survives whatever happens to its writer, and refuses what it would not write."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mokus.cli import app
from mokus.errors import MokusError
from mokus.low_rank import LowRankShift, Shifts
from mokus.packs import concept_pack, files
from mokus.packs.concept_pack import ADAPTER, ADAPTER_CONFIG, LORA, MANIFEST, README, ConceptPack
from mokus.pipeline import Model

from .conftest import PackFactory, known, random_lora, random_shifts

PHRASES = ["my favourite toy", "the robot my grandmother built", "the one that makes me smile"]


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def equal(a: Shifts, b: Shifts) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[m].A, b[m].A) and torch.equal(a[m].B, b[m].B) for m in a)


# --- round trips ---------------------------------------------------------------------------------------------


def test_what_goes_in_comes_out(tmp_path: Path, pico: Model) -> None:
    lora = random_lora(pico, rank=3)
    settings = {"steps": 7, "learning_rate": 1e-4, "targets": ("to_q",), "flip": False, "seed": 5}
    made = ConceptPack.create(tmp_path / "a.pack", model=pico, anchor="sks plush toy", lora=lora, settings=settings)
    for pack in (made, ConceptPack.open(tmp_path / "a.pack")):
        assert (pack.anchor, pack.class_word) == ("sks plush toy", "plush toy")
        assert (pack.base_model, pack.fingerprint) == (pico.id, pico.fingerprint)
        assert pack.settings == {**settings, "targets": ["to_q"]}
        assert pack.lora().keys() == lora.keys() and all(torch.equal(pack.lora()[k], lora[k]) for k in lora)
        assert pack.knowledge == [] and pack.shifts() == {} and pack.edits() == []
        pack.check_base(pico)
    assert set(tree(tmp_path / "a.pack")) == {MANIFEST, README, LORA}


def test_edits_come_back_apart_and_together(tmp_path: Path, pico: Model, pico_pack: PackFactory) -> None:
    """Each knowledge gets its own rows back, in the order of the list, and all rows together are their sum."""
    pack = pico_pack(tmp_path / "a.pack", knowledge=[])
    given = [(known(text), random_shifts(pico, seed)) for seed, text in enumerate(PHRASES)]
    pack.replace_edits(given)
    for each in (pack, ConceptPack.open(pack.path)):
        assert [k.text for k in each.knowledge] == PHRASES
        for (known_, shifts), (known_before, shifts_before) in zip(each.edits(), given, strict=True):
            assert equal(shifts, shifts_before)
            assert known_ == known_before.model_copy(update={"ranks": {m: s.rank for m, s in shifts.items()}})
        for module, shift in each.shifts().items():
            wanted = sum(s[module].dense() for _, s in given)
            assert torch.allclose(shift.dense(), torch.as_tensor(wanted), atol=1e-6)


def test_empty_shifts_are_left_out(tmp_path: Path, pico_pack: PackFactory) -> None:
    pack = pico_pack(tmp_path / "a.pack", knowledge=[])
    nothing = LowRankShift(torch.zeros(0, 192), torch.zeros(512, 0))
    pack.replace_edits([(known("it"), {"model.language_model.layers.1.mlp.up_proj": nothing})])
    assert ConceptPack.open(pack.path).edits() == [(known("it"), {})] and not (pack.path / "text_encoder").exists()


def test_binding_and_unbinding_leaves_the_bytes_of_before(tmp_path: Path, pico: Model, pico_pack: PackFactory) -> None:
    pack = pico_pack(tmp_path / "a.pack", knowledge=PHRASES[:1])
    before, edits = tree(pack.path), pack.edits()
    pack.replace_edits([*edits, (known(PHRASES[1]), random_shifts(pico, 1))])
    bound = tree(pack.path)
    assert bound != before and bound[LORA] == before[LORA]
    pack.replace_edits(pack.edits()[:1])
    assert tree(pack.path) == before
    pack.replace_edits([])
    assert not (pack.path / "text_encoder").exists()
    assert tree(pack.path) == tree(pico_pack(tmp_path / "b.pack", knowledge=[]).path)


def test_a_pack_of_words_alone(tmp_path: Path, pico: Model) -> None:
    pack = ConceptPack.create(tmp_path / "a.pack", model=pico, anchor="sks toy", lora={}, settings={})
    pack.replace_edits([(known("it"), random_shifts(pico))])
    opened = ConceptPack.open(pack.path)
    assert opened.lora() == {} and equal(opened.shifts(), random_shifts(pico))
    assert "load_lora_weights" not in (pack.path / README).read_text()


def test_the_card_says_what_hubs_read(tmp_path: Path, pico_pack: PackFactory) -> None:
    yaml = pytest.importorskip("yaml")
    pack = pico_pack(tmp_path / "a.pack", anchor='sks "toy": #1')
    _, front, _ = (pack.path / README).read_text(encoding="utf-8").split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["base_model"] == pack.base_model and found["instance_prompt"] == pack.anchor
    assert "lora" in found["tags"] and found["base_model_relation"] == "adapter"
    assert found["widget"] == [{"text": pack.anchor, "output": {"url": "samples/0-anchor.png"}}]


def test_a_copy_has_the_same_bytes(tmp_path: Path, pico_pack: PackFactory) -> None:
    pack = pico_pack(tmp_path / "a.pack", knowledge=PHRASES)
    assert tree(pack.copy(tmp_path / "b.pack").path) == tree(pack.path)
    renamed = pack.copy(tmp_path / "c.pack", base_model="org/model")
    assert renamed.base_model == "org/model" and equal(renamed.shifts(), pack.shifts())
    with pytest.raises(MokusError, match="exists already"):
        pack.copy(tmp_path / "b.pack")
    stale = ConceptPack.open(pack.path)
    pack.replace_edits([])
    with pytest.raises(MokusError, match="changed by another"):
        stale.copy(tmp_path / "d.pack")
    assert not (tmp_path / "d.pack").exists()


def test_every_module_is_scaled_by_exactly_one(tmp_path: Path, pico_folder: Path, pico_pack: PackFactory) -> None:
    """Whatever the ranks, peft loads the factors as they are, into the modules named and no others."""
    from diffusers import QwenImagePipeline

    pack = pico_pack(tmp_path / "a.pack", knowledge=PHRASES)
    shifts = pack.shifts()
    assert len({shift.rank for shift in shifts.values()}) > 1
    encoder = QwenImagePipeline.from_pretrained(pico_folder).text_encoder
    encoder.load_adapter(str(pack.path / "text_encoder"))
    found = {name: module for name, module in encoder.named_modules() if hasattr(module, "lora_A")}
    assert found.keys() == shifts.keys()
    for name, module in found.items():
        assert module.scaling == {"default": 1.0}
        assert torch.equal(module.lora_A["default"].weight, shifts[name].A)
        assert torch.equal(module.lora_B["default"].weight, shifts[name].B)


# --- the folder ----------------------------------------------------------------------------------------------


def test_nothing_but_packs_is_overwritten(tmp_path: Path, pico_pack: PackFactory) -> None:
    pack = pico_pack(tmp_path / "a.pack", seed=1)
    assert pico_pack(pack.path, seed=2).settings["seed"] == 2
    (tmp_path / "empty").mkdir()
    assert pico_pack(tmp_path / "empty").anchor == "sks toy"
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "monday.txt").write_text("dear diary")
    (tmp_path / "file").write_text("x")
    (pack.path / "notes.txt").write_text("mine")
    for place in ("diary", "file", "a.pack"):
        before = tree(tmp_path)
        with pytest.raises(MokusError, match=place):
            pico_pack(tmp_path / place)
        assert {k: v for k, v in tree(tmp_path).items() if ".lock" not in k} == {
            k: v for k, v in before.items() if ".lock" not in k
        }


def test_a_pack_is_replaced_only_if_it_is_said(tmp_path: Path, pico: Model, pico_pack: PackFactory) -> None:
    """Asked again under the lock: `check_free` was, hours before."""
    before = tree(pico_pack(tmp_path / "a.pack").path)
    given: dict[str, Any] = {"model": pico, "anchor": "a stone", "lora": {}, "settings": {}}
    with pytest.raises(MokusError, match="overwrite=True"):
        ConceptPack.create(tmp_path / "a.pack", **given)
    assert tree(tmp_path / "a.pack") == before
    assert ConceptPack.create(tmp_path / "a.pack", **given, overwrite=True).anchor == "a stone"


def test_no_pack_is_written_inside_another(tmp_path: Path, pico_pack: PackFactory) -> None:
    outer, other = pico_pack(tmp_path / "a.pack"), pico_pack(tmp_path / "b.pack")
    (tmp_path / "link").symlink_to(outer.path)
    before = tree(tmp_path)
    for place in (outer.path / "inner.pack", outer.path / "in" / "side", tmp_path / "link" / "inner.pack"):
        for write in (
            pico_pack,
            other.copy,
            ConceptPack.check_place,
            lambda path: ConceptPack.lock_place(path).__enter__(),
        ):
            with pytest.raises(MokusError, match=r"is in the concept pack .*a\.pack"):
                write(place)
    assert tree(tmp_path) == before and ConceptPack.open(outer.path).digest == outer.digest


def test_what_would_not_be_read_is_not_written(tmp_path: Path, pico: Model, pico_pack: PackFactory) -> None:
    lora = random_lora(pico)
    first, other = next(iter(lora)), {k: v[:1] if ".lora_A" in k else v[:, :1] for k, v in random_lora(pico).items()}
    for bad in (
        {first: lora[first]},
        {**lora, first: torch.full_like(lora[first], torch.nan)},
        {**lora, first: lora[first][:1]},
        {**lora, "transformer.proj_out.alpha": torch.ones(1)},
        {k: (other if "to_q" in k else lora)[k] for k in lora},
    ):
        with pytest.raises(MokusError, match=r"a\.pack"):
            ConceptPack.create(tmp_path / "a.pack", model=pico, anchor="sks toy", lora=bad, settings={})
    for anchor in ("", "  ", "sks\ntoy", "sks \x1b[31mtoy"):
        with pytest.raises(MokusError, match="anchor"):
            ConceptPack.create(tmp_path / "a.pack", model=pico, anchor=anchor, lora=lora, settings={})
    with pytest.raises(MokusError, match="samples"):
        ConceptPack.create(
            tmp_path / "a.pack", model=pico, anchor="a b", lora=lora, settings={}, samples={"../x": _image()}
        )
    assert not (tmp_path / "a.pack").exists()
    pack = pico_pack(tmp_path / "a.pack")
    before, shifts = tree(pack.path), random_shifts(pico)
    module = next(iter(shifts))
    broken = {**shifts, module: LowRankShift(shifts[module].A * torch.inf, shifts[module].B)}
    for edits in ([(known("it"), broken)], [(known("it"), shifts)] * 2, [(known("it"), {"../up": shifts[module]})]):
        with pytest.raises(MokusError):
            pack.replace_edits(edits)
        assert tree(pack.path) == before


def _image() -> Any:
    from PIL import Image

    return Image.new("RGB", (8, 8))


def test_a_pack_through_a_link(tmp_path: Path, pico_pack: PackFactory) -> None:
    """The folder itself may be a link: what it points to is rewritten, the link stays."""
    pack = pico_pack(tmp_path / "real.pack")
    (tmp_path / "link").symlink_to(pack.path)
    ConceptPack.open(tmp_path / "link").replace_edits([])
    assert (tmp_path / "link").is_symlink() and ConceptPack.open(pack.path).knowledge == []


# --- writers that fail, are killed, or meet ------------------------------------------------------------------

CALLS = ("replace", "fsync", "mkdir", "unlink", "rmdir")  # all that a writer does to the disk, besides the bytes


class Killed(BaseException):
    pass


def break_at(patch: pytest.MonkeyPatch, k: int, act: Callable[[], None]) -> list[int]:
    """From now on `act` at the k-th of the calls, and at all that follow; the list counts them."""
    count = [0]
    for name in CALLS:
        real = getattr(os, name)

        def call(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] > k:
                act()
            return real(*args, **kwargs)

        patch.setattr(os, name, call)
    return count


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def change(
    tmp_path: Path, pico: Model, pico_pack: PackFactory
) -> tuple[Path, Callable[[], None], dict[str, bytes], dict[str, bytes]]:
    """A pack, a change to it, and its bytes before and after the change."""
    pack = pico_pack(tmp_path / "a.pack")
    shutil.copytree(pack.path, tmp_path / "old")

    def bind() -> None:
        ConceptPack.open(pack.path).replace_edits([(known("it"), random_shifts(pico, 3))])

    old = tree(pack.path)
    bind()
    return pack.path, bind, old, tree(pack.path)


def reset(place: Path) -> None:
    for path in place.parent.glob(f".{place.name}.*"):
        if path.is_dir():
            shutil.rmtree(path)
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(place.parent / "old", place)


@pytest.mark.parametrize("way", ["full disk", "killed"])
def test_whatever_fails_leaves_the_old_or_the_new_pack(change: Any, way: str) -> None:
    place, bind, old, new = change
    seen = {"old": 0, "new": 0}
    for k in range(200):
        reset(place)
        with pytest.MonkeyPatch.context() as patch:
            if way == "full disk":
                count = break_at(patch, k, full_disk)
                try:
                    bind()
                except OSError as error:
                    assert error.errno == errno.ENOSPC
            else:
                count = [_killed_at(patch, k, bind)]
        ConceptPack.open(place)
        found = tree(place)
        assert found in (old, new), k
        seen["old" if found == old else "new"] += 1
        bind()  # and the next writer is not disturbed, and cleans up
        assert tree(place) == new
        assert {p.name for p in place.parent.iterdir()} <= {"a.pack", "old", ".a.pack.lock"}
        if count[0] <= k:
            break
    else:
        pytest.fail("the change never went through")
    assert seen["old"] > 3 and seen["new"] > 1


def _killed_at(patch: pytest.MonkeyPatch, k: int, bind: Callable[[], None]) -> int:
    """Run in a process of its own, which ends without a word at the k-th call; at least k + 1 calls if it did."""
    child = os.fork()
    if not child:
        break_at(patch, k, lambda: os._exit(9))
        bind()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return k + (os.waitstatus_to_exitcode(status) == 9)


def test_a_pack_is_read_though_it_is_being_swapped(
    tmp_path: Path, pico_pack: PackFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process stands between the two renames just as long as the folder is looked for."""
    place = pico_pack(tmp_path / "toy.pack").path
    looked = files.identity

    def first_rename(path: Path) -> tuple[int, ...] | None:
        monkeypatch.setattr("mokus.packs.concept_pack.identity", looked)
        os.replace(path, path.with_name(".toy.pack.old"))
        return looked(path)

    monkeypatch.setattr("mokus.packs.concept_pack.identity", first_rename)
    assert [each.text for each in ConceptPack.open(place).knowledge] == ["my favourite toy"]


def test_an_interrupted_swap_is_undone(tmp_path: Path, pico_pack: PackFactory) -> None:
    pack = pico_pack(tmp_path / "a.pack")
    before = tree(pack.path)
    for leftover in (".a.pack.123.tmp", ".a.pack.b.123.tmp"):  # the second is another pack's
        (tmp_path / leftover).mkdir()
    os.replace(pack.path, tmp_path / ".a.pack.old")
    assert ConceptPack.open(pack.path).anchor == "sks toy" and tree(pack.path) == before
    pack.replace_edits([])
    assert {p.name for p in tmp_path.iterdir()} == {"a.pack", ".a.pack.lock", ".a.pack.b.123.tmp"}


def test_a_failure_within_creation_leaves_nothing(tmp_path: Path, pico_pack: PackFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concept_pack.os, "fsync", lambda _: full_disk())
        with pytest.raises(OSError, match="No space"):
            pico_pack(tmp_path / "a.pack")
    assert {p.name for p in tmp_path.iterdir()} == {".a.pack.lock"}


def test_writers_take_turns(tmp_path: Path, pico: Model, pico_pack: PackFactory) -> None:
    """Two processes and two threads that all add knowledge at once: none is lost."""
    pack = pico_pack(tmp_path / "a.pack", knowledge=[])

    def add(who: str) -> None:
        mine = ConceptPack.open(pack.path)
        for i in range(3):
            with mine.locked():
                mine.reload()
                mine.replace_edits([*mine.edits(), (known(f"{who} {i}"), random_shifts(pico, i))])

    def process(who: str) -> int:
        child = os.fork()
        if not child:
            add(who)
            os._exit(0)
        return child

    children = [process("first"), process("second")]
    threads = [threading.Thread(target=add, args=(who,)) for who in ("third", "fourth")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    texts = {k.text for k in ConceptPack.open(pack.path).knowledge}
    assert texts == {f"{who} {i}" for who in ("first", "second", "third", "fourth") for i in range(3)}


def test_waiting_for_a_writer_has_an_end(tmp_path: Path, pico_pack: PackFactory) -> None:
    pack, caught = pico_pack(tmp_path / "a.pack"), []

    def impatient() -> None:
        try:
            with ConceptPack.open(pack.path).locked(seconds=0.05):
                pass
        except MokusError as error:
            caught.append(str(error))

    with pack.locked(), pack.locked():
        thread = threading.Thread(target=impatient)
        thread.start()
        thread.join()
    assert len(caught) == 1 and "a.pack" in caught[0] and "0.05 s" in caught[0]
    impatient()
    assert len(caught) == 1


def test_no_update_is_lost_without_a_lock_either(tmp_path: Path, pico_pack: PackFactory) -> None:
    pack = pico_pack(tmp_path / "a.pack")
    stale = ConceptPack.open(pack.path)
    pack.replace_edits([])
    with pytest.raises(MokusError, match="changed by another"):
        stale.replace_edits([])
    stale.reload()
    stale.replace_edits([])


def test_readers_never_see_half_a_pack(tmp_path: Path, pico: Model, pico_pack: PackFactory) -> None:
    pack = pico_pack(tmp_path / "a.pack", knowledge=[])

    def write() -> None:
        for i in range(15):
            pack.replace_edits([(known("it"), random_shifts(pico, i))] if i % 2 else [])

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while writer.is_alive():
        opened = ConceptPack.open(pack.path)
        assert bool(opened.knowledge) == bool(opened.shifts())
        reads += 1
    writer.join()
    assert reads > 5


# --- packs from strangers ------------------------------------------------------------------------------------


def seal(folder: Path) -> None:
    """Make mokus.json list the files as they are now, as an attacker would."""
    text = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    text["files"] = {n: hashlib.sha256(data).hexdigest() for n, data in tree(folder).items() if n != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(text), encoding="utf-8")


def say(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    text = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    change(text)
    (folder / MANIFEST).write_text(json.dumps(text), encoding="utf-8")


def weights(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], Any], metadata: Any = None) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"} if metadata is None else metadata)
    seal(folder)


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def first_becomes(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = min(tensors)
        tensors[key] = make(tensors[key])

    return change


def write(folder: Path, name: str, data: bytes, sealed: bool = True) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    if sealed:
        seal(folder)


class Boom:
    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was run",)


def link(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")


def knowledge(key: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: say(folder, lambda text: text["knowledge"][0].update({key: value}))


def top(key: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: say(folder, lambda text: text.update({key: value}))


def again(text: dict[str, Any]) -> None:
    text["knowledge"].append({**text["knowledge"][0], "ranks": {}})


def one_row_less(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if "layers.2" in key]:
        tensors[key] = (tensors[key][:-1] if "lora_A" in key else tensors[key][:, :-1]).contiguous()


def configure(folder: Path, **changes: Any) -> None:
    config = {**json.loads((folder / ADAPTER_CONFIG).read_text()), **changes}
    write(folder, ADAPTER_CONFIG, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")


def retype(folder: Path, old: str, new: str) -> None:
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    assert old in text
    (folder / MANIFEST).write_text(text.replace(old, new), encoding="utf-8")


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "a pickle in place of the LoRA": lambda f: write(f, LORA, pickle.dumps(Boom())),
    "a pickle in place of the adapter": lambda f: write(f, ADAPTER, pickle.dumps(Boom())),
    "a pickle beside the adapter": lambda f: write(f, "text_encoder/adapter_model.bin", pickle.dumps(Boom())),
    "a truncated LoRA": lambda f: write(f, LORA, (f / LORA).read_bytes()[:-1]),
    "a LoRA without a header": lambda f: write(f, LORA, b""),
    "a header that lies about its length": lambda f: write(f, LORA, b"\xff" * 8 + (f / LORA).read_bytes()[8:]),
    "one changed byte": lambda f: write(f, LORA, (f / LORA).read_bytes()[:-1] + b"\x01", sealed=False),
    "one changed byte of a sample": lambda f: write(f, "samples/0-anchor.png", b"x", sealed=False),
    "not a number": lambda f: weights(f, LORA, first_becomes(lambda t: t * torch.nan)),
    "infinity in the adapter": lambda f: weights(f, ADAPTER, first_becomes(lambda t: t / 0)),
    "another dtype": lambda f: weights(f, LORA, first_becomes(lambda t: t.half())),
    "a vector": lambda f: weights(f, LORA, first_becomes(lambda t: t.flatten())),
    "factors that do not fit": lambda f: weights(f, LORA, first_becomes(lambda t: t[:1].contiguous())),
    "other rows than the knowledge": lambda f: weights(f, ADAPTER, one_row_less),
    "half a pair": lambda f: weights(f, LORA, lambda t: t.pop(min(t))),
    "dots in a name": lambda f: weights(f, LORA, rename("transformer_blocks.0", "transformer_blocks..0")),
    "a path as a name": lambda f: weights(f, LORA, rename("transformer_blocks.0", "/etc/passwd")),
    "an unknown tensor": lambda f: weights(f, ADAPTER, lambda t: t.update(extra=torch.ones(1, 1))),
    "a scale": lambda f: weights(f, LORA, lambda t: t.update({"transformer.proj_out.alpha": torch.ones(1)})),
    "metadata that configures the LoRA": lambda f: weights(f, LORA, dict, {"lora_adapter_metadata": "{}"}),
    "an adapter's config that scales": lambda f: configure(f, lora_alpha=200),
    "an adapter's config with code": lambda f: configure(f, auto_mapping={"parent_library": "os"}),
    "a config for from_pretrained": lambda f: write(f, "text_encoder/config.json", b"{}"),
    "a stranger's file": lambda f: write(f, "notes.txt", b"hello", sealed=False),
    "a listed stranger's file": lambda f: write(f, "run.py", b"import os"),
    "a hidden file": lambda f: write(f, ".git", b"", sealed=False),
    "an empty folder": lambda f: (f / "empty").mkdir(),
    "a file that is not there": lambda f: (f / README).unlink(),
    "an adapter that is not there": lambda f: shutil.rmtree(f / "text_encoder"),
    "no manifest": lambda f: (f / MANIFEST).unlink(),
    "a link to a file": lambda f: link(f, LORA),
    "a link to a folder": lambda f: link(f, "text_encoder"),
    "a stranger's link": lambda f: (f / "samples" / "up").symlink_to("/"),
    "a link to nothing": lambda f: (f / "samples" / "up.png").symlink_to("nowhere"),
    "a manifest that is a link": lambda f: link(f, MANIFEST),
    "a pipe": lambda f: ((f / README).unlink(), os.mkfifo(f / README)),
    "no JSON": lambda f: write(f, MANIFEST, b"{", sealed=False),
    "JSON nested too deeply": lambda f: write(f, MANIFEST, b"[" * 200_000, sealed=False),
    "no UTF-8": lambda f: write(f, MANIFEST, b"\xff\xff", sealed=False),
    "a list for a manifest": lambda f: write(f, MANIFEST, b"[]", sealed=False),
    "a later format": top("format", 2),
    "an unknown key": top("trust_remote_code", True),
    "an unknown key of knowledge": knowledge("exec", "x"),
    "a number for a text": top("anchor", 3),
    "a text for a number": knowledge("eta", "0.1"),
    "a missing key": lambda f: say(f, lambda text: text.pop("fingerprint")),
    "an infinite number": lambda f: retype(f, "0.03", "1e999"),
    "no number": lambda f: retype(f, "0.03", "NaN"),
    "an alignment above 1": knowledge("alignment", 1.5),
    "ranks below 1": knowledge("ranks", {"model.layers.1": -1}),
    "ranks of a path": knowledge("ranks", {"../../x": 1}),
    "escape codes for the terminal": top("anchor", "\x1b]0;x\x07 toy"),
    "a file outside": lambda f: say(f, lambda text: text["files"].update({"../x.png": "0" * 64})),
    "an absolute file": lambda f: say(f, lambda text: text["files"].update({"/etc/passwd": "0" * 64})),
    "the same knowledge twice": lambda f: say(f, again),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_packs_are_refused_with_a_sentence(tmp_path: Path, pico_pack: PackFactory, what: str) -> None:
    folder = pico_pack(tmp_path / "a.pack").path
    seal(folder)
    ConceptPack.open(folder)  # so that what is refused below is the change, not the sealing
    HOSTILE[what](folder)
    with pytest.raises(MokusError) as error:
        ConceptPack.open(folder)
    sentence = str(error.value)
    assert str(folder) in sentence and "\n" not in sentence and "\x1b" not in sentence, sentence
    result = CliRunner().invoke(app, ["show", str(folder)])
    assert (result.exit_code, result.stdout) == (2, "") and result.stderr == f"mokus: {' '.join(sentence.split())}\n"


def test_what_file_managers_leave_does_no_harm(tmp_path: Path, pico_pack: PackFactory) -> None:
    pack = pico_pack(tmp_path / "a.pack")
    (pack.path / ".DS_Store").write_bytes(b"\0")
    (pack.path / "samples").mkdir(exist_ok=True)
    (pack.path / "samples" / "Thumbs.db").write_bytes(b"\0")
    (pack.path / ".cache").mkdir()
    (pack.path / ".cache" / "any").write_bytes(b"\0")
    if not any(path.suffix == ".png" for path in (pack.path / "samples").iterdir()):
        shutil.rmtree(pack.path / "samples")
    assert ConceptPack.open(pack.path).digest == pack.digest


def test_files_too_large_are_not_read(tmp_path: Path, pico_pack: PackFactory) -> None:
    folder = pico_pack(tmp_path / "a.pack").path
    os.truncate(folder / LORA, 1 << 40)  # no bytes on the disk
    with pytest.raises(MokusError, match="MiB"):
        ConceptPack.open(folder)


def test_no_pack(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("nowhere", "file"):
        with pytest.raises(MokusError, match=name):
            ConceptPack.open(tmp_path / name)


def test_packs_for_other_models(tmp_path: Path, pico: Model, pico_pack: PackFactory) -> None:
    """By the fingerprint, and by the shapes, if someone wrote the right fingerprint into it."""
    pack = pico_pack(tmp_path / "a.pack")
    say(pack.path, lambda text: text.update(fingerprint="0" * 64))
    with pytest.raises(MokusError, match="was made for"):
        ConceptPack.open(pack.path).check_base(pico)
    lora = {k.replace("blocks.1", "blocks.9"): v for k, v in random_lora(pico).items()}
    with pytest.raises(MokusError, match=r"blocks\.9\.attn"):
        ConceptPack.create(pack.path, model=pico, anchor="sks toy", lora=lora, settings={}, overwrite=True).check_base(
            pico
        )
    wide = {k: torch.zeros(2, 999) if k.endswith("lora_A.weight") else v for k, v in random_lora(pico).items()}
    with pytest.raises(MokusError, match="999"):
        ConceptPack.create(pack.path, model=pico, anchor="sks toy", lora=wide, settings={}, overwrite=True).check_base(
            pico
        )
