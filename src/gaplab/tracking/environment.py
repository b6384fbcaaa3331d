"""The environment of each process that works with MLflow: gaplab's config decides what is sent where, and no variable
that happens to be set.

Of MLflow's own variables those in `HONOURED` are kept: credentials, TLS, timeouts and the transfer to an artifact
store. `FIXED` are set, and every other `MLFLOW_…` is removed. docs/faults.md lists both.
"""

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

HONOURED = re.compile(
    r"MLFLOW_(TRACKING_(USERNAME|PASSWORD|TOKEN|AUTH|AWS_SIGV4|INSECURE_TLS|SERVER_CERT_PATH|CLIENT_CERT_PATH)"
    r"|WORKSPACE|HTTP_\w+|ALLOW_HTTP_REDIRECTS|SCORING_SERVER_REQUEST_TIMEOUT"
    r"|(S3|BOTO|GCS|KERBEROS|MULTIPART|MYSQL_SSL|PYARROW)_\w+|ENABLE_(PROXY_)?MULTIPART_\w+"
    r"|ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT|DOWNLOAD_CHUNK_TIMEOUT|PRESIGNED_DOWNLOAD_URL_TTL_SECONDS"
    r"|SQLALCHEMYSTORE_(POOL\w+|MAX_OVERFLOW))"
)
FIXED = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # no request leaves for anyone but the server
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",  # a model may be somebody else's
    "MLFLOW_DEFAULT_PREDICTION_DEVICE": "cpu",  # where models were exported
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
LOOPBACK = ("localhost", "127.0.0.1", "::1")
SOURCE = str(Path(__file__).resolve().parents[2])


def settled(given: Mapping[str, str]) -> dict[str, str]:
    """`given` without what MLflow must not read, and without a proxy between this machine and itself."""
    kept = {name: value for name, value in given.items() if not re.match("_?MLFLOW_", name) or HONOURED.fullmatch(name)}
    excepted = [name.strip() for name in (given.get("no_proxy") or given.get("NO_PROXY") or "").split(",")]
    if excepted != ["*"]:
        excepted = list(dict.fromkeys([*filter(None, excepted), *LOOPBACK]))
    if os.path.expanduser("~") == "~":  # neither HOME nor a passwd entry: MLflow would not start
        kept["HOME"] = tempfile.gettempdir()
    return kept | FIXED | dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(excepted))


def settle() -> None:
    """Make the environment of this process so, before it imports MLflow."""
    wanted = settled(os.environ)
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)


def of_child() -> dict[str, str]:
    """The same for a process that `python -m` starts: gaplab can be imported there, and a file `mlflow.py` in the
    current folder cannot take MLflow's place."""
    path = os.pathsep.join(filter(None, (SOURCE, os.environ.get("PYTHONPATH"))))
    return settled(os.environ) | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
