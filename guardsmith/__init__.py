"""guardsmith: harden a Stable Diffusion checkpoint against personalization on protected subjects, and prove it."""

__version__ = "0.1.0.dev0"
