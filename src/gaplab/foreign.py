"""Config folders that a command line adds: they may be somebody else's, and Hydra builds what its own section names.

Callbacks, launchers, logging handlers, environment variables and folders are all said under `hydra`, by a key, a
package, a group or an interpolation. So the config is composed once more, which builds nothing, and its `hydra` is
compared with what it is without the folder.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gaplab.config import PROJECT
from gaplab.errors import UserError
from gaplab.files import check_yaml, plain, read_text

MAX_FILES = 10_000
ALLOWED = "of Hydra itself, a folder of configs may set sweeper.params and launcher.n_jobs; type the rest yourself"


def check_words(words: list[str]) -> None:
    """Refuse, of the words of a command line, folders of configs that reach into Hydra itself. Raises UserError."""
    if not any(word.startswith("-") or "hydra.searchpath" in word for word in words):
        return
    from hydra._internal.utils import get_args_parser

    given = get_args_parser().parse_args(words)  # abbreviates as Hydra does
    if given.experimental_rerun:
        raise UserError("--experimental-rerun: reads a pickle, which may run code; give the saved config.yaml instead")
    if given.config_path:
        raise UserError("--config-path: gaplab's own conf/ is needed; add yours with --config-dir")
    if given.config_dir:
        for path in _yaml_files(Path(given.config_dir).expanduser()):
            _check_file(path)
    if given.config_dir or any("hydra.searchpath" in word for word in given.overrides):
        _check_composed(given)


def _yaml_files(folder: Path) -> Iterator[Path]:
    """Every `.yaml` that Hydra could find there; it follows links."""
    seen: set[str] = set()
    count = 0
    for path, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(names):
            if name.endswith(".yaml"):
                count += 1
                if count > MAX_FILES:
                    raise UserError(f"--config-dir: more than {MAX_FILES} .yaml files below {plain(folder)}")
                yield Path(path) / name


def _check_file(path: Path) -> None:
    import yaml

    text = read_text(path)
    check_yaml(text, str(path))
    try:
        raw = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{plain(path)}: cannot be read ({type(error).__name__})") from None
    section = raw.get("hydra") if isinstance(raw, dict) else None
    if section is not None and not (isinstance(section, dict) and section.keys() <= {"sweeper", "launcher"}):
        names = ", ".join(f"hydra.{name}" for name in section) if isinstance(section, dict) else "hydra"
        raise UserError(f"{plain(path)}: sets {plain(names)}; {ALLOWED}")


def _check_composed(given: Any) -> None:
    typed = [word for word in given.overrides if word.lstrip("+~").startswith("hydra")]
    words = [word for word in typed if "hydra.searchpath" not in word]
    own = Path(sys.argv[0]).stem  # as the entry points name theirs
    own = own if (PROJECT / "conf" / f"{own}.yaml").is_file() else "train"
    whole = _hydra(given.config_name or own, given.overrides, given.config_dir, given.multirun)
    usual = [_hydra(name, words, None, given.multirun) for name in (own, None)]  # with gaplab's settings, and without
    if "joblib" in str(whole["launcher"].get("_target_")):  # as gaplab's own claims have it
        words = [word for word in words if not word.startswith("hydra/launcher")]
        usual.append(_hydra(own, [*words, "hydra/launcher=joblib"], None, given.multirun))
    for name, value in whole.items():
        if name == "runtime":  # Hydra's own account of itself, which it writes last
            continue
        if name == "searchpath":
            foreign = bool(value) and not any("hydra.searchpath" in word for word in typed)
        elif name == "overrides":
            foreign = not {*value["task"], *value["hydra"]} <= set(given.overrides)
        else:
            foreign = _fixed(name, value) not in [_fixed(name, one[name]) for one in usual]
        if foreign or (name == "sweeper" and not _is_flat(value.get("params"))):
            raise UserError(f"{plain(given.config_dir or 'hydra.searchpath')}: sets hydra.{plain(name)}; {ALLOWED}")


def _fixed(name: str, value: Any) -> Any:
    """What a folder of configs must leave as it is, of a part of Hydra's section."""
    free = {"sweeper": ("params",), "launcher": ("n_jobs",), "job": ("config_name", "override_dirname")}.get(name, ())
    return {key: one for key, one in value.items() if key not in free} if isinstance(value, dict) else value


def _is_flat(params: Any) -> bool:
    """Hydra builds whatever `_target_` names below its sweeper; words alone name nothing."""
    return params is None or (
        isinstance(params, dict)
        and not any(str(key).startswith("_") for key in params)
        and not any(isinstance(value, dict | list) or "${" in str(value) for value in params.values())
    )


def composed(name: str, given: Any) -> Any:
    """The config that the words of `src/<name>.py` compose, as Hydra parsed them into `given`; without `hydra`."""
    from omegaconf import flag_override

    cfg = _compose(given.config_name or name, given.overrides, given.config_dir, given.multirun)
    with flag_override(cfg, ["struct", "readonly"], [False, False]):
        del cfg["hydra"]
    return cfg


def _hydra(name: str | None, overrides: list[str], folder: str | None, multirun: bool) -> dict[str, Any]:
    """The `hydra` of a composed config, interpolations as they stand."""
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(_compose(name, overrides, folder, multirun).hydra, resolve=False)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _compose(name: str | None, overrides: list[str], folder: str | None, multirun: bool) -> Any:
    from hydra import version
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.types import RunMode

    version.setbase("1.3")
    path = create_config_search_path(f"file://{PROJECT / 'conf'}")
    if folder is not None:
        path.prepend("command-line", f"file://{os.path.abspath(folder)}", SearchPathQuery(provider="schema"))
    loader = ConfigLoaderImpl(path)
    return loader.load_configuration(name, overrides, RunMode.MULTIRUN if multirun else RunMode.RUN)
