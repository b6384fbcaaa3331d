#!/usr/bin/env bash
# Guess: a field typed str takes what was typed, letter by letter: version=1.10 is '1.10'.
# Truth: the override's grammar reads a number first, and the number is turned into text: '1.10' becomes '1.1',
#   '1e3' becomes '1000.0', '007' stays, '1_000' becomes '1000'. Two overrides that differ may be one value; quotes
#   within the shell's quotes keep the text.
# Seen with: hydra-core 1.3.8, omegaconf 2.3.1, CPython 3.11.
# Source: Hydra's documentation, 'Extended Override syntax', primitives; omegaconf's StringNode converts floats.
# Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check hydra-core==1.3.8 omegaconf==2.3.1

cat > "$folder/expected" <<'EXPECTED'
version=1.10     '1.1'
version=1e3      '1000.0'
version=007      '007'
version=1_000    '1000'
version='1.10'   '1.10'
EXPECTED

cd "$folder"
env/bin/python - > seen <<'PYTHON'
from dataclasses import dataclass

from hydra import compose, initialize
from hydra.core.config_store import ConfigStore


@dataclass
class Config:
    version: str = ""


ConfigStore.instance().store("config", Config)
with initialize(version_base="1.3", config_path=None):
    for typed in ("1.10", "1e3", "007", "1_000", "'1.10'"):
        print(f"version={typed}".ljust(16), repr(compose("config", [f"version={typed}"]).version))
PYTHON
diff expected seen
cat seen
