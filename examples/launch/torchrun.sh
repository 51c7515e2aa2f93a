#!/usr/bin/env bash
# Machines of eight GPUs each, joined by torchrun. The same command on every machine:
#
#   HEAD=node1:29400 examples/launch/torchrun.sh                       # runs examples/configs/multi_node.yaml
#   HEAD=node1:29400 NODES=4 CONFIG=run.yaml examples/launch/torchrun.sh --trainer.max_steps=2000
#
# A machine that is lost is replaced by giving the command on another one: torchrun starts all processes anew, and they
# go on from the last adapter checkpoint. The machine HEAD keeps the list of machines: if it is lost, start all again.
set -euo pipefail

# Where the machines find each other: the name of one of them, and a free port.
HEAD="${HEAD:?give HEAD=HOST:PORT, the first machine and a free port}"
NODES="${NODES:-2}"
GPUS="${GPUS:-8}"

# By default the processes keep using the store of the first start, whose address a replaced machine is never told.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun --nnodes="$NODES" --nproc-per-node="$GPUS" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${RUN:-lora}" \
    -m lightning_peft fit --config "${CONFIG:-examples/configs/multi_node.yaml}" \
    --trainer.num_nodes="$NODES" --trainer.devices="$GPUS" --ckpt_path=last "$@"
