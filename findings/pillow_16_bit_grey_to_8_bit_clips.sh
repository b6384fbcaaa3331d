#!/usr/bin/env bash
# Guess: converting a 16-bit grey PNG to 8 bits divides by 257, or drops the lower byte.
# Truth: the mode is I;16, and convert('L') as well as convert('RGB') cut every value above 255 to 255: all but the
#   darkest 0.4 % of the range becomes white, without a warning. Loaders that call convert('RGB') on whatever they
#   open, torchvision's ImageFolder among them, train on white pictures.
# Seen with: Pillow 13.0.0, CPython 3.11.
# Source: Pillow's documentation of Image.convert and of modes (I;16 has limited support).
# Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check pillow==13.0.0 numpy==2.4.6

cat > "$folder/expected" <<'EXPECTED'
mode I;16
as stored [0, 255, 256, 4096, 32768, 65535]
L         [0, 255, 255, 255, 255, 255]
RGB, red  [0, 255, 255, 255, 255, 255]
EXPECTED

cd "$folder"
env/bin/python - > seen <<'PYTHON'
import numpy as np
from PIL import Image

Image.fromarray(np.array([[0, 255, 256, 4096, 32768, 65535]], np.uint16)).save("grey.png")
with Image.open("grey.png") as picture:
    print("mode", picture.mode)
    print("as stored", np.asarray(picture).ravel().tolist())
    print("L        ", np.asarray(picture.convert("L")).ravel().tolist())
    print("RGB, red ", np.asarray(picture.convert("RGB"))[..., 0].ravel().tolist())
PYTHON
diff expected seen
cat seen
