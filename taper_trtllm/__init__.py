"""Branch-parallel LLM serving on TensorRT-LLM, regulated per step."""

__version__ = "0.1.0"
