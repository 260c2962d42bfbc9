"""guardsmith: harden a Stable Diffusion checkpoint against personalization on protected subjects, and prove it."""

import logging

__version__ = "0.1.0.dev0"

# peft imports it wherever it is installed, and it then warns of kernels for networks in 4 bits, which are not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
