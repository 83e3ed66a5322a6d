"""A YAML file that is a list, read such that whatever is wrong with it is said with its line."""

from __future__ import annotations

from pathlib import Path

import yaml  # type: ignore[import-untyped]

from mokus.errors import MokusError

LARGEST = 1 << 20  # bytes


def entries(path: Path, what: str, example: str) -> list[tuple[yaml.Node, str]]:
    """The entries as nodes, none of them constructed, each with where it is: "FILE, line 3, entry 2".

    `what` the entries are ("cases"), `example` of one, for the sentences. Raises `MokusError` if it is no such file.
    """
    if not path.is_file():
        raise MokusError(f"{path} is {'not a file' if path.exists() else 'not there'}, expected a YAML file of {what}.")
    if path.stat().st_size > LARGEST:
        raise MokusError(f"{path} is larger than {LARGEST >> 20} MiB, expected a list of {what}; split it.")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise MokusError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise MokusError(
            f"{path}, line {mark.line + 1}: this is no YAML ({error.problem}); quote texts with ': '."
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise MokusError(f"{path} is no YAML ({str(error).splitlines()[0]}); write a list of {what}.") from error
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise MokusError(f"{path} holds no list, expected entries such as {example}.")
    return [(entry, f"{path}, line {entry.start_mark.line + 1}, entry {i}") for i, entry in enumerate(node.value, 1)]
