"""Runs it all under DeepSpeed, which is imported in this room alone.

Importing the room checks DeepSpeed's version, `deepspeed_seam` that every private name is there.
"""

from ds_local.engine import deepspeed_version

deepspeed_version.check()
