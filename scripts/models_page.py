"""Write docs/models.md: every family of causal language models of this transformers, and what the
start check says of it.

python scripts/models_page.py
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ds_local.errors import DsLocalError
from ds_local.model import families
from ds_local.model.routers import routers_of
from ds_local.outputs import write_file

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
# what a family's config class leaves out, or leaves such that the library makes no model of it
EXAMPLES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "num_hidden_layers": 4},
    "deepseek_v2": {"num_experts_per_tok": 4},
    "dots1": {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 1},
    "glm4_moe": {"head_dim": 128},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "num_hidden_layers": 4},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"num_attention_heads": 8, "is_decoder": True},
}
HEAD = """# Models

<!-- written by `python scripts/models_page.py`; change what it reads -->

`--model` and `ds_local.causal_lm` take any causal language model of Hugging Face's that is made of
an embedding, a list of blocks that run once each, a norm and a linear readout. Nothing is listed by
hand: which module is what, and which masks, positions and rotary embeddings a block takes, is found
out by running the library's own code around the blocks.

**Every start proves it.** A small model of your own config (all its kinds of blocks, few of each,
narrow), with random weights, is cut into layers. Its logits must be those of the whole model, no
logit may depend on a later token, its first blocks must be a model by themselves with the same
logits, and its router loss must be the library's. A config that fails is refused in one sentence.

**Experts.** The router loss of a mixture of experts is the library's, over the layers of a segment,
and is a part of what the segment learns from, times the config's `router_aux_loss_coef`, whether or
not `output_router_logits` is set; 0 leaves it out. A loss that trains several segments has one
router loss, shared by their blocks. It is `router_loss` in metrics.jsonl; `loss` is that of tokens
alone, and so is a validation's. Where the table says "none in transformers" the library balances
experts in another way or not at all, and so does a run here.

**Folders.** A model's weights are read from its folder and written to one in the library's form,
experts one by one where it keeps them so. Reading these takes a whole model's memory on each rank
for a moment. The tokenizer that an export writes is loaded again and compared with the data's.

**Logits** with a soft cap, or of a readout with a bias, are computed in plain slices, whatever
`head.kernel` says.

`tests/model/test_every_family.py` tries every family below: weights there and back to the bit, an
export and prefixes in plain transformers, causality, generation with a cache. A config that ends a
segment where no model of its family can end is refused at the start too.

"""


class Row(NamedTuple):
    family: str
    works: bool
    experts: str
    reason: str


def example(family: str) -> PretrainedConfig:
    return CONFIG_MAPPING[family](**EXAMPLES.get(family, {}))


def row(family: str) -> Row:
    """What the start check says."""
    try:
        config = families.load_model_config(example(family))
    except DsLocalError as error:
        return Row(family, False, "", _reason(str(error)))
    except Exception as error:  # of the library, which makes no config
        return Row(family, False, "", _reason(f"no config can be made: {error}"))
    blocks = families.skeleton(config).get_submodule(families.family_of(config).blocks)
    if routers_of(config) is not None:
        return Row(family, True, "router loss counted", "")
    has_experts = any("expert" in name for name, _ in blocks.named_modules())
    return Row(family, True, "router loss: none in transformers" if has_experts else "", "")


def _reason(text: str) -> str:
    text = text.removeprefix("the model config: ").removesuffix("; docs/models.md lists what can")
    text = re.sub(r"^an? \S+ cannot be trained in parts: ", "", text)
    first = next(line.strip() for line in text.splitlines() if line.strip())
    return first.replace("|", "/")[:160]


def rows() -> Iterator[Row]:
    for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        yield row(family)


def page(found: list[Row]) -> str:
    works = [r for r in found if r.works]
    refused = [r for r in found if not r.works]
    lines = [
        f"Of transformers {transformers.__version__}: {len(works)} of {len(found)} model types "
        f"work, {len(refused)} are refused, as their config class makes them or as "
        "`scripts/models_page.py` completes it.",
        "",
        "## What works",
        "",
        "| model_type | experts |",
        "|---|---|",
        *(f"| {r.family} | {r.experts} |" for r in works),
        "",
        "## What is refused",
        "",
        "| model_type | why |",
        "|---|---|",
        *(f"| {r.family} | {r.reason} |" for r in refused),
    ]
    return HEAD + "\n".join(lines) + "\n"


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    write_file(PAGE, page(list(rows())))


if __name__ == "__main__":
    main()
