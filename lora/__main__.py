"""`python -m lora` is `lora`."""

import sys

from lora.finetune.cli import main

sys.exit(main())
