"""Runs a stage under DeepSpeed. The only room that imports it."""
