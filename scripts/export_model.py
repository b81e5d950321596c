"""A run's newest checkpoint => its averaged weights alone, as the package ships them.

python scripts/export_model.py runs/emoji ldm_jax/weights/emoji
"""

import argparse

from ldm_jax.models import WEIGHTS_FILE, export_model, load_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("run", help="a workdir of train.py")
parser.add_argument("out", help="folder to write")
parser.add_argument("--dtype", default="float16")
arguments = parser.parse_args()
folder = export_model(load_model(arguments.run), arguments.out, arguments.dtype)
print(f"{folder}: {(folder / WEIGHTS_FILE).stat().st_size / 2**20:.2f} MiB of weights")
