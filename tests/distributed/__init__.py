"""Several processes: DDP, FSDP, ZeRO and distributed checkpoints, on CPUs with gloo."""
