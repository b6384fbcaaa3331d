#!/usr/bin/env bash
# Guess: an Adam that loads the state of an AdamW takes the moments and stays Adam: weight decay is added to the
#   gradient.
# Truth: load_state_dict brings a parameter-group entry, decoupled_weight_decay=True, along; from then on the Adam
#   decays weights as AdamW does. Its repr is the only sign. A run that changes its optimizer between two resumes
#   compares AdamW with AdamW.
# Seen with: torch 2.15.0, CPython 3.11.
# Source: torch/optim/adamw.py, where AdamW is a subclass of Adam that sets decoupled_weight_decay, and
#   Optimizer.load_state_dict.
# Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6

cat > "$folder/expected" <<'EXPECTED'
fresh                    Adam 0.9
after AdamW's state dict Adam 0.99
EXPECTED

cd "$folder"
env/bin/python - > seen <<'PYTHON'
import torch


def step_of(load):
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.Adam([weight], lr=0.1, weight_decay=0.1)
    if load:
        optimizer.load_state_dict(torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1).state_dict())
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return type(optimizer).__name__, round(weight.item(), 6)


print("fresh                   ", *step_of(load=False))
print("after AdamW's state dict", *step_of(load=True))
PYTHON
diff expected seen
cat seen
