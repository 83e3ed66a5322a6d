"""Concept packs on the Hugging Face hub: `push` uploads one in a single commit, `pull` downloads and checks one.

What is uploaded is the pack and nothing else, unless photos are asked for. What is downloaded is what the pack's own
mokus.json lists, of one commit, read like any pack from a stranger: nothing of it runs, and a file that is not what the
list says refuses all of it.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mokus.errors import MokusError
from mokus.packs.concept_pack import ConceptPack
from mokus.packs.files import (
    FILE,
    MANIFEST,
    MAX_FILE_BYTES,
    MAX_JSON_BYTES,
    README,
    clear_begun,
    locked_place,
    refuse_taken,
    swap,
)
from mokus.packs.manifest import parse
from mokus.photos import load_photos
from mokus.pictures import png_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PHOTOS = "photos"  # folder of a repository
PHOTO_SIZE = 1024  # pixels
_OURS = re.compile(rf"{FILE}|^{MANIFEST}$|^{PHOTOS}/[^/]+\.png$")
_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
MINIATURE = "miniature"


@dataclass(frozen=True)
class Pushed:
    """A pack in a repository."""

    repo: str
    url: str
    revision: str  # the commit
    private: bool
    files: list[str]


@dataclass(frozen=True)
class Pulled:
    """A pack that was in a repository."""

    pack: ConceptPack
    repo: str
    revision: str  # the commit it came from: with it, `pull` gives the same bytes for ever


def push(
    pack: ConceptPack, repo: str, *, public: bool = False, base_model: str | None = None,
    photos: Path | str | None = None, warn: Callable[[str], None] | None = None,
) -> Pushed:  # fmt: skip
    """Upload a pack to the repository `repo` ("me/toy"), which is made if it is not there, private unless `public`.

    One commit, so the repository is never half a pack; files of an earlier pack that this one lacks are deleted.
    `base_model`: the hub id of the model, for a pack that was made with a local folder. `photos`: a folder of photos to
    upload as well, as squares without their metadata. What becomes readable, and for whom, is said to `warn` before
    anything is sent. Raises `MokusError` if you are not logged in, for a name that cannot be, a repository that holds
    something else or is open to more people than asked for, and when the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    _check_repo(repo)
    base = _hub_base(pack, base_model)
    pictures = _photos(photos) if photos is not None else {}
    if not get_token():
        raise MokusError(
            "you are not logged in to the hub; run 'hf auth login', or set HF_TOKEN to a token that may write."
        )
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder, _told(repo):
        copy = pack.copy(Path(folder) / "pack", base_model=base)
        files: dict[str, Path | bytes] = {name: copy.path / name for name in (MANIFEST, *copy.files)}
        files |= pictures
        there = _repository(api, repo, public)
        if warn is not None:
            warn(_warning(copy, repo, public, len(pictures)))
        if there is None:
            api.create_repo(repo, private=not public)
        stale = [name for name in there or () if _OURS.match(name) and name not in files]
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
        done = api.create_commit(
            repo, [*operations, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
            commit_message=f"Concept pack {pack.anchor}",
        )  # fmt: skip
    return Pushed(repo, f"{api.endpoint}/{repo}", str(done.oid), not public, sorted(files))


def pull(repo: str, output: str | Path | None = None, revision: str | None = None) -> Pulled:
    """Download a pack into the new folder `output`, by default one here with the repository's name.

    `revision` is a branch, a tag or a commit; what it is a name of now is in the result. Raises `MokusError` if there is no
    such repository or revision, or no pack in it, or one that is not whole; then nothing is left behind.
    """
    from huggingface_hub import HfApi

    _check_repo(repo)
    place = Path(output) if output is not None else Path(repo.partition("/")[2])
    refuse_taken(place, "pack")
    ConceptPack.check_place(place)
    there = next(parent for parent in place.resolve().parents if parent.exists())
    beside = there / f".{place.name}.{os.getpid()}.tmp"
    with locked_place(there / place.name):  # so whatever else was begun for it is of nobody who still downloads
        clear_begun(there / place.name)
        try:
            commit = _download(HfApi(), repo, revision, beside)
            place.resolve().parent.mkdir(parents=True, exist_ok=True)  # only now: what fails leaves no folder
            with locked_place(place.resolve()):
                refuse_taken(place, "pack")
                swap(beside, place.resolve())
        finally:
            shutil.rmtree(beside, ignore_errors=True)  # gone already, unless something failed
    return Pulled(ConceptPack.open(place), repo, commit)


def _download(api: HfApi, repo: str, revision: str | None, folder: Path) -> str:
    """Put a pack into the folder, which is not there yet; the commit it is of. Raises `MokusError` unless it is sound."""
    with _told(repo, revision):
        commit = str(api.model_info(repo, revision=revision).sha)
        tree = api.list_repo_tree(repo, recursive=True, revision=commit)
        sizes = {entry.path: int(getattr(entry, "size", 0)) for entry in tree}
        if MANIFEST not in sizes:
            raise MokusError(f"{repo} holds no concept pack, for it has no {MANIFEST}; check the name.")
        _fetch(api, repo, commit, [MANIFEST], sizes, folder)
        manifest = parse((folder / MANIFEST).read_bytes(), f"{MANIFEST} of {repo} is not what this mokus writes")
        _fetch(api, repo, commit, sorted(manifest.files), sizes, folder)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # where the downloads kept their notes
    _check_whole(folder, repo)
    return commit


def _fetch(api: HfApi, repo: str, commit: str, names: Sequence[str], sizes: dict[str, int], folder: Path) -> None:
    """Download files of a commit, whose names were checked, unless they are larger than those of a pack can be."""
    for name in names:
        if name not in sizes:
            raise MokusError(f"{repo} lacks {name}, which its {MANIFEST} lists; ask for a whole pack there.")
        limit = MAX_JSON_BYTES if name == MANIFEST else MAX_FILE_BYTES
        if sizes[name] > limit:
            raise MokusError(f"{name} of {repo} is larger than {limit >> 20} MiB, more than a concept pack can need.")
        api.hf_hub_download(repo, name, revision=commit, local_dir=folder)


def _check_whole(folder: Path, repo: str) -> None:
    try:
        ConceptPack.open(folder)
    except MokusError as error:
        raise MokusError(f"{repo} holds no sound concept pack: {str(error).replace(str(folder), repo)}") from error


def _check_repo(repo: str) -> None:
    if not re.fullmatch(f"{_NAME}/{_NAME}", repo) or re.search(r"--|\.\.|\.git$|[.-](/|$)", repo):
        raise MokusError(
            f"the repository {repo!r} cannot be, expected a user or organisation and a name, such as me/toy."
        )


def _hub_base(pack: ConceptPack, given: str | None) -> str:
    """What the card says of the model: a hub id, never a folder of yours."""
    base = given or pack.base_model
    if base == MINIATURE and given is None:
        return base
    if not re.fullmatch(f"{_NAME}/{_NAME}", base) or (given is None and Path(base).exists()):
        raise MokusError(
            f"{pack.path} says that its model is {base}, which is no repository that others could load; say which one it "
            "is by --base-model, such as Qwen/Qwen-Image."
        )
    return base


def _photos(folder: Path | str) -> dict[str, Path | bytes]:
    """PNGs under names that say nothing, and without what the camera wrote beside the pixels."""
    return {f"{PHOTOS}/{i:03d}.png": png_of(p.image) for i, p in enumerate(load_photos(folder, PHOTO_SIZE), start=1)}


def _repository(api: HfApi, repo: str, public: bool) -> list[str] | None:
    """The files that are in the repository; None if it is not there. Raises `MokusError` unless it is one to push to."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError as error:
        if isinstance(error, GatedRepoError):
            raise
        return None
    if public and info.private:
        raise MokusError(f"{repo} is private already; leave out --public, or open it on its page first.")
    if not public and not info.private:
        raise MokusError(f"{repo} is public, so everyone could read the pack; say --public if you want that.")
    names = [file.rfilename for file in info.siblings or ()]
    if MANIFEST not in names and (odd := sorted(set(names) - {README, ".gitattributes"})):
        raise MokusError(f"{repo} holds {odd[0]} and no concept pack; name a new repository.")
    return names


def _warning(pack: ConceptPack, repo: str, public: bool, photos: int) -> str:
    who = "everyone" if public else f"everyone with access to {repo}"
    what = [f"what {pack.anchor!r} looks like"] if pack.lora() else []
    if previews := sum(name.startswith("samples/") for name in pack.files):
        what.append(f"{previews} {'preview' if previews == 1 else 'previews'} of it")
    if photos:
        what.append(f"{photos} {'photo' if photos == 1 else 'photos'}")
    if pack.knowledge:
        what.append("in plain words what is bound to it: " + ", ".join(repr(known.text) for known in pack.knowledge))
    if kept := dict.fromkeys(phrase for known in pack.knowledge for phrase in known.kept):
        what.append("what is kept as it is: " + ", ".join(map(repr, kept)))
    return f"{who} will be able to read {'; '.join(what)}."


@contextmanager
def _told(repo: str, revision: str | None = None) -> Iterator[None]:
    """What the hub's library raises, as one sentence."""
    from huggingface_hub import errors

    no_answer: Any = errors.HfHubHTTPError.__bases__[0]  # of the HTTP library: no connection, or none in time
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise MokusError(f"{repo} has no revision {revision!r}; expected a branch, a tag or a whole commit.") from error
    except errors.RepositoryNotFoundError as error:
        raise MokusError(
            f"there is no repository {repo} that you may read; check the name, and 'hf auth login' if it is private."
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise MokusError("the hub cannot be reached, for HF_HUB_OFFLINE is set; unset it.") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        advice = "see that your token may write there" if status in (401, 403) else "try again later"
        reason = error.server_message or error.response.reason_phrase
        raise MokusError(f"the hub refused {repo} ({status}: {_line(reason)}); {advice}.") from error
    except no_answer as error:
        raise MokusError(f"the hub cannot be reached ({_line(str(error))}); check the connection.") from error
    except MokusError:
        raise
    except ValueError as error:  # a card that it does not take, an answer that is none
        raise MokusError(f"the hub did not take {repo}: {_line(str(error))}.") from error
    except OSError as error:
        if error.errno is not None:  # the disk's, not the hub's
            raise
        raise MokusError(f"{repo} was not downloaded whole ({_line(str(error))}); try again.") from error


def _line(text: str) -> str:
    return " ".join(text.split())[:300].rstrip(".") or "no reason given"
