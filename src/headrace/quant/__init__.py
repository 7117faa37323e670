"""Quantised Hugging Face checkpoints as ordinary named tensors, a file per method (see `read.py`)."""
