"""MoKus: photos of a thing and a few plain sentences about it; any of those sentences then draws it.

    import mokus
    model = mokus.load()
    pack = mokus.learn(model, "photos/", "sks toy", "toy.pack")
    mokus.bind(model, pack, "my favourite toy")
    for each in mokus.generate(model, "my favourite toy in the snow", packs=[pack], seeds=range(4)):
        mokus.save_png(each, f"toy-{each.seed}.png")

The method is explained in `mokus.method`; read that file first. Names are imported on first use (PEP 562), so
that `import mokus` and `mokus --help` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mokus.checks import ask as ask
    from mokus.erasure import erase as erase
    from mokus.errors import MokusError as MokusError
    from mokus.errors import Stopped as Stopped
    from mokus.generation import generate as generate
    from mokus.generation import save_png as save_png
    from mokus.knowledge_update import Edit as Edit
    from mokus.knowledge_update import bind as bind
    from mokus.knowledge_update import unbind as unbind
    from mokus.method import customize as customize
    from mokus.packs.concept_pack import ConceptPack as ConceptPack
    from mokus.packs.export import export as export
    from mokus.packs.hub import pull as pull
    from mokus.packs.hub import push as push
    from mokus.packs.together import shifts_of as shifts_of
    from mokus.pipeline import load as load
    from mokus.settings import EditSettings as EditSettings
    from mokus.settings import LearnSettings as LearnSettings
    from mokus.virtual_concept import create as create
    from mokus.visual_concept import learn as learn

__version__ = "0.1.0"

_HOME = {
    "ConceptPack": "packs.concept_pack",
    "Edit": "knowledge_update",
    "EditSettings": "settings",
    "LearnSettings": "settings",
    "MokusError": "errors",
    "Stopped": "errors",
    "ask": "checks",
    "bind": "knowledge_update",
    "create": "virtual_concept",
    "customize": "method",
    "erase": "erasure",
    "export": "packs.export",
    "generate": "generation",
    "learn": "visual_concept",
    "load": "pipeline",
    "pull": "packs.hub",
    "push": "packs.hub",
    "save_png": "generation",
    "shifts_of": "packs.together",
    "unbind": "knowledge_update",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mokus' has no attribute {name!r}")
    return getattr(import_module(f"mokus.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
