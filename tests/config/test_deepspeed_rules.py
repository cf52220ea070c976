"""The tables of what ds_config.json may say."""

from pathlib import Path

from ds_local.config.deepspeed import check_deepspeed
from ds_local.config.deepspeed_rules import SECTIONS


def test_known_deepspeed_keys_are_the_ones_deepspeed_reads():
    """A key that DeepSpeed knows must not be taken for a slip of the pen."""
    import re

    from deepspeed.runtime import constants

    source = Path(constants.__file__).read_text()
    top_level = set(re.findall(r'^[A-Z_]+ = "([a-z_0-9]+)"$', source, re.M))
    for key in top_level:
        check_deepspeed({key: {"type": "Adam"} if key in SECTIONS else None})
