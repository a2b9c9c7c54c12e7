"""Full fine-tuning of DistilBERT: the first version's command, a thin door over `lora train`."""

import sys

from first_version import parser, train

if __name__ == "__main__":
    flags = parser("Fine-tune all of DistilBERT on SST-2.")
    sys.exit(train(flags.parse_args(), "--method", "full"))
