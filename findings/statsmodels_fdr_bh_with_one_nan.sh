#!/usr/bin/env bash
# Guess: a NaN among p values stays a NaN of its own, as with holm and bonferroni; or all decisions are withheld.
# Truth: with fdr_bh one NaN turns every corrected p value into NaN, yet hypotheses are still rejected: the
#   decisions and the p values contradict each other. hommel gives NaN for all and rejects nothing.
# Seen with: statsmodels 0.15.0, CPython 3.11.
# Source: statsmodels.stats.multitest.multipletests, whose documentation does not mention missing values.
# Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check statsmodels==0.15.0

cat > "$folder/expected" <<'EXPECTED'
holm: p = [0.004, 0.006, nan, 1.0], rejected = [True, True, False, False]
fdr_bh: p = [nan, nan, nan, nan], rejected = [True, True, False, False]
hommel: p = [nan, nan, nan, nan], rejected = [False, False, False, False]
EXPECTED

cd "$folder"
env/bin/python - > seen <<'PYTHON'
from statsmodels.stats.multitest import multipletests

for method in ("holm", "fdr_bh", "hommel"):
    rejected, corrected, *_ = multipletests([0.001, 0.002, float("nan"), 0.5], method=method)
    print(f"{method}: p = {[round(float(p), 4) for p in corrected]}, rejected = {rejected.tolist()}")
PYTHON
diff expected seen
cat seen
