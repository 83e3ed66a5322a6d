"""Packs pushed to a hub and pulled from it: the same bytes, for nobody else's eyes unless asked, and checked like any pack.

The hub is a small server in this process that speaks the parts of the Hugging Face API that the library uses.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from mokus import pipeline
from mokus.cli import app
from mokus.errors import MokusError
from mokus.packs import hub as hub_of
from mokus.packs.concept_pack import LORA, MANIFEST, README, ConceptPack
from mokus.pipeline import Model

from .conftest import PackFactory, known, random_shifts

TOKEN = "hf_of_the_test"
PHRASES = ["my favourite toy", "the robot my grandmother built"]


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by sha, the last one is main

    def commit(self, changes: dict[str, bytes | None]) -> str:
        before = list(self.commits.values())[-1] if self.commits else {}
        after = {name: data for name, data in {**before, **changes}.items() if data is not None}
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(after)}".encode()).hexdigest()
        self.commits[sha] = after
        return sha

    @property
    def main(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.main]


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # of LFS
        self.lfs = False  # whether safetensors go there, as on the real hub
        self.broken = 0  # status of everything
        self.log: list[tuple[str, str]] = []

    def make(self, name: str, private: bool = True, files: dict[str, bytes] | None = None) -> Repository:
        self.repos[name] = Repository(private)
        self.repos[name].commit({".gitattributes": b"", **(files or {})})
        return self.repos[name]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(
        self, value: Any = None, status: int = 200, code: str = "", headers: dict[str, str] | None = None
    ) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(body)), "X-Error-Code": code, **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, code)

    def route(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, path))
        if self.server.broken:
            return self.refuse(self.server.broken, "")
        mine = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        for pattern, handle in ROUTES.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return handle(self, mine, body, *found.groups())
        self.refuse(404, "")  # what the library asks for its own statistics

    do_GET = do_HEAD = do_POST = do_PUT = route

    def repo(self, name: str, mine: bool) -> Repository | None:
        found = self.server.repos.get(name)
        if found is None or (found.private and not mine):
            self.refuse(404 if mine else 401, "RepoNotFound")
            return None
        return found

    def create(self, mine: bool, body: bytes) -> None:
        asked = json.loads(body)
        if not mine or asked["organization"] != "me":
            return self.refuse(403, "Forbidden")
        name = f"{asked['organization']}/{asked['name']}"
        self.server.make(name, asked.get("visibility") == "private")
        self.answer({"url": f"{self.server.url}/{name}"})

    def validate(self, mine: bool, body: bytes) -> None:
        front = yaml.safe_load(json.loads(body)["content"].split("---\n", 2)[1])
        if not re.fullmatch("[^/]+/[^/]+", front.get("base_model", "a/b")):
            return self.answer({"errors": [{"message": '"base_model" is not valid'}], "warnings": []}, 400)
        self.answer({"errors": [], "warnings": []})

    def info(self, mine: bool, body: bytes, name: str, revision: str | None = None) -> None:
        if repo := self.repo(name, mine):
            sha = repo.main if revision in (None, "main") else revision
            if sha not in repo.commits:
                return self.refuse(404, "RevisionNotFound")
            siblings = [{"rfilename": file} for file in repo.commits[sha]]
            self.answer({"id": name, "sha": sha, "private": repo.private, "siblings": siblings})

    def tree(self, mine: bool, body: bytes, name: str, sha: str) -> None:
        if repo := self.repo(name, mine):
            self.answer([
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in repo.commits[sha].items()
            ])  # fmt: skip

    def preupload(self, mine: bool, body: bytes, name: str, revision: str) -> None:
        files = [file["path"] for file in json.loads(body)["files"]]
        modes = ["lfs" if self.server.lfs and file.endswith(".safetensors") else "regular" for file in files]
        self.answer({"files": [{"path": file, "uploadMode": mode, "shouldIgnore": False}
                               for file, mode in zip(files, modes, strict=True)]})  # fmt: skip

    def batch(self, mine: bool, body: bytes, name: str) -> None:
        upload = [{**each, "actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}}
                  for each in json.loads(body)["objects"]]  # fmt: skip
        self.answer({"transfer": "basic", "objects": upload})

    def store(self, mine: bool, body: bytes, oid: str) -> None:
        self.server.blobs[oid] = body
        self.answer({})

    def commit(self, mine: bool, body: bytes, name: str, revision: str) -> None:
        if not mine:
            return self.refuse(403, "Forbidden")
        changes: dict[str, bytes | None] = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                changes[value["path"]] = None
        sha = self.server.repos[name].commit(changes)
        self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha})

    def resolve(self, mine: bool, body: bytes, name: str, sha: str, file: str) -> None:
        if repo := self.repo(name, mine):
            if file not in repo.commits[sha]:
                return self.refuse(404, "EntryNotFound")
            data = repo.commits[sha][file]
            self.answer(data, headers={"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha})


ROUTES = {
    "POST /api/repos/create": Handler.create,
    "POST /api/validate-yaml": Handler.validate,
    "GET /api/models/([^/]+/[^/]+)": Handler.info,
    "GET /api/models/([^/]+/[^/]+)/revision/(.+)": Handler.info,
    "GET /api/models/([^/]+/[^/]+)/tree/([^/]+)/?": Handler.tree,
    "POST /api/models/([^/]+/[^/]+)/preupload/(.+)": Handler.preupload,
    "POST /api/models/([^/]+/[^/]+)/commit/(.+)": Handler.commit,
    r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": Handler.batch,
    "PUT /lfs/(.+)": Handler.store,
    "(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)": Handler.resolve,
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    constants = huggingface_hub.constants
    for name, value in {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
                        "HF_HUB_DISABLE_PROGRESS_BARS": True, "HF_TOKEN_PATH": str(tmp_path / "token")}.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def pack(tmp_path: Path, pico_pack: PackFactory) -> ConceptPack:
    """A pack for a model of the hub."""
    return pico_pack(tmp_path / "local.pack", knowledge=PHRASES).copy(tmp_path / "toy.pack", base_model="org/model")


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def refused(*arguments: Any, told: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), (arguments, result.output, result.exception)
    *warned, sentence = result.stderr.splitlines()  # what would become readable, where it was about to
    assert sentence.startswith("mokus: ") and told in sentence and len(warned) <= 1, result.stderr


# --- there and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lfs", [False, True], ids=["in git", "large files apart"])
def test_what_is_pushed_is_pulled_to_the_bit(hub: Hub, tmp_path: Path, pack: ConceptPack, lfs: bool) -> None:
    hub.lfs = lfs
    result = run("push", pack.path, "me/toy", "--json")
    told = json.loads(result.stdout)
    assert result.exit_code == 0 and told["private"] and hub.repos["me/toy"].private
    assert (
        told["revision"] == hub.repos["me/toy"].main and len(hub.repos["me/toy"].commits) == 2
    )  # made, and one commit
    assert {**hub.repos["me/toy"].files, ".gitattributes": b""} == {**tree(pack.path), ".gitattributes": b""}
    assert len(hub.blobs) == (2 if lfs else 0)
    result = run("pull", "me/toy", "-o", tmp_path / "again.pack", "--json")
    told = json.loads(result.stdout)
    assert result.exit_code == 0 and told["revision"] == hub.repos["me/toy"].main and told["knowledge"] == PHRASES
    assert tree(tmp_path / "again.pack") == tree(pack.path)
    assert {p.name for p in tmp_path.iterdir()} <= {
        "local.pack", "toy.pack", "again.pack", *(f".{n}.pack.lock" for n in ("local", "toy", "again"))
    }  # fmt: skip


def test_it_is_said_what_becomes_readable(hub: Hub, pack: ConceptPack) -> None:
    result = run("push", pack.path, "me/toy")
    assert result.exit_code == 0 and result.stderr.count("\n") == 1 and hub.url in result.stdout
    for part in ("everyone with access to me/toy", "'sks toy'", "1 preview", *map(repr, PHRASES)):
        assert part in result.stderr
    result = run("push", pack.path, "me/open", "--public")
    assert result.exit_code == 0 and "mokus: everyone will" in result.stderr and not hub.repos["me/open"].private


def test_the_card_is_what_the_hub_shows(hub: Hub, pack: ConceptPack) -> None:
    assert run("push", pack.path, "me/toy").exit_code == 0
    front = yaml.safe_load(hub.repos["me/toy"].files[README].decode().split("---\n", 2)[1])
    assert (front["base_model"], front["base_model_relation"]) == ("org/model", "adapter")
    assert front["instance_prompt"] == "sks toy" and "lora" in front["tags"]
    assert front["widget"] == [{"text": "sks toy", "output": {"url": "samples/0-anchor.png"}}]
    assert all(each["output"]["url"] in hub.repos["me/toy"].files for each in front["widget"])


def test_photos_only_if_asked_and_without_what_the_camera_wrote(hub: Hub, tmp_path: Path, pack: ConceptPack) -> None:
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    exif[0x010F] = "Grandmother's camera"
    Image.new("RGB", (64, 48), "red").save(tmp_path / "photos" / "anna-at-home.jpg", exif=exif)
    assert run("push", pack.path, "me/toy").exit_code == 0
    assert not any(name.startswith("photos/") for name in hub.repos["me/toy"].files)
    result = run("push", pack.path, "me/toy", "--photos", tmp_path / "photos")
    assert result.exit_code == 0 and "1 photo;" in result.stderr
    found = {name: data for name, data in hub.repos["me/toy"].files.items() if name.startswith("photos/")}
    assert list(found) == ["photos/001.png"] and b"Grandmother" not in found["photos/001.png"]
    assert run("pull", "me/toy", "-o", tmp_path / "again.pack").exit_code == 0
    assert tree(tmp_path / "again.pack") == tree(pack.path)  # photos are no part of a pack
    assert run("push", pack.path, "me/toy").exit_code == 0
    assert not any(name.startswith("photos/") for name in hub.repos["me/toy"].files)


def test_pushed_again_it_is_the_new_pack_and_the_old_one_is_pinned(hub: Hub, tmp_path: Path, pack: ConceptPack) -> None:
    first = json.loads(run("push", pack.path, "me/toy", "--json").stdout)["revision"]
    before = tree(pack.path)
    hub.repos["me/toy"].commit({"LICENSE": b"mine"})
    pack.replace_edits([])
    assert run("push", pack.path, "me/toy").exit_code == 0
    assert set(hub.repos["me/toy"].files) == {*tree(pack.path), ".gitattributes", "LICENSE"}
    assert run("pull", "me/toy", "-o", tmp_path / "new.pack").exit_code == 0
    assert run("pull", "me/toy", "-o", tmp_path / "old.pack", "--revision", first).exit_code == 0
    assert (tree(tmp_path / "new.pack"), tree(tmp_path / "old.pack")) == (tree(pack.path), before)


def test_a_folder_of_mine_is_told_to_nobody(hub: Hub, tmp_path: Path, pico: Model, pico_pack: PackFactory) -> None:
    local = pico_pack(tmp_path / "b.pack")
    refused("push", local.path, "me/toy", told="--base-model")
    assert "me/toy" not in hub.repos
    before = tree(local.path)
    assert run("push", local.path, "me/toy", "--base-model", "Qwen/Qwen-Image").exit_code == 0
    assert not any(pico.id.encode() in data for data in hub.repos["me/toy"].files.values())
    assert run("pull", "me/toy", "-o", tmp_path / "again.pack").exit_code == 0
    again = ConceptPack.open(tmp_path / "again.pack")
    assert again.base_model == "Qwen/Qwen-Image" and again.lora().keys() == local.lora().keys()
    again.check_base(pico)  # by its weights, not its name
    assert tree(local.path) == before


def test_a_folder_of_mine_by_a_relative_path_is_no_hub_id_anywhere(
    hub: Hub, tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it was made, and from another folder, in which there is none at that path."""
    (tmp_path / "here" / "models").mkdir(parents=True)
    (tmp_path / "here" / "models" / "mine").symlink_to(pico_folder)
    monkeypatch.chdir(tmp_path / "here")
    model = pipeline.load("models/mine", device="cpu")
    pack = ConceptPack.create(
        tmp_path / "a.pack", model=model, anchor="Zorblax", word="toy", lora={}, settings={},
        edits=[(known("Zorblax"), random_shifts(model))],
    )  # fmt: skip
    for place in (tmp_path / "here", tmp_path):
        monkeypatch.chdir(place)
        refused("push", pack.path, "me/toy", told="--base-model")
    assert not hub.repos


# --- what is refused -----------------------------------------------------------------------------------------


def test_names_that_cannot_be(hub: Hub, pack: ConceptPack) -> None:
    for name in (
        "toy",
        "me/toy/more",
        "/etc/passwd",
        "../up",
        "me/",
        "me/a--b",
        "me/toy.git",
        "me/a b",
        "https://x/y",
        "",
    ):
        refused("push", pack.path, name, told="such as me/toy")
        refused("pull", name, told="such as me/toy")
    assert hub.log == []


def test_pushes_that_are_refused(hub: Hub, tmp_path: Path, pack: ConceptPack, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.make("me/open", private=False)
    hub.make("me/shut")
    hub.make("me/novel", files={"chapter1.txt": b"It was a dark night."})
    state = {name: dict(repo.commits) for name, repo in hub.repos.items()}
    refused("push", pack.path, "me/open", told="--public")
    refused("push", pack.path, "me/shut", "--public", told="private already")
    refused("push", pack.path, "me/novel", told="chapter1.txt")
    refused("push", pack.path, "you/toy", told="token")  # where this token may not write
    refused("push", tmp_path / "nowhere", "me/toy", told="no concept pack")
    refused("push", pack.path, "me/toy", "--photos", tmp_path / "nowhere", told="not there")
    monkeypatch.delenv("HF_TOKEN")
    refused("push", pack.path, "me/toy", told="hf auth login")
    assert {name: repo.commits for name, repo in hub.repos.items()} == state


def test_pulls_that_are_refused(hub: Hub, tmp_path: Path, pack: ConceptPack, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("push", pack.path, "me/toy").exit_code == 0
    good = {name: data for name, data in hub.repos["me/toy"].files.items() if name != ".gitattributes"}
    manifest = json.loads(good[MANIFEST])
    bad = bytearray(good[LORA])
    bad[-1] ^= 1
    escapes = {**manifest, "files": {**manifest["files"], "../../evil.py": "0" * 64}}
    hub.make("me/model", files={"model.safetensors": b"x"})
    hub.make("me/tampered", files={**good, LORA: bytes(bad)})
    hub.make("me/half", files={name: data for name, data in good.items() if name != LORA})
    hub.make("me/escapes", files={**good, MANIFEST: json.dumps(escapes).encode(), "../../evil.py": b"import os"})
    hub.make("me/nonsense", files={**good, MANIFEST: b"\xff{"})
    place = tmp_path / "new.pack"
    for repo, told in {
        "me/nowhere": "no repository me/nowhere", "me/model": "no mokus.json", "me/tampered": "sha256",
        "me/half": f"lacks {LORA}", "me/escapes": "mokus.json", "me/nonsense": "no JSON",
    }.items():  # fmt: skip
        refused("pull", repo, "-o", place, told=told)
        assert not place.exists() and not list(tmp_path.rglob("evil.py")) and not list(tmp_path.glob(".*.tmp"))
        refused("pull", repo, "-o", tmp_path / "aa" / "bb" / "cc", told=told)
        assert not (tmp_path / "aa").exists() and not list(tmp_path.glob(".*.tmp"))
    assert run("pull", "me/toy", "-o", tmp_path / "aa" / "bb" / "cc").exit_code == 0
    refused("pull", "me/toy", "-o", place, "--revision", "v9", told="no revision 'v9'")
    refused("pull", "me/toy", "-o", pack.path, told="exists already")
    monkeypatch.setenv("HF_TOKEN", "hf_somebody_else")
    refused("pull", "me/toy", "-o", place, told="that you may read")


def test_what_a_killed_pull_left_goes_with_the_next_one(hub: Hub, tmp_path: Path, pack: ConceptPack) -> None:
    assert run("push", pack.path, "me/toy").exit_code == 0
    for place in (tmp_path / "new.pack", tmp_path / "folder" / "more.pack"):
        left = tmp_path / f".{place.name}.123.tmp"
        left.mkdir()
        (left / LORA).write_bytes(b"half")
        assert run("pull", "me/toy", "-o", place).exit_code == 0
        assert not left.exists() and tree(place) == tree(pack.path)


def test_what_is_being_pulled_is_not_cleared_away(
    hub: Hub, tmp_path: Path, pack: ConceptPack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whoever makes a pack of that name meanwhile: it has to wait."""
    assert run("push", pack.path, "me/toy").exit_code == 0
    real, waited = hub_of.parse, []

    def parse(*arguments: Any) -> Any:
        def writing() -> None:
            with ConceptPack.lock_place(tmp_path / "new.pack", 0.05):
                pass

        with ThreadPoolExecutor() as other, pytest.raises(MokusError, match="another process"):
            waited.append(1)
            other.submit(writing).result(60)
        return real(*arguments)

    monkeypatch.setattr(hub_of, "parse", parse)
    assert run("pull", "me/toy", "-o", tmp_path / "new.pack").exit_code == 0 and waited


def test_a_hub_that_does_not_answer(
    hub: Hub, tmp_path: Path, pack: ConceptPack, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.broken = 500
    refused("pull", "me/toy", "-o", tmp_path / "new.pack", told="500")
    refused("push", pack.path, "me/toy", told="500")
    hub.broken = 0
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("pull", "me/toy", "-o", tmp_path / "new.pack", told="HF_HUB_OFFLINE")
    refused("push", pack.path, "me/toy", told="HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.server_close()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port
    refused("pull", "me/toy", "-o", tmp_path / "new.pack", told="cannot be reached")
    refused("push", pack.path, "me/toy", told="cannot be reached")
    assert not (tmp_path / "new.pack").exists() and not list(tmp_path.glob(".*.tmp"))
