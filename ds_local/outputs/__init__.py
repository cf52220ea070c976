"""What we write: whole or not at all, and only over what we made.

A folder is written beside its place and takes its place in one step (`folders`); so does a file
(`files`). Every folder so made lists its files (`lists`). What is half-written has a name that says
whose it is (`scratch`, `processes`); what the storage refuses is said in words (`storage`).
"""

from ds_local.outputs.files import check_file, new_file, write_file, write_whole
from ds_local.outputs.folders import check_folder, exchange, new_folder
from ds_local.outputs.lists import FILES, checksum, damage, read_list
from ds_local.outputs.scratch import leftovers, remove, scratch_name
from ds_local.outputs.storage import reason, storage_trouble, sync_folder

__all__ = [
    "FILES",
    "check_file",
    "check_folder",
    "checksum",
    "damage",
    "exchange",
    "leftovers",
    "new_file",
    "new_folder",
    "read_list",
    "reason",
    "remove",
    "scratch_name",
    "storage_trouble",
    "sync_folder",
    "write_file",
    "write_whole",
]
