"""The settings of a run: the "local_parallel" section, and the keys of DeepSpeed beside it.

No torch, no DeepSpeed, nothing of ours but errors."""
