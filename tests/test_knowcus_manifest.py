"""The data of KnowCusBench: what is shipped is what the paper describes, and every mistake in a file is told with its line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks.main_job import PERSPECTIVES as MAIN_JOB
from PIL import Image

from mokus.bench.knowcusbench.manifest import (
    DEEPEST,
    KNOWLEDGE_PERSPECTIVES,
    PROMPT_PERSPECTIVES,
    SHIPPED,
    Suite,
    check_photos,
    load_suite,
)
from mokus.demo import KNOWLEDGE as DEMO
from mokus.demo import UNBOUND
from mokus.errors import MokusError
from mokus.knowledge import CHECK_FORMS, IMAGE_FORMS, normalise, same
from mokus.miniature import language, oracle, world

DREAMBENCH = (
    "backpack backpack_dog bear_plushie berry_bowl can candle cat cat2 clock colorful_sneaker dog dog2 dog3 dog5 dog6 dog7 "
    "dog8 duck_toy fancy_boot grey_sloth_plushie monster_toy pink_sunglasses poop_emoji rc_car red_cartoon robot_toy "
    "shiny_sneaker teapot vase wolf_plushie"
)

SUITE = """\
name: mine
about: two things of mine
rare_token: sks
sources:
  shelf: {about: my shelf, url: https://example.org, licence: mine}
concepts:
  - name: cup
    class_word: cup
    source: shelf
    knowledge:
      - {perspective: physical attributes, text: the chipped one}
      - {perspective: emotion and state, text: what I miss at work}
    prompts:
      - {perspective: background, text: "{} on a wall"}
      - {perspective: style, text: "a sketch of {}"}
  - name: big lamp
    class_word: lamp
    source: shelf
    knowledge:
      - {perspective: value and quality, text: the cheapest I found}
    prompts:
      - {perspective: attribute, text: "{}, rusty"}
"""
LINES = SUITE.splitlines()


@pytest.fixture(params=SHIPPED)
def shipped(request: pytest.FixtureRequest) -> Suite:
    return load_suite(request.param)


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def complaint(file: Path | str) -> str:
    with pytest.raises(MokusError) as caught:
        load_suite(file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def knowledge_of(suite: Suite) -> list[str]:
    return [each.text for concept in suite.concepts for each in concept.knowledge]


def prompts_of(suite: Suite) -> list[str]:
    return [each.text for concept in suite.concepts for each in concept.prompts]


# --- what is shipped --------------------------------------------------------------------------------------------------


def test_knowcus_has_the_counts_of_the_paper() -> None:
    counts = load_suite("knowcus").counts()
    assert (counts["concepts"], counts["knowledge"], counts["prompts"]) == (35, 175, 199)
    assert (counts["reconstruction"], counts["generation"]) == (175, 5 * 199)
    assert counts["concepts_by_source"] == {"dreambench": 30, "customconcept101": 5}


def test_knowcus_has_all_subjects_of_dreambench() -> None:
    concepts = load_suite("knowcus").concepts
    assert [concept.name for concept in concepts if concept.source == "dreambench"] == DREAMBENCH.split()


def test_the_miniature_has_its_own_characters_and_every_scene_and_style_equally_often() -> None:
    suite = load_suite("miniature")
    assert [concept.name for concept in suite.concepts] == world.BENCHMARK_CHARACTERS
    expected = [prompt.expected for concept in suite.concepts for prompt in concept.prompts]
    backgrounds = [
        prompt.expected["scene"]
        for concept in suite.concepts
        for prompt in concept.prompts
        if prompt.perspective == "background"
    ]
    styles = [each["style"] for each in expected if "style" in each]
    assert {backgrounds.count(scene) for scene in world.SCENES} == {3} and len(backgrounds) == 24
    assert {styles.count(style) for style in world.STYLES} == {8} and len(styles) == 24


def test_what_is_expected_is_what_the_prompt_says_and_the_oracle_reads() -> None:
    for concept in load_suite("miniature").concepts:
        for prompt in concept.prompts:
            said = [("scene", scene) for scene in world.SCENES if scene in prompt.text]
            said += [("style", style) for style, words in world.STYLES.items() if words in prompt.text]
            assert prompt.expected == dict(said)
            assert all(value in oracle.LABELS[label] for label, value in said)


def test_perspectives_are_about_equally_often(shipped: Suite) -> None:
    counts = shipped.counts()
    for name, perspectives in (("knowledge", KNOWLEDGE_PERSPECTIVES), ("prompts", PROMPT_PERSPECTIVES)):
        by = counts[f"{name}_by_perspective"]
        assert list(by) == list(perspectives) and sum(by.values()) == counts[name]
        assert max(by.values()) - min(by.values()) <= 1
    for concept in shipped.concepts:
        assert len({each.perspective for each in concept.knowledge}) == len(concept.knowledge) == 5
        assert {each.perspective for each in concept.prompts} == set(PROMPT_PERSPECTIVES)


def test_knowledge_is_short_written_as_it_is_bound_and_never_nearly_the_same(shipped: Suite) -> None:
    texts = knowledge_of(shipped)
    assert all(text == normalise(text) and len(text.split()) <= 12 for text in texts)
    known = [text for several in MAIN_JOB.values() for pair in several for text in pair]
    known += [text.format(c="toy") for text in (*DEMO, *UNBOUND)]
    for one, other in [*combinations(texts, 2), *((text, other) for text in texts for other in known)]:
        a, b = set(same(one).split()), set(same(other).split())
        assert len(a - b) >= 2 or len(b - a) >= 2, (one, other)


def test_no_knowledge_of_the_miniature_says_what_its_world_has_words_for() -> None:
    own = {*world.COLOURS, *world.SHAPES, *world.MATERIALS, *world.STYLES, *language.CLASS_WORDS, *world.PEOPLE}
    own |= {world.scene_word(scene) for scene in world.SCENES}
    for text in knowledge_of(load_suite("miniature")):
        assert not own & set(re.findall(r"\w+", text)), text


def test_no_prompt_of_the_miniature_is_one_that_edits_are_made_or_checked_in() -> None:
    assert not {*IMAGE_FORMS, *CHECK_FORMS} & set(prompts_of(load_suite("miniature")))


def test_articles_are_right(shipped: Suite) -> None:
    for text in [
        *knowledge_of(shipped),
        *prompts_of(shipped),
        *(shipped.sources[name].about for name in shipped.sources),
    ]:
        assert not re.search(r"\ba (?!uni|one|use)[aeiou]", text, re.IGNORECASE), text
        assert not re.search(r"\ban (?!hour|heir|honest)[^aeiou]", text, re.IGNORECASE), text
        assert not re.search(r"\b(\w+) \1\b", text), text


def test_the_page_about_suites_is_true(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "knowcusbench_manifest.md").read_text(encoding="utf-8")
    suite = load_suite(written(tmp_path, page.split("```yaml")[1].split("```")[0]))
    assert suite.anchor(suite.concepts[0]) == "sks cup"
    rows = {line.split("|")[1].strip(): line.split("|")[2:4] for line in page.splitlines() if line.startswith("|")}
    for name, cells in zip(SHIPPED, range(2), strict=True):
        counts = load_suite(name).counts()
        assert rows["concepts"][cells].split()[0].strip(":") == str(counts["concepts"])
        assert rows["pieces of knowledge"][cells].split()[0].strip(":") == str(counts["knowledge"])
        assert rows["prompts"][cells].split()[0].strip(":") == str(counts["prompts"])
        drawn = rows["images of one method and seed"][cells]
        assert re.findall(r"\d+", drawn) == [str(counts["reconstruction"]), str(counts["generation"])]
    for perspective in (*KNOWLEDGE_PERSPECTIVES, *PROMPT_PERSPECTIVES):
        assert f"`{perspective}`" in page


def test_an_anchor_is_the_rare_token_and_the_class_word(shipped: Suite) -> None:
    assert {shipped.anchor(concept) for concept in shipped.concepts} == {
        f"sks {concept.class_word}" for concept in shipped.concepts
    }


def test_counts_are_those_of_every_pair_of_knowledge_and_prompt(tmp_path: Path) -> None:
    counts = load_suite(written(tmp_path, SUITE)).counts()
    assert (counts["concepts"], counts["knowledge"], counts["prompts"]) == (2, 3, 3)
    assert (counts["reconstruction"], counts["generation"]) == (2 + 1, 2 * 2 + 1 * 1)
    assert counts["generation_by_perspective"] == {"background": 2, "insertion": 0, "style": 2, "attribute": 1}


def test_json_is_the_same_as_yaml(tmp_path: Path, shipped: Suite) -> None:
    for indent in (None, 2, "\t"):
        text = json.dumps(shipped.model_dump(), indent=indent)
        assert load_suite(written(tmp_path, text, "mine.json")) == shipped
    dumped = yaml.safe_dump(shipped.model_dump(mode="json"), allow_unicode=True)
    assert load_suite(written(tmp_path, dumped)) == shipped


def test_characters_beyond_the_first_plane_survive_json(tmp_path: Path) -> None:
    text = json.dumps(yaml.safe_load(SUITE.replace("the chipped one", "the chipped one \U0001f9f8")))
    assert "\\ud83e" in text
    suite = load_suite(written(tmp_path, text, "mine.json"))
    assert suite.concepts[0].knowledge[0].text == "the chipped one \U0001f9f8"


def test_reading_a_suite_does_not_wait_for_torch() -> None:
    code = "import sys; from mokus.bench.knowcusbench.manifest import load_suite; load_suite('miniature')"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)


# --- mistakes ---------------------------------------------------------------------------------------------------------

# (line, what stands there instead, line of the complaint, what it says)
MISTAKES: dict[str, tuple[int, str, int, str]] = {
    "missing": (2, "", 1, "the field 'about' is missing"),
    "missing within": (9, "", 7, "the field 'source' is missing"),
    "missing in a source": (5, "  shelf: {about: a, url: b}", 5, "the field 'licence' is missing"),
    "missing in knowledge": (11, "      - {text: the chipped one}", 11, "the field 'perspective' is missing"),
    "unknown": (8, "    class_word: cup\n    klass: cup", 9, "'klass' is no field here, expected some of name, class_word"),
    "unknown at the top": (2, "about: a\nrepeat: b", 3, "'repeat' is no field here, expected some of name, about"),
    "empty": (2, "about:", 2, "'about' is empty"),
    "empty text": (11, '      - {perspective: emotion and state, text: " "}', 11, "the piece of knowledge is empty"),
    "only spaces": (2, 'about: "  "', 2, "the text is empty"),
    "number": (2, "about: 1962", 2, "1962 is no text here; put it in quotes"),
    "truth": (8, "    class_word: no", 8, "no is no text here; put it in quotes"),
    "date": (2, "about: 2024-99-99", 2, "2024-99-99 is no text here; put it in quotes"),
    "list for text": (8, "    class_word: [cup]", 8, "'class_word' holds a list, expected text"),
    "mapping for text": (14, "      - {perspective: style, text: {}}", 14, "'text' holds a mapping, expected text"),
    "text for a mapping": (11, "      - the chipped one", 11, "'knowledge' holds text, expected a mapping"),
    "text for a list": (20, "      the cheapest", 19, "'knowledge' holds text, expected a list"),
    "unquoted": (14, "      - {perspective: style, text: {} on a wall}", 14, "no YAML or JSON"),
    "unquoted below": (14, "      - perspective: style\n        text: {} on a wall", 15, "need quotes"),
    "unknown perspective": (14, '      - {perspective: colour, text: "{} on a wall"}', 14, "is 'colour', expected 'background'"),
    "a prompt's": (11, "      - {perspective: style, text: old}", 11, "is 'style', expected 'ownership and relationships', 'p"),
    "no place": (14, '      - {perspective: style, text: "a wall"}', 14, "the prompt 'a wall' is to have {} once"),
    "two places": (14, '      - {perspective: style, text: "{} on {}"}', 14, "the prompt '{} on {}' is to have {} once"),
    "other braces": (14, '      - {perspective: style, text: "{} on {a}"}', 14, "no other braces"),
    "a lone brace": (14, '      - {perspective: style, text: "{} on }"}', 14, "no other braces"),
    "nothing else": (14, '      - {perspective: style, text: "{}"}', 14, "the prompt says nothing besides the knowledge"),
    "question": (11, "      - {perspective: emotion and state, text: 'which one?'}", 11, "'which one?' is a question"),
    "concept twice": (16, "  - name: cup", 16, "the concept 'cup' is there twice"),
    "in two concepts": (20, "      - {perspective: value and quality, text: The  Chipped One.}", 20, "known of cup already"),
    "twice in one": (12, "      - {perspective: value and quality, text: THE CHIPPED ONE}", 12, "known of cup already"),
    "prompt twice": (15, '      - {perspective: style, text: "{} on  a Wall"}', 15, "is there twice for cup"),
    "names the anchor": (20, "      - {perspective: value and quality, text: my Sks lamp}", 20, "names the rare token 'sks'"),
    "names the token": (15, '      - {perspective: style, text: "{} by sks"}', 15, "names the rare token 'sks'"),
    "class word is an anchor": (17, "    class_word: sks lamp", 17, "names the rare token 'sks'"),
    "rare words": (3, "rare_token: sks toy", 3, "the rare token 'sks toy' is several words"),
    "source": (18, "    source: attic", 18, "the source 'attic' is not declared, expected one of shelf"),
    "name": (7, "  - name: ../cup", 7, "the name '../cup' is none of a folder"),
    "source's name": (5, "  a=b: {about: a, url: b, licence: c}", 5, "the name 'a=b' is none of a folder"),
    "repeated": (8, "    class_word: cup\n    class_word: mug", 9, "'class_word' is there twice"),
    "repeated in a line": (11, "      - {text: a, perspective: b, text: c}", 11, "'text' is there twice"),
    "odd key": (2, "1: a", 2, "1 is no text here"),
    "odder key": (2, "[a]: a", 2, "the name of a field is not text"),
    "alias": (9, "    source: *it", 9, "aliases such as '*name' are not allowed"),
    "merge": (9, "    <<: {source: shelf}", 9, "<< is no text here"),
    "tag": (2, "about: !!python/object/apply:os.getcwd []", 2, "the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd'"),
    "own tag": (2, "about: !mine a", 2, "the tag '!mine' is not allowed"),
    "set": (2, "about: !!set {a}", 2, "the tag 'tag:yaml.org,2002:set' is not allowed"),
    "control character": (2, "about: a\0b", 2, "the control character U+0000 is not allowed"),
    "half a character": (2, 'about: "\\ud83e"', 2, "'about' holds half a character"),
    "tab": (8, "\tclass_word: cup", 8, "no YAML or JSON"),
    "second document": (6, "---", 6, "expected a single document"),
    "nothing expected": (14, '      - {perspective: style, text: "{}!", expected: {style: a}}', 14, "nothing can be expected of"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_sentence_with_its_line(tmp_path: Path, kind: str) -> None:
    line, instead, there, said = MISTAKES[kind]
    file = written(tmp_path, "\n".join([*LINES[: line - 1], instead, *LINES[line:]]))
    sentence = complaint(file)
    assert sentence.startswith(f"{file}, line {there}: ") and said in sentence


@pytest.mark.parametrize("part", ["concepts", "sources"])
def test_a_suite_without_concepts_or_sources_is_refused(tmp_path: Path, part: str) -> None:
    data = yaml.safe_load(SUITE)
    for nothing in ([], {}, ""):
        text = yaml.safe_dump({**data, part: nothing}, sort_keys=False)
        assert f"'{part}'" in complaint(written(tmp_path, text))


@pytest.mark.parametrize("part", ["knowledge", "prompts"])
def test_a_concept_without_knowledge_or_prompts_is_refused(tmp_path: Path, part: str) -> None:
    data = yaml.safe_load(SUITE)
    data["concepts"][1][part] = []
    text = yaml.safe_dump(data, sort_keys=False)
    line = text.splitlines().index(f"  {part}: []") + 1
    assert f"line {line}: '{part}' is empty" in complaint(written(tmp_path, text))


@pytest.mark.parametrize(
    "expected, said",
    [
        ("{colour: red}", "nothing reads 'colour' off an image of a character, expected scene or style"),
        ("{scene: on the moon}", "the scene 'on the moon' does not exist in the world, expected one of 'on the beach'"),
        ("{style: cubist}", "the style 'cubist' does not exist in the world, expected one of 'plain', 'pencil'"),
    ],
)
def test_only_what_the_oracle_reads_can_be_expected(tmp_path: Path, expected: str, said: str) -> None:
    prompt = f'      - {{perspective: style, text: "a sketch of {{}}", expected: {expected}}}'
    lines = [*LINES[:14], prompt, *LINES[15:]]
    text = (
        "\n".join(lines).replace("shelf", "miniature").replace("name: cup", "name: taro").replace("big lamp", "bingo")
    )
    assert f"line 15: {said}" in complaint(written(tmp_path, text))


def test_only_characters_can_be_rendered(tmp_path: Path) -> None:
    assert "line 7: 'cup' is no character" in complaint(written(tmp_path, SUITE.replace("shelf", "miniature")))


def test_the_first_of_several_mistakes_is_told(tmp_path: Path) -> None:
    text = SUITE.replace("class_word: lamp", "class_word:").replace("perspective: style", "perspective: stile")
    assert "line 15: the perspective is 'stile'" in complaint(written(tmp_path, text))


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    assert "nothing.yaml is not there, expected knowcus, miniature, or" in complaint(tmp_path / "nothing.yaml")
    assert "knowcuss is not there" in complaint("knowcuss")
    assert "is not a file" in complaint(tmp_path)
    assert "line 1: the field 'name' is missing" in complaint(written(tmp_path, ""))
    assert "line 1: 'suite' holds a list, expected a mapping" in complaint(written(tmp_path, "[]"))
    file = tmp_path / "latin.yaml"
    file.write_bytes(SUITE.replace("the chipped one", "the café's").encode("latin-1"))
    assert "line 11: this is not UTF-8" in complaint(file)


def test_large_and_deep_files_are_refused(tmp_path: Path) -> None:
    assert "expected a suite of at most 4,000,000" in complaint(written(tmp_path, "#" * 4_000_001))
    assert f"nested {DEEPEST} deep" in complaint(written(tmp_path, "[" * 100_000))
    assert f"nested {DEEPEST} deep" in complaint(written(tmp_path, "- " * 1000 + "a"))
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True))
    assert "line 2: aliases such as" in complaint(written(tmp_path, bomb))


# --- photos -----------------------------------------------------------------------------------------------------------


def photographed(tmp_path: Path) -> tuple[Suite, Path]:
    """A suite, and a folder in which both its concepts have two photos."""
    for name in ("cup", "big lamp"):
        (tmp_path / "shelf" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (20, 30), "red").save(tmp_path / "shelf" / name / f"{i}.png")
    return load_suite(written(tmp_path, SUITE)), tmp_path / "shelf"


def test_photos_that_are_there_are_counted(tmp_path: Path) -> None:
    suite, shelf = photographed(tmp_path)
    states = check_photos(suite, {"shelf": shelf})
    assert [(each.concept, each.folder, each.photos, each.problem) for each in states] == [
        ("cup", shelf / "cup", 2, None),
        ("big lamp", shelf / "big lamp", 2, None),
    ]
    assert [each.state for each in states] == ["ready", "ready"]


def test_photos_that_are_missing_are_told_with_where_they_come_from(tmp_path: Path) -> None:
    suite, shelf = photographed(tmp_path)
    for each in check_photos(suite, {}):
        assert each.state == "missing" and each.folder is None
        assert each.problem and "shelf" in each.problem and "https://example.org" in each.problem
    (shelf / "cup").rename(shelf / "mug")
    cup, lamp = check_photos(suite, {"shelf": shelf})
    assert (cup.state, lamp.state) == ("missing", "ready")
    assert cup.problem and str(shelf / "cup") in cup.problem and "https://example.org" in cup.problem


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    suite, shelf = photographed(tmp_path)
    (shelf / "cup" / "1.png").write_bytes(b"no image")
    (shelf / "big lamp" / "1.png").write_bytes((shelf / "big lamp" / "0.png").read_bytes()[:50])
    for each, name in zip(check_photos(suite, {"shelf": shelf}), ("cup", "big lamp"), strict=True):
        assert (each.state, each.photos) == ("unusable", 2)
        assert each.problem and str(shelf / name / "1.png") in each.problem
    (shelf / "cup" / "0.png").unlink()
    (shelf / "cup" / "1.png").unlink()
    cup: Any = check_photos(suite, {"shelf": shelf})[0]
    assert cup.state == "missing" and "holds no photo" in cup.problem


def test_renders_need_no_folder() -> None:
    states = check_photos(load_suite("miniature"), {})
    assert {(each.state, each.folder, each.problem) for each in states} == {("rendered", None, None)}


def test_a_suite_of_characters_is_read_by_the_oracle_whatever_its_name() -> None:
    characters = load_suite("miniature")
    assert characters.rendered and characters.model_copy(update={"name": "mine"}).rendered
    assert not load_suite("knowcus").model_copy(update={"name": "miniature"}).rendered
