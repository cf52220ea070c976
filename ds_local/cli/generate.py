"""Continue a text with a trained model.

python scripts/generate.py runs/nano --prompt "def main("
# an early exit drafts, the full model checks
python scripts/generate.py runs/nano --prompt "def main(" --assistant 0
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

from ds_local.cli.arguments import Parser, number, whole
from ds_local.cli.exits import add_model, exits_of


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    add_model(parser)
    parser.add_argument("--prompt", default="def main(")
    parser.add_argument("--max-new-tokens", type=whole(1), default=80)
    parser.add_argument(
        "--temperature", type=number(), default=0.7, help="0: always the likeliest token"
    )
    parser.add_argument("--seed", type=whole(), default=0)
    parser.add_argument(
        "--assistant",
        help="segment of the model, or a smaller model's folder: it drafts, the model checks",
    )
    parser.add_argument(
        "--draft-tokens", type=whole(1), default=4, help="tokens the assistant drafts at a time"
    )
    args = parser.parse_args(arguments)
    if args.assistant is None:
        why = "belongs to --assistant, which drafts them; add that, or leave it out"
        parser.refuse(args, ["--draft-tokens"], why)
    from ds_local.errors import ConfigError

    with tempfile.TemporaryDirectory() as scratch:
        exits = exits_of(args.model, scratch)
        assistant = args.assistant
        if assistant is not None and assistant.isdigit():
            if int(assistant) not in exits:
                raise ConfigError(
                    f"{args.model} has no exit {assistant}; it has {', '.join(map(str, exits))}"
                )
            assistant = exits[int(assistant)]
        print(continue_text(exits[max(exits)], assistant, args))
    return 0


def continue_text(folder: Any, assistant: Any, args: argparse.Namespace) -> str:
    import torch

    from ds_local.data.tokenizers import load_tokenizer
    from ds_local.errors import ConfigError
    from ds_local.model.pretrained import whole_model

    tokenizer, model = load_tokenizer(folder), whole_model(folder)
    prompt = tokenizer(args.prompt, return_tensors="pt", add_special_tokens=False)
    ids = prompt["input_ids"]
    room = getattr(model.config, "max_position_embeddings", 1 << 30) - ids.shape[1]
    if not ids.numel() or room < 1:
        raise ConfigError(
            f"--prompt has {ids.numel()} tokens; {folder} takes from 1 to {room + ids.shape[1] - 1}"
        )
    if ids.max() >= model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer in {folder} gives the id {ids.max()}, the model has "
            f"{model.config.vocab_size} tokens"
        )
    how: dict[str, Any] = {"do_sample": False}
    if args.temperature > 0:
        how = {"do_sample": True, "temperature": args.temperature, "top_k": 50}
    how |= {
        "input_ids": ids,
        "attention_mask": prompt["attention_mask"],
        "max_new_tokens": min(args.max_new_tokens, room),
        "pad_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(args.seed)
    if assistant is None:
        return tokenizer.decode(model.generate(**how)[0], skip_special_tokens=True)
    output, report = drafted(model, whole_model(assistant), how, args)
    return tokenizer.decode(output[0], skip_special_tokens=True) + f"\n\n{report}"


def drafted(
    model: Any, assistant: Any, how: dict[str, Any], args: argparse.Namespace
) -> tuple[Any, str]:
    """Self-speculative decoding: the output, and what it saved, compared with the model alone on
    the same prompt."""
    import torch

    assistant.generation_config.num_assistant_tokens = args.draft_tokens
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    calls = dict.fromkeys(("model", "assistant"), 0)
    for name, module in (("model", model), ("assistant", assistant)):
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    seconds = {}
    for kind, extra in (
        ("warm-up", {}),
        ("alone", {}),
        ("assisted", {"assistant_model": assistant}),
    ):
        torch.manual_seed(args.seed)
        calls.update(model=0, assistant=0)
        began = time.perf_counter()
        output = model.generate(**how, **extra)
        seconds[kind] = (time.perf_counter() - began) / (
            output.shape[1] - how["input_ids"].shape[1]
        )
    new = output.shape[1] - how["input_ids"].shape[1]
    accepted = (
        new - calls["model"]
    )  # every call of the model adds one token of its own to those it accepts
    return output, (
        f"{new} tokens in {calls['model']} passes of the model; {accepted} of {calls['assistant']} "
        f"drafted tokens accepted ({accepted / max(1, calls['assistant']):.0%}); "
        f"{1000 * seconds['assisted']:.1f} ms a token, alone {1000 * seconds['alone']:.1f} ms: "
        f"{seconds['alone'] / seconds['assisted']:.2f} times the speed"
    )
