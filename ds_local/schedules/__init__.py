"""Who computes what when, as data: routes, schedules, their proof, their picture and their cost.

Pure Python: no torch, no DeepSpeed."""
