"""A run's newest checkpoint => its averaged weights alone, as the package ships them.

python scripts/export_model.py runs/emoji ldm_jax/weights/emoji
python scripts/export_model.py runs/emoji exported --ema=0.08

With --ema they are an average of that sigma_rel, made of the run's snapshots up to the newest.
"""

import argparse

from ldm_jax.exports import export_model
from ldm_jax.models import load_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("run", help="a workdir of train.py")
parser.add_argument("out", help="folder to write")
parser.add_argument("--dtype", default="float16", help="or int8, half the bytes")
parser.add_argument("--file_mib", type=float, help="size of a file at most; default: one file")
parser.add_argument("--step", default="last", help="last, best (held-out loss), a number")
parser.add_argument("--ema", type=float, help="sigma_rel of the average; default: the run's own")
arguments = parser.parse_args()
try:
    model = load_model(arguments.run, arguments.step, arguments.ema)
    most = arguments.file_mib and int(arguments.file_mib * 2**20)
    folder = export_model(model, arguments.out, arguments.dtype, most)
except (ValueError, OSError) as error:
    raise SystemExit(f"export_model.py: {error}") from error
sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
print(f"{folder}: {sum(sizes) / 2**20:.2f} MiB of weights in {len(sizes)} file(s)")
