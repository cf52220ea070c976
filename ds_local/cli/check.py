"""Are all machines ready for a job? Says what is wrong, on which host and rank, and what to do
about it.

    # before anything is started
    python scripts/check_cluster.py --hostfile configs/hostfile
    # with the job's launcher
    deepspeed --hostfile configs/hostfile scripts/check_cluster.py --deepspeed_config ds_config.json

With --model and --data as for train.py it also compares these on every rank, and the memory that
the planner expects with what the devices have. Ends within --limit seconds and a moment.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
from typing import Any

from ds_local.cli.arguments import Parser, number, whole


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--hostfile", help="look at every host of this file by ssh, then end")
    add("--ssh-port", type=whole(1), default=22)
    add("--deepspeed_config", help="ds_config.json of the job")
    add("--num-stages", type=whole(1))
    add("--model", help="config.json of the job's model")
    add("--data", help="the job's data folder; without it memory is that of the longest sequences")
    add(
        "--limit",
        type=number(above=True),
        default=60,
        help="seconds to wait for all ranks, and for a message",
    )
    add("--local_rank", type=int, default=-1, help="set by the launcher")
    args = parser.parse_args(arguments)
    if args.hostfile:
        why = "is not looked at with --hostfile, which only visits hosts; leave one of the two out"
        of_ranks = ["--deepspeed_config", "--num-stages", "--model", "--data", "--limit"]
        parser.refuse(args, of_ranks, why)
    else:
        parser.refuse(args, ["--ssh-port"], "belongs to --hostfile; add that, or leave it out")
    return args


def check_hosts(path: str, ssh_port: int) -> None:
    """Every host of a hostfile has a name and opens to ssh without a question.

    Raises:
        ClusterError: naming the host and the remedy.
    """
    from ds_local.cluster.surroundings import read_hostfile
    from ds_local.errors import ClusterError

    for host, slots in read_hostfile(path).items():
        try:
            address = socket.gethostbyname(host)
        except OSError:
            raise ClusterError(
                f"the name {host} in {path} has no address; correct it, or add it to /etc/hosts"
            ) from None
        command = [
            "ssh",
            "-o",
            "BatchMode=yes",
            "-o",
            "ConnectTimeout=5",
            "-p",
            str(ssh_port),
            host,
            "true",
        ]
        try:
            result = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=20
            )
        except FileNotFoundError:
            raise ClusterError(
                "there is no ssh on this machine; install it, or start every node with --no_ssh"
            ) from None
        except subprocess.TimeoutExpired:
            raise ClusterError(
                f"{host} ({address}) did not answer ssh within 20 s; look at it, or take it out of "
                f"{path}"
            ) from None
        if result.returncode:
            said = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ClusterError(
                f"ssh to {host} ({address}) failed: {said}; allow a login by key, without a "
                f"question (ssh-copy-id {host}), or take it out of {path}"
            )
        print(f"{host} ({address}): {slots} slots, opens to ssh")


def check_ranks(args: argparse.Namespace) -> None:
    from torch import distributed as dist

    from ds_local.cluster import start_check as cluster
    from ds_local.cluster.edges import measure_edges
    from ds_local.config.degrees import num_stages_and_replicas
    from ds_local.engine.deepspeed_checks import checked
    from ds_local.engine.process_group import end_processes, start_processes
    from ds_local.errors import DsLocalError
    from ds_local.model import families

    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    try:
        config, section = checked(args.deepspeed_config or {})
        stages, replicas = num_stages_and_replicas(section, world_size, args.num_stages)
        model = args.model and families.config_dict(families.load_model_config(args.model))
    except DsLocalError as error:  # the others need not wait for this rank to hear of it
        cluster.check_start(cluster.own_facts(refused=str(error)), (), args.limit)
        raise
    facts = cluster.own_facts([config, model, stages], args.data)
    everybody = cluster.check_start(
        facts, section.layout.neighbours(rank, stages, replicas), args.limit
    )
    if rank == 0:
        print(
            f"{world_size} ranks are here, with the same versions, code, config and data",
            flush=True,
        )
    start_processes()
    edges = measure_edges(section.layout.ranks(stages, replicas), args.limit)
    seq_len = None if args.data is None else cluster.data_facts(args.data)[1]
    memory = check_memory(args.model, config, (stages, replicas), seq_len) if args.model else ""
    if rank == 0:
        for edge in edges:
            (low, high), (a, b) = edge["ranks"], edge["hosts"]
            print(
                f"stage {edge['stages'][0]} -> {edge['stages'][1]}: rank {low} on {a} -> rank "
                f"{high} on {b}: {edge['latency_seconds'] * 1e3:.2f} ms, {edge['gbps']:.2f} Gb/s"
            )
        print(
            *([memory] if memory else []),
            f"{len(everybody)} ranks, {len(edges)} edges: ready",
            sep="\n",
            flush=True,
        )
    dist.barrier()
    end_processes()


def check_memory(
    model: str, config: dict[str, Any], layout: tuple[int, int], seq_len: int | None
) -> str:
    """What the planner expects a device to hold beside what the smallest device has. A collective
    call.

    Args:
        layout: stages and replicas.
        seq_len: tokens of a sequence; None for the longest that the model takes.

    Raises:
        ClusterError: when it does not fit.
    """
    import torch

    from ds_local.cluster.candidates import GIB
    from ds_local.cluster.pricing import expected_memory
    from ds_local.errors import ClusterError
    from ds_local.links.agreement import gather
    from ds_local.links.staging import ranks_here
    from ds_local.model import families

    cuda = torch.cuda.is_available()
    total = (
        torch.cuda.mem_get_info()[1]
        if cuda
        else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks_here()
    )
    smallest, host = min(gather((total / GIB, socket.gethostname())))
    hf_config = families.load_model_config(model)
    needed = expected_memory(hf_config, config, *layout, seq_len) / GIB
    length = f"sequences of {seq_len or families.num_positions(hf_config):,} tokens"
    if seq_len is None:
        length += ", the model's longest (--data says how long the job's are)"
    if needed > smallest:
        raise ClusterError(
            f"the fullest stage needs about {needed:.1f} GiB for {length}, but a device of {host} "
            f"has {smallest:.1f}; use more stages, a smaller train_micro_batch_size_per_gpu, or "
            "pipeline.activation_checkpoint_interval"
        )
    return f"memory: about {needed:.1f} of {smallest:.1f} GiB on the fullest device, for {length}"


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    from ds_local.errors import ClusterError

    if args.hostfile:
        check_hosts(args.hostfile, args.ssh_port)
    elif "WORLD_SIZE" not in os.environ:
        raise ClusterError(
            "give --hostfile, or start this script with the job's launcher (deepspeed, torchrun, "
            "srun)"
        )
    else:
        os.environ.setdefault("LOCAL_RANK", str(max(args.local_rank, 0)))
        check_ranks(args)
    return 0
