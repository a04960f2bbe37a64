"""A LLaVA-style vision-language model in one file, `model.py`, and what stands around it."""

import warnings
from pathlib import Path

TINY = Path(__file__).resolve().parent / "tiny"  # the embedded checkpoint

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch works without it, and so does this
