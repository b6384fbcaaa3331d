#!/usr/bin/env bash
# Guess: a one-sample t test of twenty equal values against that very value has nothing to find: p = 1, or NaN for a
#   spread of 0.
# Truth: the mean of twenty times 0.1 is off by a last bit, and so is every deviation from it; t is the ratio of two
#   rounding errors, sqrt(n - 1), and p = 0.0003. With 0.5, whose sums are exact, it is NaN. Paired differences of a
#   metric that never changed look highly significant.
# Seen with: scipy 1.17.1, numpy 2.4.6, CPython 3.11.
# Source: scipy.stats.ttest_1samp; its documentation promises a RuntimeWarning for near-identical data, not another
#   result.
# Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check scipy==1.17.1 numpy==2.4.6

cat > "$folder/expected" <<'EXPECTED'
twenty times 0.1 against 0.1: t = 4.359, p = 0.0003
twenty times 0.7 against 0.7: t = -4.359, p = 0.0003
twenty times 0.5 against 0.5: t = nan, p = nan
EXPECTED

cd "$folder"
env/bin/python - > seen <<'PYTHON'
import warnings

from scipy.stats import ttest_1samp

warnings.simplefilter("ignore")
for value in (0.1, 0.7, 0.5):
    found = ttest_1samp([value] * 20, value)
    print(f"twenty times {value} against {value}: t = {found.statistic:.3f}, p = {found.pvalue:.4f}")
PYTHON
diff expected seen
cat seen
