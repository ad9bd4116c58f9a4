"""Fine-tune language models that do not fit on the GPU, from PyTorch Lightning, by changing one argument."""

__version__ = "0.1.0"
