"""The run: every editor, so many edits, one row of figures each; what is done is kept, and a stopped run goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from mokus import files
from mokus.bench.editing.cases import SEED, Case, cases
from mokus.bench.editing.measure import Edited, Measure, Row
from mokus.bench.state import alone, load_edits, save_edits
from mokus.editors import EDITORS, editor
from mokus.errors import MokusError
from mokus.knowledge import questions
from mokus.low_rank import Shifts, added, collected
from mokus.packs.manifest import versions
from mokus.pipeline import Model
from mokus.progress import Progress
from mokus.settings import EditSettings

UNEDITED = "unedited"
SINGLES = 12
SAVE_EVERY = 60.0  # seconds


def run(
    model: Model,
    folder: Path,
    editors: Sequence[str] = EDITORS,
    counts: Sequence[int] = (1, 10, 50, 100, 200),
    singles: int = SINGLES,
    images: bool = True,
    progress: Progress | None = None,
) -> list[Row]:
    """Measure the editors after so many edits; DIR/rows has what is done, and a run that was stopped goes on from there.

    One edit is measured `singles` times, each by itself. Raises `MokusError` for an unknown editor or a folder of a run
    with other settings, or with rows of one edit that are the mean of another number of them.
    """
    for name in editors:
        editor(name)
    if not counts or min(counts) < 1:
        raise MokusError(f"--edits got {list(counts)}, expected numbers from 1, such as 1,10,100.")
    measure = Measure(model, images, progress)
    with alone(folder):
        of_all = {
            "model": model.id,
            "fingerprint": model.fingerprint,
            "images": images,
            "seed": SEED,
            "versions": versions(),
        }
        files.kept(folder / "setup.json", of_all, dict)  # rows of two models shall not be mixed
        _check_singles(folder, singles)
        rows = [_unedited(model, folder, measure, max(singles, *counts))]
        for name in editors:
            rows += _rows_of(model, folder, name, sorted(set(counts)), singles, measure)
        files.write_json(folder / "results.json", all_rows(folder), indent=1)
    return rows


def _check_singles(folder: Path, singles: int) -> None:
    """Raise `MokusError` if an editor's row of one edit is there that is the mean of another number; they share a table."""
    for name in EDITORS:
        row = files.read_json(folder / "rows" / f"{name}-1.json")
        there = row["setup"].get("singles") if isinstance(row, dict) and isinstance(row.get("setup"), dict) else None
        if there not in (None, singles):
            raise MokusError(
                f"{folder} holds figures of one edit that are the mean of {there}, not of {singles}; give --singles {there}, "
                "or name another folder with -o."
            )


def setup(model: Model, name: str, images: bool) -> Row:
    """All that an editor's figures depend on but the code, and of one edit the number of them."""
    settings = None if name == UNEDITED else asdict(EditSettings.for_editor(model.defaults, editor=name))
    return {
        "model": model.id, "fingerprint": model.fingerprint, "editor": name, "images": images, "seed": SEED,
        "settings": settings, "versions": versions(),
    }  # fmt: skip


def _kept(folder: Path, about: Row, edits: int, made: Callable[[], Row]) -> Row:
    """A row from its file, or made and kept there."""
    file = folder / "rows" / f"{about['editor']}-{edits}.json"
    return files.kept(file, about, lambda: {"editor": about["editor"], "edits": edits, **made()})


def _unedited(model: Model, folder: Path, measure: Measure, count: int) -> Row:
    """Before any edit, on as many facts as are edited at most."""

    def made() -> Row:
        some = cases(count)
        row, n = measure.row(some, Edited(), _as_made(measure, some, Edited()))
        return {"editor": UNEDITED, "edits": 0, **row, "seconds_per_edit": 0.0, "bytes_per_edit": 0.0, "n": n}

    about = setup(model, UNEDITED, measure.images)
    return files.kept(folder / "rows" / f"{UNEDITED}-{count}.json", about, made)


def _as_made(measure: Measure, some: Sequence[Case], edited: Edited) -> dict[str, bool]:
    said = measure._says([(questions(case.phrase)[0], case.new.words) for case in some], edited)
    return dict(zip([case.phrase for case in some], said, strict=True))


def _rows_of(model: Model, folder: Path, name: str, counts: list[int], singles: int, measure: Measure) -> list[Row]:
    about = setup(model, name, measure.images)
    rows = []
    if 1 in counts:
        alone_each = {**about, "singles": singles}
        rows.append(_kept(folder, alone_each, 1, lambda: _one_by_one(model, name, singles, measure)))
    sequence: _Sequence | None = None
    for count in [count for count in counts if count > 1]:
        if not (folder / "rows" / f"{name}-{count}.json").is_file():
            sequence = sequence or _Sequence(model, folder, about, measure, max(counts))
            sequence.extend(count)
        rows.append(_kept(folder, about, count, lambda s=sequence: s.row()))  # type: ignore[misc]
    return rows


def _one_by_one(model: Model, name: str, singles: int, measure: Measure) -> Row:
    """The mean over several edits, each alone."""
    rows: list[Row] = []
    ns: dict[str, int] = {}
    for i, case in enumerate(cases(singles)):
        if measure.progress:
            measure.progress(f"{name}, one edit", i, singles, {})
        made = editor(name)(model, EditSettings.for_editor(model.defaults, editor=name))
        began = time.perf_counter()
        shifts, _ = made.edit(case.request, {})
        seconds = time.perf_counter() - began
        edited = Edited(shifts, {case.phrase: case.request.says} if name == "rewrite" else {})
        row, n = measure.row([case], edited, _as_made(measure, [case], edited))
        rows.append({**row, "seconds_per_edit": seconds, "bytes_per_edit": float(nbytes(shifts))})
        ns = {key: ns.get(key, 0) + value for key, value in n.items()}
    if measure.progress:
        measure.progress(f"{name}, one edit", singles, singles, {})
    mean: Row = {}
    for key in rows[0]:
        values = [row[key] for row in rows if row.get(key) is not None]
        mean[key] = all(values) if key == "undo" else sum(values) / len(values) if values else None
    return {**mean, "n": ns}


class _Sequence:
    """Edits one after the other, kept in DIR/state as they are made, so that a stopped run goes on."""

    def __init__(self, model: Model, folder: Path, about: Row, measure: Measure, most: int) -> None:
        self.model, self.about, self.measure, self.all = model, about, measure, cases(most)
        self.name = about["editor"]
        self.made = editor(self.name)(model, EditSettings.for_editor(model.defaults, editor=self.name))
        self.file = folder / "state" / f"{self.name}.safetensors"
        self.each, kept = load_edits(self.file, about)  # all that are made, and those of them that are in place:
        self.edited, self.n = Edited(), 0
        self.known: dict[str, bool] = kept.get("known", {})  # whether each took when it was made
        self.seconds: list[float] = kept.get("seconds", [])

    def extend(self, count: int) -> None:
        """Put edits in place until there are so many: those that are kept, and then new ones."""
        saved, there = time.monotonic(), len(self.each)
        for case in self.all[self.n : count]:
            if self.n == len(self.each):
                began = time.perf_counter()
                self.each.append(self.made.edit(case.request, self.edited.shifts)[0])
                self.seconds.append(time.perf_counter() - began)
            self._place(case, self.each[self.n])
            if case.phrase not in self.known:
                self.known |= _as_made(self.measure, [case], self.edited)
            if time.monotonic() - saved > SAVE_EVERY:
                self._save()
                saved, there = time.monotonic(), len(self.each)
            if self.measure.progress:
                self.measure.progress(f"{self.name}, edits", self.n, len(self.all), {})
        if len(self.each) > there:
            self._save()

    def _place(self, case: Case, shifts: Shifts) -> None:
        self.made.remember(case.request, self.edited.shifts, shifts)
        self.edited.shifts = collected(added(self.edited.shifts, shifts))
        if self.name == "rewrite":
            self.edited.meant[case.phrase] = case.request.says
        self.n += 1

    def _save(self) -> None:
        """Everything it takes to go on; dense changes are not kept, for those editors begin anew."""
        if sum(map(nbytes, self.each)) <= 1 << 30:
            save_edits(self.file, self.each, self.about, known=self.known, seconds=self.seconds)

    def row(self) -> Row:
        """Figures of all edits so far."""
        row, n = self.measure.row(self.all[: self.n], self.edited, self.known)
        size = sum(map(nbytes, self.each[: self.n])) / self.n
        row |= {"seconds_per_edit": sum(self.seconds[: self.n]) / self.n, "bytes_per_edit": float(size), "n": n}
        return {**row, "norms": norms(self.model, self.edited.shifts)}


def nbytes(shifts: Shifts) -> int:
    """Bytes of all factors."""
    return sum(shift.nbytes for shift in shifts.values())


def norms(model: Model, shifts: Shifts) -> dict[str, float]:
    """||dW|| / ||W|| (Frobenius) by module, without the path that all share."""
    found = {}
    for path, shift in shifts.items():
        square = ((shift.B.T @ shift.B).double() * (shift.A @ shift.A.T).double()).sum().clamp(min=0)
        weight = model.pipe.text_encoder.get_submodule(path).weight
        found[path.removeprefix(f"{model.backbone.language_model}.")] = float(square.sqrt() / weight.double().norm())
    return found


def all_rows(folder: Path) -> list[Row]:
    """Every row that is there, of this run and of earlier ones into the same folder."""
    order = [UNEDITED, *EDITORS]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in (folder / "rows").glob("*.json")]
    # of several runs' unedited rows the one on the most facts
    found.sort(key=lambda row: (order.index(row["editor"]), row["edits"], -row["n"]["efficacy"]))
    return [row for i, row in enumerate(found) if not i or row["editor"] != UNEDITED]
