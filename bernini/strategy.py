"""FSDP2 on as many GPUs as a run is given, with Ulysses and replicas."""

from datetime import timedelta

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bernini.errors import ConfigError


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` that counts the GPUs itself and may keep several replicas of the weights.

    Args:
        tensor_parallel_size: GPUs that compute each pack together (Ulysses).
        replicas: Replicas of the weights, each sharded over GPUs that lie next to each other (HSDP): with one replica
            per node, weights are gathered within nodes, and only gradients cross between them.
        save_distributed_checkpoint: Every GPU writes its shards, into a folder; else, and for a LoRA always, one file
            is gathered.
        process_group_backend: As torch's.
        timeout: Of collectives.
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        replicas: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__("auto", tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout)
        self.peers, self.replicas = tensor_parallel_size, replicas
        self.weights_mesh: DeviceMesh | None = None

    def setup_environment(self) -> None:
        """Count the GPUs, and lay the mesh of the weights beside that of data and packs.

        Raises:
            ConfigError: The GPUs cannot be divided so.
        """
        world = self.num_nodes * self.num_processes
        for name, size in (("tensor_parallel_size", self.peers), ("replicas", self.replicas)):
            if size < 1 or world % size:
                raise ConfigError(
                    f"{world} GPUs cannot be divided by {name} {size}",
                    where=f"trainer.strategy.init_args.{name}",
                    fix=f"use a divisor of {world}, or another number of trainer.devices",
                )
        self._data_parallel_size = world // self.peers
        assert self.lightning_module is not None
        if not self.lightning_module.strict_loading:  # it saves what it trains; torch would miss the rest in shards
            self._save_distributed_checkpoint = False
        super().setup_environment()
        if self.replicas > 1:
            shape, names = (self.replicas, world // self.replicas), ("replicate", "shard")
            self.weights_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
