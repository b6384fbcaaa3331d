"""Write docs/config.md from the schema in src/gaplab/config.py and the files in conf/: `python docs/make_config.py`.

A test fails when the page is not what this writes.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "src"))

import yaml  # noqa: E402

from gaplab import config as configs  # noqa: E402

PAGE = PROJECT / "docs" / "config.md"
CONF = PROJECT / "conf"
BASES: dict[str, type] = {"model": configs.Model, "data": configs.Data, "optimizer": configs.Optimizer,
                          "scheduler": configs.Scheduler, "trainer": configs.Trainer,
                          "tracking": configs.Tracking}  # fmt: skip
PARTS = {"metrics": configs.Metrics, "checkpoint": configs.Checkpoint, "gate": configs.Gate, "sweep": configs.Sweep,
         "paths": configs.Paths}  # fmt: skip
COMMANDS = {"report": configs.Report, "evaluate": configs.Evaluate, "predict": configs.Predict,
            "promote": configs.Promote, "serve": configs.Serve, "sync": configs.Sync, "ui": configs.Ui}  # fmt: skip
INTRODUCTION = """\
# Configuration

Written by `python docs/make_config.py` from [`src/gaplab/config.py`](../src/gaplab/config.py) and [`conf/`](../conf); a
change belongs there. `python src/train.py --help` prints the same for the config that is composed, with its values.

A command line is a list of `key=value` and `group=choice`: `python src/train.py model=cnn model.bn=true` takes the keys
of `model=cnn` and turns one. A wrong key or value ends the command before anything is trained, with status 2 and one
line. `null` is YAML's word for none, `???` marks a value that must be given, `<project>` is the project's folder.
"""


def page() -> str:
    """The whole page."""
    return "\n".join(line.rstrip() for line in _lines())


def _lines() -> Iterator[str]:
    yield INTRODUCTION
    yield "- [A run](#a-run): `python src/train.py`"
    yield "- Groups: " + ", ".join(f"[`{group}`](#{group})" for group in (*BASES, "experiment", "claim", "launcher"))
    yield "- Parts: " + ", ".join(f"[`{part}`](#{part})" for part in PARTS)
    yield "- Other commands: " + ", ".join(f"[`src/{name}.py`](#srcnamepy)".replace("name", name) for name in COMMANDS)
    yield "\n## A run"
    yield from _table(configs.Config)
    for group, base in BASES.items():
        yield f"\n## {group}"
        yield from _choices(group)
        if any(item.metadata for item in fields(base)):
            yield f"\nKeys of every `{group}`:"
            yield from _table(base, f"{group}.")
        for schema in configs.SCHEMAS[group]:
            if schema is not base and (own := _own(schema, base)):
                names = ", ".join(f"`{group}={name}`" for name, one in _schemas(group) if one == schema.__name__)
                yield f"\nKeys of {names}:"
                yield from _rows(own, f"{group}.")
    for group, words in {
        "experiment": "Configs of this project's own; each says what differs from the defaults.",
        "claim": "A sweep (`-m`) with the rule that turns its numbers into a verdict.",
    }.items():
        yield f"\n## {group}\n\n{words}"
        yield "\n| choice | what it is |\n|---|---|"
        for path in sorted((CONF / group).rglob("*.yaml")):
            name = path.relative_to(CONF / group).with_suffix("")
            said = _comment(path) or _sets(yaml.safe_load(path.read_text()))
            yield f"| `{group}={name}` | {said} |"
    yield from _launchers()
    for part, schema in PARTS.items():
        yield f"\n## {part}"
        yield from _table(schema, f"{part}.")
    for name, schema in COMMANDS.items():
        yield f"\n## src/{name}.py\n"
        parts = [item.name for item in fields(schema) if not item.metadata]
        yield f"{schema.__doc__} It takes {' and '.join(f'[`{part}`](#{part})' for part in parts)} too."
        if any(item.metadata for item in fields(schema)):
            yield from _table(schema)
    yield ""


def _choices(group: str) -> Iterator[str]:
    """A table of the files in conf/<group>, and what each sets."""
    yield "\n| choice | sets |\n|---|---|"
    for path in sorted((CONF / group).glob("*.yaml")):
        yield f"| `{group}={path.stem}` | {_sets(yaml.safe_load(path.read_text()))} |"


def _sets(values: dict[str, Any]) -> str:
    """What a config file says, in one line."""
    base = [one for one in values.get("defaults", []) if isinstance(one, str) and one != "_self_"]
    flat = configs.flatten({name: value for name, value in values.items() if name != "defaults"})
    said = [*(f"all of `{one}`" for one in base), *(f"`{name}={_value(value)}`" for name, value in flat.items())]
    return ", ".join(said) or "nothing"


def _schemas(group: str) -> Iterator[tuple[str, str]]:
    """(choice, the name of its schema)."""
    for path in sorted((CONF / group).glob("*.yaml")):
        for entry in yaml.safe_load(path.read_text()).get("defaults", []):
            if isinstance(entry, dict):
                yield from ((path.stem, name) for name in entry.values())


def _launchers() -> Iterator[str]:
    yield "\n## launcher\n"
    yield "Who runs the jobs of a sweep: `hydra/launcher=basic` one after another, `joblib` side by side, or"
    yield "\n| choice | keys, with their defaults |\n|---|---|"
    for path in sorted((CONF / "hydra" / "launcher").glob("*.yaml")):
        values = yaml.safe_load(path.read_text())
        named = {name: value for name, value in values.items() if name not in ("defaults", "_target_")}
        keys = [f"`hydra.launcher.{name}={_value(value)}`" for name, value in named.items()]
        yield f"| `hydra/launcher={path.stem}` | {', '.join(keys)} |"


def _own(schema: type, base: type) -> list["Field[Any]"]:
    """The fields that `schema` adds to `base` or says anew."""
    known = {item.name: item for item in fields(base)}
    return [item for item in fields(schema) if item is not known.get(item.name)]


def _table(schema: type, prefix: str = "") -> Iterator[str]:
    yield from _rows([item for item in fields(schema) if item.metadata], prefix)


def _rows(items: list["Field[Any]"], prefix: str) -> Iterator[str]:
    yield "\n| key | type | default | allowed | what it is |\n|---|---|---|---|---|"
    for item in items:
        default, doc = _value(_default(item)), item.metadata["doc"]
        cells = [f"`{prefix}{item.name}`", _type(item.type), f"`{default}`", _limits(item.metadata["allowed"]), doc]
        yield f"| {' | '.join(cells)} |"


def _limits(allowed: Any) -> str:
    if isinstance(allowed, configs.Range):
        low, high = (f"{end:.10g}" for end in (allowed.low, allowed.high))
        if allowed.high == math.inf:
            return f"{'≥' if allowed.ends[0] == '[' else '>'} {low}"
        return f"{allowed.ends[0]}{low}, {high}{allowed.ends[1]}"
    return ", ".join(f"`{one}`" for one in allowed or ())


def _default(item: "Field[Any]") -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _type(annotation: Any) -> str:
    """`list[int] | None` as "list of int, or null"."""
    names = {str: "text", Any: "any", NoneType: "null", float: "number", int: "integer", bool: "true or false"}
    if annotation in names:
        return names[annotation]
    if isinstance(annotation, UnionType):
        return " or ".join(_type(one) for one in get_args(annotation))
    assert not is_dataclass(annotation)
    kinds = [_type(one) for one in get_args(annotation)]
    return f"list of {kinds[0]}" if get_origin(annotation) is list else f"{kinds[0]}: {kinds[1]}"


def _value(value: Any) -> str:
    """As it is typed on a command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(_value(one) for one in value)}]"
    if isinstance(value, float):
        return f"{value:g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")
    return str(value).replace(str(PROJECT), "<project>")


def _comment(path: Path) -> str:
    """The sentences at the top of a config."""
    lines = path.read_text().splitlines()
    top = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    text = [line.lstrip("# ") for line in top if "@package" not in line]
    return " ".join(text[: text.index("")] if "" in text else text)


if __name__ == "__main__":
    PAGE.write_text(page())
