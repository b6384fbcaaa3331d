"""What a command line owes a person: every failure is one line on stderr and a status that is not 0.

0 done; 1 the run failed; 2 something that was typed or given is wrong; 130 Ctrl-C, 143 SIGTERM. With HYDRA_FULL_ERROR=1
the traceback is shown as well.
"""

import atexit
import logging
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, NoReturn

from gaplab import interrupt
from gaplab.config import (
    PROJECT,
    describe,
    did_you_mean,
    evaluate_from_hydra,
    from_hydra,
    predict_from_hydra,
    promote_from_hydra,
    report_from_hydra,
    serve_from_hydra,
    sync_from_hydra,
    ui_from_hydra,
)
from gaplab.errors import TrainingError, UserError
from gaplab.files import plain
from gaplab.foreign import check_words

FULL_ERROR = "HYDRA_FULL_ERROR"
LONGEST = 2000  # characters of a message; what was typed may be longer, and stands in front of what is allowed
HELP = """\
gaplab: train an image classifier and measure its overfitting gap, with an interval.

  python src/train.py model.bn=true                        one run, BatchNorm on
  python src/train.py model=cnn model.dropout=0.5 seed=1   another network, dropout, seed
  python src/train.py experiment=baseline                  a shipped experiment
  python src/train.py -m model.bn=false,true 'seed=range(6)'   every combination; then python src/report.py
  python src/train.py -m claim=overfitting                 a claim: its grid, for a verdict
  python src/train.py resume=latest                        go on with a stopped or crashed run
  python src/train.py --cfg job                            print the composed config, run nothing
  python src/train.py model=resnet --help                  the keys of another choice
  python src/train.py --hydra-help                         Hydra's own options

Choose one of each group with group=option:

{groups}

Change any key with key=value:

{keys}"""
REPORT_HELP = """\
gaplab: what a sweep says, as tables, figures, verdicts and one HTML page.

  python src/report.py                                     the newest sweep
  python src/report.py sweep=<folder>                      another one; a list for several: 'sweep=[<a>,<b>]'
  python src/report.py sweep=<run id>                      one in MLflow, by the id of its run
  python src/report.py 'runs=[<folder>,<run id>]'          a hand-picked set of runs

Change any key with key=value:

{keys}"""
EVALUATE_HELP = """\
gaplab: evaluate a trained network on every sample of a split, with intervals, recall and calibration.

  python src/evaluate.py run=latest                        the newest run on its test split
  python src/evaluate.py run=<folder> split=valid          another run, another split
  python src/evaluate.py run=latest data=fashion_mnist     other data of the same shape
  python src/evaluate.py run=<a> against=<b>               two runs on the same samples: McNemar's test
  python src/evaluate.py model=models:/gaplab@champion     a model of the registry

Change any key with key=value:

{keys}"""
PREDICT_HELP = """\
gaplab: say what is on pictures.

  python src/predict.py run=latest images=photo.png                  the three most probable classes
  python src/predict.py run=latest images=<folder>                   every picture in a folder
  python src/predict.py run=latest 'images=photos/*.png' format=csv  a pattern; a line for each, for other programs
  ls photos/*.png | python src/predict.py run=latest images=-        names on stdin
  python src/predict.py model=models:/gaplab@champion images=photo.png

Pictures should look like those that it was trained on: MNIST's digits are white on black, and fill the picture.

Change any key with key=value:

{keys}"""
PROMOTE_HELP = """\
gaplab: the versions of the model in MLflow's registry, and which of them is champion.

  python src/promote.py                                    list the versions
  python src/promote.py run=latest                         register a run's model; champion if it passes the gate
  python src/promote.py version=3                          judge a version once more
  python src/promote.py version=3 force=true               make it champion whatever the gate says
  python src/promote.py rollback=true                      the champion before this one is champion again

Change any key with key=value:

{keys}"""
SERVE_HELP = """\
gaplab: a model of the registry behind HTTP, on this machine alone; docs/serving.md says how to call it.

  python src/serve.py                                      the champion, on http://127.0.0.1:5001
  python src/serve.py model=models:/gaplab/3 port=8080     another version, another port

Change any key with key=value:

{keys}"""
SYNC_HELP = """\
gaplab: send to MLflow what it does not have yet, because its server was away while a run or a sweep went on.

  python src/sync.py                                       all in outputs/runs and outputs/sweeps
  python src/sync.py paths.outputs=<folder>                those of another folder

Nothing is sent twice; runs that are still going send for themselves.

Change any key with key=value:

{keys}"""
UI_HELP = """\
gaplab: MLflow's pages for the runs on this machine, and for it alone.

  python src/ui.py                                         on http://127.0.0.1:5000; prints where to look first
  python src/ui.py port=5001 paths.outputs=<folder>        another port, another folder of runs

Change any key with key=value:

{keys}"""
_status = 1  # of a traceback, which alone does not pass through `_leave`
SHOW_TRACEBACK = os.environ.get(FULL_ERROR) == "1"


def run(main: Callable[[], Any], help_text: Callable[[list[str]], str], paths: tuple[str, ...] = ()) -> None:
    """Call a `hydra.main` function and exit with its status.

    Args:
        main: the function.
        help_text: of the overrides, the answer to --help.
        paths: keys whose values are file names or addresses, which Hydra then takes as they are. If `model_uri` is one,
            it may be typed as `model`, which Hydra takes for the config group of that name.
    """
    sys.argv[1:] = [as_hydra_reads(word, paths) for word in sys.argv[1:]]
    atexit.register(_skip_teardown)
    os.environ[FULL_ERROR] = "1"  # Hydra then raises instead of printing in its own way
    os.environ["MPLBACKEND"] = "agg"  # gaplab opens no window; an unknown name there fails the import of matplotlib
    words = sys.argv[1:]
    try:
        with interrupt.handled():
            if {"--help", "-h"} & set(words):
                print(help_text([word for word in words if not word.startswith("-")]))
            else:
                check_words(words)
                main()
    except Exception as error:
        if SHOW_TRACEBACK:
            raise
        _leave(report(error))
    except interrupt.Interrupted as stop:
        with suppress(OSError):
            print("interrupted", file=sys.stderr, flush=True)
        _leave(stop.exit_status)
    except SystemExit as end:
        if not isinstance(end.code, int | None):  # Python prints it
            raise
        _leave(end.code or 0)
    _leave(0)


def as_hydra_reads(word: str, paths: tuple[str, ...]) -> str:
    """`images=a (1).png` as Hydra wants it, `images='a (1).png'`, and `model=…` as `model_uri=…`; see `run`. Lists and
    what is quoted already stay."""
    name, equals, value = word.partition("=")
    if name == "model" and "model_uri" in paths:
        name, word = "model_uri", f"model_uri={value}"
    if not equals or name not in paths or value[:1] in ("'", '"') or value[:1] + value[-1:] == "[]":
        return word
    if not set(value) & set("(){}[]~;&'\"\\,"):
        return word
    escaped = re.sub(r"(\\*)'", r"\1\1\'", value)
    return f"{name}='{escaped}'"


def _leave(status: int) -> NoReturn:
    global _status
    _status = status
    sys.exit(status)


def _skip_teardown() -> None:
    """End the process without taking modules apart: with torch, that costs a second and 100 MB.

    Registered first, this runs last of what Python does at exit: threads and their pools have ended, all others were
    called that were registered since.
    """
    logging.shutdown()
    status = _status
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # closed before the start
                stream.flush()
    except OSError:  # nobody reads any more
        status = status or 120
    os._exit(status)


def train_help(overrides: list[str]) -> str:
    """What can be typed: the groups, and each key of the config that `overrides` compose. Hydra's own takes seconds."""
    folder = PROJECT / "conf"
    groups = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "hydra")
    choices = [f"  {group.name:11} {', '.join(sorted(path.stem for path in group.glob('*.yaml')))}" for group in groups]
    return HELP.format(groups="\n".join(choices), keys=_keys_of(from_hydra(_compose("train", overrides), overrides)))


def report_help(overrides: list[str]) -> str:
    """What can be typed, as in `train_help`."""
    return REPORT_HELP.format(keys=_keys_of(report_from_hydra(_compose("report", overrides))))


def sync_help(overrides: list[str]) -> str:
    """What can be typed, as in `train_help`."""
    return SYNC_HELP.format(keys=_keys_of(sync_from_hydra(_compose("sync", overrides))))


def ui_help(overrides: list[str]) -> str:
    """What can be typed, as in `train_help`."""
    return UI_HELP.format(keys=_keys_of(ui_from_hydra(_compose("ui", overrides))))


def evaluate_help(overrides: list[str]) -> str:
    """What can be typed, as in `train_help`."""
    return EVALUATE_HELP.format(keys=_keys_of(evaluate_from_hydra(_compose("evaluate", overrides), overrides)))


def predict_help(overrides: list[str]) -> str:
    """What can be typed, as in `train_help`."""
    return PREDICT_HELP.format(keys=_keys_of(predict_from_hydra(_compose("predict", overrides), overrides)))


def promote_help(overrides: list[str]) -> str:
    """What can be typed, as in `train_help`."""
    return PROMOTE_HELP.format(keys=_keys_of(promote_from_hydra(_compose("promote", overrides), overrides)))


def serve_help(overrides: list[str]) -> str:
    """What can be typed, as in `train_help`."""
    return SERVE_HELP.format(keys=_keys_of(serve_from_hydra(_compose("serve", overrides))))


def _compose(name: str, overrides: list[str]) -> Any:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        return compose(name, overrides)


def _keys_of(config: Any) -> str:
    return "\n".join(f"  {line}" for line in describe(config))


def job(task: Callable[[Any], None]) -> Callable[[Any], None]:
    """Let a single run end by `report`."""

    @wraps(task)
    def guarded(cfg: Any) -> None:
        try:
            task(cfg)
        except Exception as error:  # Hydra would print the overrides first
            if SHOW_TRACEBACK:
                raise
            sys.exit(report(error))

    return guarded


def report(error: Exception) -> int:
    """Print `error` as one line; the exit status for it."""
    print(f"error: {plain(explain(error))}", file=sys.stderr)
    return 1 if isinstance(error, TrainingError) else 2


def explain(error: BaseException) -> str:
    """One line for any error, in the words of the config keys where it came from composing the config."""
    line = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in _words_for(error))
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"


def _words_for(error: BaseException) -> str:
    from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        options = [option for option in error.options if option != "schema"]
        return f"{group}={choice}: {did_you_mean(choice, options)}choose one of {', '.join(options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not understood; expected key=value, quoted where the shell needs it"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        parent, known = cause.full_key.rpartition(".")[0], _keys(cause.parent_node)
        if parent.endswith((".tags", ".kwargs")):
            return f"{cause.full_key}: not there yet; add it with a plus sign, +{cause.full_key}=…"
        where = f" in {parent}" if parent else ""
        return f"{cause.full_key}: no such key{where}; {did_you_mean(cause.key, known)}known: {', '.join(known)}"
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: {_first_line(cause)}" if cause.full_key else _first_line(cause)
    if isinstance(error, UserError | TrainingError):
        return str(error)
    if isinstance(error, ConfigCompositionException):
        return _first_line(error)
    if isinstance(error, ValueError) and "onfig group override" in str(error):
        return f"a config group takes the name of one of its choices: {_first_line(error)}"
    if isinstance(error, OSError):
        return str(error)
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    """And the second, where the first only announces it."""
    first, _, rest = str(error).strip().partition("\n")
    return f"{first} {rest.strip().partition(chr(10))[0]}" if first.endswith(":") else first


def _keys(node: Any) -> list[str]:
    return sorted(str(name) for name in (node or {}) if not str(name).startswith("_") and name != "hydra")
