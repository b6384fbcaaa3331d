"""What a variable that happens to be set changes of what goes to MLflow."""

import http.server
import os
import threading
import urllib.request

import pytest

from gaplab.tracking.environment import FIXED, HONOURED, of_child, settle, settled

KEPT = (
    "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_AWS_SIGV4", "MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH", "MLFLOW_WORKSPACE", "MLFLOW_HTTP_REQUEST_TIMEOUT",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_S3_ENDPOINT_URL", "MLFLOW_S3_IGNORE_TLS",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT", "MLFLOW_ENABLE_MULTIPART_UPLOAD",
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE", "MLFLOW_MYSQL_SSL_CA",
    "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE", "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW",
)  # fmt: skip
REMOVED = (
    "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_READ_REPLICA_BACKEND_STORE_URI", "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_ACTIVE_MODEL_ID", "_MLFLOW_ACTIVE_MODEL_ID",
    "MLFLOW_RUN_CONTEXT", "MLFLOW_ENABLE_ASYNC_LOGGING", "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS",
    "MLFLOW_TRUNCATE_LONG_VALUES", "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "MLFLOW_ENABLE_WORKSPACES",
    "MLFLOW_LOCK_MODEL_DEPENDENCIES", "MLFLOW_LOG_UV_FILES", "MLFLOW_SQLALCHEMYSTORE_ECHO", "MLFLOW_LOGGING_LEVEL",
    "MLFLOW_CREATE_MODEL_VERSION_SOURCE_VALIDATION_REGEX", "MLFLOW_SERVER_ALLOWED_HOSTS",
    "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE", "MLFLOW_ALLOW_FILE_STORE",
)  # fmt: skip
OF_THE_COMMAND_LINE = ("MLFLOW_BACKEND_STORE_URI", "MLFLOW_STATIC_PREFIX", "MLFLOW_HOST", "MLFLOW_ARTIFACTS_ONLY")


def test_of_mlflows_variables_credentials_and_timeouts_are_kept_and_nothing_else():
    import mlflow.environment_variables

    theirs = {
        one.name for one in vars(mlflow.environment_variables).values() if isinstance(getattr(one, "name", 0), str)
    }
    assert theirs.issuperset([*KEPT, *REMOVED])
    given = dict.fromkeys([*theirs, *OF_THE_COMMAND_LINE], "x") | {"AWS_PROFILE": "mine"}
    left = settled(given)
    assert left.items() >= {**dict.fromkeys(KEPT, "x"), "AWS_PROFILE": "mine", **FIXED}.items()
    assert not left.keys() & {*REMOVED, *OF_THE_COMMAND_LINE}
    assert all(name in FIXED or HONOURED.fullmatch(name) for name in left if name.lstrip("_").startswith("MLFLOW_"))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "corp.com, localhost"}, "corp.com,localhost,127.0.0.1,::1"),
        ({"no_proxy": "*", "NO_PROXY": "other"}, "*"),
    ],
)
def test_this_machine_is_reached_without_a_proxy(given: dict[str, str], wanted: str):
    assert [settled(given)[name] for name in ("no_proxy", "NO_PROXY")] == [wanted] * 2


def test_a_user_without_a_home_gets_one(monkeypatch, tmp_path):
    def no_entry(uid: int) -> None:
        raise KeyError(uid)

    assert "HOME" not in settled({})  # of a user with a name, who is found by it
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert settled({})["HOME"] == str(tmp_path)


def test_a_proxy_does_not_stand_before_a_server_of_this_machine(monkeypatch):
    environment = os.environ.copy() | {"http_proxy": "http://127.0.0.1:9", "MLFLOW_REGISTRY_URI": "x"}
    for name in ("no_proxy", "NO_PROXY"):
        environment.pop(name, None)
    monkeypatch.setattr(os, "environ", environment)
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    settle()
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/", timeout=5) as answer:
        assert answer.status == 200
    thread.join()
    server.server_close()
    assert "MLFLOW_REGISTRY_URI" not in environment
    assert of_child()["http_proxy"] == "http://127.0.0.1:9"  # everything else still goes through it
