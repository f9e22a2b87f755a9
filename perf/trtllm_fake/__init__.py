"""Stands in for TensorRT-LLM's executor bindings, so that what drives them runs without them."""
