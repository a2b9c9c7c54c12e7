"""Score the newest run of each method under runs/, from the predictions it recorded.

python eval_metrics.py [RUN ...]
"""

import argparse
import sys
from pathlib import Path

from lora.errors import LoraError
from lora.finetune.class_report import scores_of_file
from lora.finetune.trained import newest_runs

if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    try:
        for run in flags.parse_args().runs or newest_runs():
            found, _ = scores_of_file(run / "predictions.jsonl")
            print(run, *(f"{name} {value:.4f}" for name, value in found.items()))
    except LoraError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
