"""Draw the curves of the newest run of each method under runs/, from the metrics it recorded.

python plot_metrics.py [RUN ...]     the pictures go to plots/
"""

import argparse
import sys
from pathlib import Path

from lora.errors import LoraError
from lora.finetune.plots import draw_curves
from lora.finetune.trained import newest_runs

if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    try:
        for picture in draw_curves(flags.parse_args().runs or newest_runs(), Path("plots")):
            print(picture)
    except LoraError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
