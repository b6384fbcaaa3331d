#!/usr/bin/env bash
# Guess: logits of NaN are refused (validate_args is True), or count as wrong.
# Truth: argmax takes the place of the first NaN, so a diverged network predicts class 0 throughout and has the
#   accuracy that always answering class 0 has. Nothing is raised or logged.
# Seen with: torchmetrics 1.9.0, torch 2.15.0, CPython 3.11.
# Source: torchmetrics.functional.classification.multiclass_accuracy; torch.argmax, whose documentation does not
#   mention NaN.
# Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.15.0 torchmetrics==1.9.0

cat > "$folder/expected" <<'EXPECTED'
labels [0, 0, 0, 0], all logits NaN: accuracy 1.00
labels [0, 0, 1, 2], all logits NaN: accuracy 0.50
labels [1, 1, 2, 2], all logits NaN: accuracy 0.00
EXPECTED

cd "$folder"
env/bin/python - > seen <<'PYTHON'
import torch
from torchmetrics.classification import MulticlassAccuracy

logits = torch.full((4, 3), float("nan"))
for labels in ([0, 0, 0, 0], [0, 0, 1, 2], [1, 1, 2, 2]):
    accuracy = MulticlassAccuracy(3, average="micro")(logits, torch.tensor(labels))
    print(f"labels {labels}, all logits NaN: accuracy {accuracy:.2f}")
PYTHON
diff expected seen
cat seen
