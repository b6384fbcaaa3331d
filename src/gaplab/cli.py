"""What a command line owes a person: every failure is one line on stderr and a status that is not 0.

0 done; 1 the run failed; 2 something that was typed or given is wrong; 130 Ctrl-C, 141 the
output is read no longer, 143 SIGTERM. With HYDRA_FULL_ERROR=1 the traceback is shown as well.
"""

import atexit
import codecs
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from gaplab import config as configs
from gaplab import interrupt, launch, torchrun
from gaplab.config import PROJECT, describe, did_you_mean
from gaplab.errors import TrainingError, UserError
from gaplab.files import plain
from gaplab.foreign import check_words, composed
from gaplab.machine import from_here

FULL_ERROR = "HYDRA_FULL_ERROR"
LONGEST = 2000  # characters of a message; what was typed may be longer, and stands in front of what is allowed
UNREAD = 141  # as of a process that SIGPIPE ends
NEEDED = ("hydra", "omegaconf", "torch", "torchvision", "lightning", "torchmetrics", "rich")
ASCII = str.maketrans({"×": "x", "±": "+-", "−": "-", "–": "-", "…": "...", "≤": "<=", "≥": ">="})
FUNCTION = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag|str|int|float|bool)\(.*\)")  # of Hydra's overrides
HELP = {
    "train": """\
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

A name or a path is taken as it is typed, spaces and brackets included; quote what your shell would change. With -m, a
comma separates values: a path with a comma needs quotes of its own, as in 'data.root="/my,data"'.

Choose one of each group with group=option:

{groups}

Change any key with key=value:

{keys}""",
    "report": """\
gaplab: what a sweep says, as tables, figures, verdicts and one HTML page.

  python src/report.py                                     the newest sweep
  python src/report.py sweep=<folder>                      another one; a list for several: 'sweep=[<a>,<b>]'
  python src/report.py sweep=<run id>                      one in MLflow, by the id of its run
  python src/report.py 'runs=[<folder>,<run id>]'          a hand-picked set of runs

Change any key with key=value:

{keys}""",
    "evaluate": """\
gaplab: evaluate a trained network on every sample of a split, with intervals, recall and calibration.

  python src/evaluate.py run=latest                        the newest run on its test split
  python src/evaluate.py run=<folder> split=valid          another run, another split
  python src/evaluate.py run=latest data=fashion_mnist     other data of the same shape
  python src/evaluate.py run=<a> against=<b>               two runs on the same samples: McNemar's test
  python src/evaluate.py model=models:/gaplab@champion     a model of the registry

Change any key with key=value:

{keys}""",
    "predict": """\
gaplab: say what is on pictures.

  python src/predict.py run=latest images=photo.png                  the three most probable classes
  python src/predict.py run=latest images=<folder>                   every picture in a folder
  python src/predict.py run=latest 'images=photos/*.png' format=csv  a pattern; a line for each, for other programs
  ls photos/*.png | python src/predict.py run=latest images=-        names on stdin
  python src/predict.py model=models:/gaplab@champion images=photo.png

Pictures should look like those that it was trained on: MNIST's digits are white on black, and fill the picture.

Change any key with key=value:

{keys}""",
    "promote": """\
gaplab: the versions of the model in MLflow's registry, and which of them is champion.

  python src/promote.py                                    list the versions
  python src/promote.py run=latest                         register a run's model; champion if it passes the gate
  python src/promote.py version=3                          judge a version once more
  python src/promote.py version=3 force=true               make it champion whatever the gate says
  python src/promote.py rollback=true                      the champion before this one is champion again

Change any key with key=value:

{keys}""",
    "serve": """\
gaplab: a model of the registry behind HTTP, on this machine alone; docs/serving.md says how to call it.

  python src/serve.py                                      the champion, on http://127.0.0.1:5001
  python src/serve.py model=models:/gaplab/3 port=8080     another version, another port

Change any key with key=value:

{keys}""",
    "sync": """\
gaplab: send to MLflow what it does not have yet, because its server was away while a run or a sweep went on.

  python src/sync.py                                       all in outputs/runs and outputs/sweeps
  python src/sync.py paths.outputs=<folder>                those of another folder

Nothing is sent twice; runs that are still going send for themselves.

Change any key with key=value:

{keys}""",
    "ui": """\
gaplab: MLflow's pages for the runs on this machine, and for it alone.

  python src/ui.py                                         on http://127.0.0.1:5000; prints where to look first
  python src/ui.py port=5001 paths.outputs=<folder>        another port, another folder of runs

Change any key with key=value:

{keys}""",
}
READERS: dict[str, Callable[..., Any]] = {
    "train": configs.from_hydra,
    "report": configs.report_from_hydra,
    "evaluate": configs.evaluate_from_hydra,
    "predict": configs.predict_from_hydra,
    "promote": configs.promote_from_hydra,
    "serve": configs.serve_from_hydra,
    "sync": configs.sync_from_hydra,
    "ui": configs.ui_from_hydra,
}
SHOW_TRACEBACK = os.environ.get(FULL_ERROR) == "1"
_status = 1  # of a traceback, which alone does not pass through `_leave`
_jobs = 0  # that Hydra has started


def command(name: str) -> Callable[[Callable[[Any, list[str]], None]], Callable[[], NoReturn]]:
    """Make a function of the checked settings and the typed overrides the command `src/<name>.py`, which ends the
    process with its status."""

    def decorated(task: Callable[[Any, list[str]], None]) -> Callable[[], NoReturn]:
        @wraps(task)  # by which Hydra finds the script, and beside it conf/
        def job(cfg: Any) -> None:
            global _jobs
            _jobs += 1
            try:
                task(read(name, cfg, launch.overrides()), launch.overrides())
            except Exception as error:  # Hydra would print the overrides first
                if SHOW_TRACEBACK or isinstance(error, BrokenPipeError):
                    raise
                sys.exit(report(error))

        return lambda: run(lambda: _obey(name, job))

    return decorated


def run(main: Callable[[], Any]) -> NoReturn:
    """Call `main` and exit with its status."""
    atexit.register(_skip_teardown)
    _print_in_any_encoding()
    os.environ[FULL_ERROR] = "1"  # Hydra then raises instead of printing in its own way
    os.environ["MPLBACKEND"] = "agg"  # gaplab opens no window; an unknown name there fails the import of matplotlib
    try:
        with interrupt.handled():
            main()
    except BrokenPipeError:
        _leave(UNREAD)
    except Exception as error:
        if SHOW_TRACEBACK:
            raise
        _leave(report(error))
    except interrupt.Interrupted as stop:
        with suppress(OSError):
            if not torchrun.is_follower():
                print("interrupted", file=sys.stderr, flush=True)
        _leave(stop.exit_status)
    except SystemExit as end:
        if not isinstance(end.code, int | None):  # Python prints it
            raise
        _leave(end.code or 0)
    _leave(0)


def _obey(name: str, job: Callable[[Any], None]) -> None:
    """What `src/<name>.py` does with its command line."""
    _check_environment(name)
    import hydra
    from hydra._internal.utils import get_args_parser

    configs.register()
    parser = get_args_parser()
    parser.error = _refuse_word  # type: ignore[assignment]
    given = parser.parse_intermixed_args()
    options = [word for word in sys.argv[1:] if word not in given.overrides]
    if name == "train":
        given.overrides += torchrun.overrides_of_outside(given.overrides, given.multirun)
        if torchrun.is_follower():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open for the whole process)
    given.overrides = [as_hydra_reads(word, name, given.multirun) for word in given.overrides]
    sys.argv[1:] = words = given.overrides + options  # apart, for Hydra; and not into a last --info, as its value
    check_words(words)
    if given.help:
        print(help_text(name, given))
        return
    if given.cfg in ("job", "all") or given.info in ("config", "all"):
        read(name, composed(name, given), given.overrides)
    hydra.main(version_base="1.3", config_path="../conf", config_name=name)(job)()
    if given.multirun and name != "train" and not _jobs:
        raise UserError(f"{' '.join(given.overrides)}: no value in it, so there is nothing to do")


def read(name: str, cfg: Any, typed: list[str]) -> Any:
    """The checked settings of a command, as far as they can be checked before anything heavy is imported. Raises
    UserError."""
    settings = READERS[name](cfg, typed)
    if name == "train":
        launch.refuse(settings, typed)
    elif getattr(settings, "data", None) is not None:
        launch.check_root(settings.data)
    return settings


def _refuse_word(message: str) -> NoReturn:
    raise UserError(f"{message}; --help shows what can be typed, --hydra-help Hydra's own options")


def _check_environment(name: str) -> None:
    needed = [*NEEDED]
    needed += ["scipy", "statsmodels", "matplotlib"] if name in ("report", "evaluate", "promote") else []
    needed += ["mlflow"] if name in ("promote", "serve", "sync", "ui") else []
    missing = next((one for one in needed if find_spec(one) is None), None)
    if missing is None:
        return
    python = PROJECT / ".venv" / "bin" / "python"
    setup = ""
    if not python.exists() or Path(sys.prefix) == PROJECT / ".venv":
        setup = f"run {shlex.join(['make', *([] if Path.cwd() == PROJECT else ['-C', str(PROJECT)]), 'setup'])}, then "
    again = shlex.join([from_here(python), from_here(PROJECT / "src" / f"{name}.py"), *sys.argv[1:]])
    raise UserError(f"{sys.executable} has no {missing}; {setup}{again}")


def _print_in_any_encoding() -> None:
    """A character that the terminal does not know must not end a run: it is written in ASCII. Children do likewise."""
    codecs.register_error(
        "gaplab",
        lambda error: (
            (_in_ascii(error), error.end) if isinstance(error, UnicodeEncodeError) else codecs.strict_errors(error)
        ),
    )
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # there is none where it was closed before the start
            stream.reconfigure(errors="gaplab")
            if not stream.encoding.lower().startswith("utf"):
                os.environ["PYTHONIOENCODING"] = f"{stream.encoding}:backslashreplace"


def _in_ascii(error: UnicodeEncodeError) -> str:
    return error.object[error.start : error.end].translate(ASCII).encode("ascii", "backslashreplace").decode()


def as_hydra_reads(word: str, name: str, multirun: bool = False) -> str:
    """A word of the command line in Hydra's grammar: free text is quoted where Hydra would read something else.

    Names, paths and addresses are taken as they were typed: `data.root=/home/José/a (1)`, `run=…/0_model.bn=true`,
    `name=5.10`. Lists, functions such as `choice(a,b)`, null, `${…}` and what is quoted already stay as they are; so
    does a comma under -m, where it separates values. `model=…` of a command that loads a model becomes `model_uri=…`.

    Raises UserError for a number that is no truth value, which OmegaConf would take for true.
    """
    kinds = configs.kinds(configs.COMMANDS[name])
    key, equals, value = word.partition("=")
    if key == "model" and "model_uri" in kinds:
        key, word = "model_uri", f"model_uri={value}"
    bare = key.lstrip("+")
    kind = "text" if bare.startswith("tracking.tags.") and "tracking.tags" in kinds else kinds.get(bare)
    if kind == "bool":
        _check_bool(word, value)
    if kind not in ("text", "texts") or not equals or value.lower() in ("", "null") or FUNCTION.fullmatch(value):
        return word
    if "${" in value or value[0] in ("'", '"') or (kind == "texts" and value[0] + value[-1] == "[]"):
        return word
    if multirun:
        from gaplab.sweep import NOT_SWEPT
    swept = multirun and not bare.startswith(NOT_SWEPT)
    return f"{key}={','.join(map(_as_text, value.split(',') if swept else [value]))}"


def _as_text(value: str) -> str:
    """`value`, quoted unless Hydra reads just this text from it anyway."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    with suppress(HydraException):
        if OverridesParser.create().parse_override(f"key={value}").value() == value:
            return value
    escaped = re.sub(r"(\\+)$", r"\1\1", re.sub(r'(\\*)"', r"\1\1\"", value))
    return f'"{escaped}"'


def _check_bool(word: str, value: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not re.search("[0-9]", value):
        return
    with suppress(HydraException):  # Hydra will say so
        override = OverridesParser.create().parse_override(word)
        values = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
        if any(isinstance(one, int) and one not in (0, 1) for one in values):
            raise UserError(f"{word}: must be true or false")


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
        status = status or UNREAD
    os._exit(status)


def help_text(name: str, given: Any) -> str:
    """What can be typed: the groups, and each key of the config that the words `given` compose. Hydra's own takes
    seconds."""
    settings = READERS[name](composed(name, given), given.overrides)
    keys = "\n".join(f"  {line}" for line in describe(settings))
    folders = sorted(path for path in (PROJECT / "conf").iterdir() if path.is_dir() and path.name != "hydra")
    groups = [f"  {one.name:11} {', '.join(sorted(path.stem for path in one.glob('*.yaml')))}" for one in folders]
    return HELP[name].format(groups="\n".join(groups), keys=keys)


def report(error: Exception) -> int:
    """Print `error` as one line; the exit status for it."""
    if not torchrun.is_follower():
        print(f"error: {plain(explain(error))}", file=sys.stderr)
    elif os.environ["LOCAL_RANK"] == "0":  # of another machine than the first rank's, which may lack what that one has
        print(f"error: rank {os.environ['RANK']}: {plain(explain(error))}", file=sys.stderr)
    else:  # torchrun ends all ranks with the first that ends, which must not be before the one that speaks
        time.sleep(torchrun.SPEAKING_S)
    return 1 if isinstance(error, TrainingError) else 2


def explain(error: BaseException) -> str:
    """One line for any error, in the words of the config keys where it came from composing the config."""
    line = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in _words_for(error))
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"


def _words_for(error: BaseException) -> str:
    if isinstance(error, UserError | TrainingError):
        return str(error)
    from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        options = [option for option in error.options if option != "schema"]
        return f"{group}={choice}: {did_you_mean(choice, options)}choose one of {', '.join(options)}"
    if isinstance(error, OverrideParseException):
        key, _, value = (error.override or "").partition("=")
        quoted = f": {shlex.quote(f'{key}={_as_text(value)}')}" if value and not FUNCTION.fullmatch(value) else ""
        return f"{error.override}: not understood; expected key=value, quoted where Hydra or the shell needs it{quoted}"
    if place := re.search(r"raised while composing config:\s*Key '(.+)' not in 'Config'", str(error)):
        return f"@{place[1]}: no such part of the config; a group goes to its own, as model=cnn to model"
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
    if isinstance(error, ConfigCompositionException):
        return _first_line(error)
    if isinstance(error, ValueError) and "onfig group override" in str(error):
        return f"a config group takes the name of one of its choices: {_first_line(error)}"
    if isinstance(error, OSError | ModuleNotFoundError):
        return str(error)
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    """And the second, where the first only announces it."""
    first, _, rest = str(error).strip().partition("\n")
    return f"{first} {rest.strip().partition(chr(10))[0]}" if first.endswith(":") else first


def _keys(node: Any) -> list[str]:
    return sorted(str(name) for name in (node or {}) if not str(name).startswith("_") and name != "hydra")
