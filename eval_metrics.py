"""Score the newest run of each method under runs/, from the predictions it recorded.

python eval_metrics.py [RUN ...]
"""

import argparse
import sys
from pathlib import Path

from lora.errors import LoraError
from lora.finetune.data.corpus import read_predictions
from lora.finetune.metrics import score
from lora.finetune.record import summary_of
from lora.finetune.trained import newest_runs

if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    try:
        for run in flags.parse_args().runs or newest_runs():
            found = score(summary_of(run)["task"], *read_predictions(run / "predictions.jsonl"))
            print(run, *(f"{name} {value:.4f}" for name, value in found.items()))
    except LoraError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
