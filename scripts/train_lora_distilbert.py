"""LoRA on DistilBERT: the first version's command, a thin door over `lora train`."""

import sys

from first_version import parser, train

if __name__ == "__main__":
    flags = parser("Fine-tune DistilBERT on SST-2 with LoRA on q_lin and v_lin.")
    flags.add_argument("--r", type=int, default=4, help="rank")
    flags.add_argument("--alpha", type=float, default=8, help="numerator of the scaling alpha / r")
    flags.add_argument("--dropout", type=float, default=0.0)
    given = flags.parse_args()
    sys.exit(
        train(
            given,
            *("--method", "lora", "--target-modules", "q_lin", "v_lin"),
            *("--r", str(given.r), "--lora-alpha", str(given.alpha)),
            *("--lora-dropout", str(given.dropout)),
        )
    )
