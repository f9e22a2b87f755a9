"""A behavioural fake of `tensorrt_llm.bindings.executor` 1.2.1, for machines without the wheel.

`bindings.py` stands for the real module and needs an engine directory of `engine_dir.py`. Behaviour
follows the public C++ sources of NVIDIA/TensorRT-LLM (executor/executorImpl.cpp,
batch_manager/*.cpp at b35ac1b6 unless a part names another commit); every part says what it follows
and what it leaves out. It has not been compared with a running executor: the sources were read, and
`engine_build verify` is what both must pass. One GPU, one beam, no speculation, no host offload, no
sliding windows.
"""
