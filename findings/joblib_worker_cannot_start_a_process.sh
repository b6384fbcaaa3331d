#!/usr/bin/env bash
# Guess: a function that joblib runs in its default backend may start a multiprocessing.Process, as any process may.
# Truth: loky sets the start method of its workers, for all of multiprocessing, to one of its own, which can start
#   loky's processes alone: a plain Process ends in AttributeError. What starts processes inside, such as a DataLoader
#   with num_workers, fails in a worker though it works outside. The platform's own method is still to be had by name.
# Seen with: joblib 1.6.0, CPython 3.11 on Linux.
# Source: joblib/externals/loky/backend/context.py, and the worker's call of set_start_method("loky").
# Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check joblib==1.6.0

cat > "$folder/expected" <<'EXPECTED'
outside: ended with 0
in a worker: AttributeError: 'Process' object has no attribute 'env'
in a worker, by the platform's own method: ended with 0
EXPECTED

cat > "$folder/jobs.py" <<'PYTHON'
import multiprocessing


def nothing():
    pass


def start(method=None):
    try:
        kind = multiprocessing.get_context(method).Process if method else multiprocessing.Process
        process = kind(target=nothing)
        process.start()
        process.join()
        return f"ended with {process.exitcode}"
    except AttributeError as error:
        return f"AttributeError: {error}"
PYTHON

cat > "$folder/run.py" <<'PYTHON'
import multiprocessing

from jobs import start
from joblib import Parallel, delayed

if __name__ == "__main__":
    print("outside:", start())
    print("in a worker:", Parallel(2)(delayed(start)() for _ in range(2))[0])
    own = multiprocessing.get_all_start_methods()[0]
    print("in a worker, by the platform's own method:", Parallel(2)(delayed(start)(own) for _ in range(2))[0])
PYTHON

cd "$folder"
env/bin/python run.py > seen
diff expected seen
cat seen
