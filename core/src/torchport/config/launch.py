"""The settings of `torchport launch`, from which its flags, YAML keys and reference page are derived."""

from __future__ import annotations

from dataclasses import dataclass

from torchport import envvars
from torchport.config.schema import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """What `torchport launch` can be told, by flag, environment variable or YAML key, in that order."""

    config_file: str = setting("", help="YAML file with settings.", yaml="", env=envvars.CONFIG_FILE)

    backend: str = setting("", help="Kind of device to work on.", env=envvars.BACKEND)
    strategy: str = setting("", help="How the model is laid out over processes.", env=envvars.STRATEGY)
    precision: str = setting("", help="Number format: no, fp16, bf16, or a plugin's.", env=envvars.PRECISION)
    collectives: str = setting("", help="How processes exchange tensors.", env=envvars.COLLECTIVES)
    launcher: str = setting("", help="How the processes are started.", env=envvars.LAUNCHER)
    trackers: tuple[str, ...] = setting(
        (), help="Where metrics go: names separated by commas.", env=envvars.TRACKERS
    )
    quantizer: str = setting("", help="How weights are stored in fewer bits.", env=envvars.QUANTIZER)

    num_processes: int | None = setting(
        None, help="Processes over all machines; by default one per device, one alone on a CPU.", short="n"
    )
    num_machines: int = setting(1, help="Number of machines.")
    machine_rank: int = setting(0, help="Index of this machine, from 0.")
    main_process_ip: str = setting("", help="Address of machine 0.")
    main_process_port: int = setting(0, help="TCP port on machine 0; by default a free one on one machine.")
    same_network: bool = setting(
        True, help="Whether the machines share a network. They meet at --main-process-ip either way."
    )
    host_file: str = setting("", help="File that lists the machines, for launchers that reach them.")
    launcher_args: str = setting(
        "", help="Further arguments for the launching program, quoted as in a shell."
    )

    device_ids: str = setting("", help="Devices of this machine to use: numbers separated by commas, or all.")
    num_cpu_threads_per_process: int | None = setting(
        None, help="Processor threads of each process; by default its share of the cores."
    )
    enable_cpu_affinity: bool = setting(
        False, help="Bind each process to its own share of the processor cores.", env=envvars.BIND_CPU
    )

    module: bool = setting(
        False, help="The script is the name of a module, as in python -m.", short="m", yaml=""
    )
    no_python: bool = setting(
        False, help="The script is a program to run by itself, without Python.", yaml=""
    )

    log_dir: str = setting("", help="Folder for one file per rank and stream.")
    tee: int = setting(
        3, help="Streams on the console: 0 none, 1 stdout, 2 stderr, 3 both.", choices="0123", short="t"
    )
    log_prefix: bool = setting(True, help="Start each line on the console with the rank that wrote it.")
    quiet: bool = setting(
        False, help="On failure print the failing rank's own error and nothing else.", short="q"
    )

    role: str = setting("", help="Name of the workers' role in logs.")
    rdzv_backend: str = setting("static", help="Rendezvous of the elastic agent: static, c10d, etcd, ...")
    rdzv_conf: str = setting("", help="Further settings of the rendezvous: key=value,key=value.")
    rdzv_id: str = setting("", help="Name of the job at the rendezvous.")
    max_restarts: int = setting(0, help="How often all workers are started again after a failure.")
    monitor_interval: float = setting(0.1, help="Seconds between two looks at the workers, where polling.")

    gradient_accumulation_steps: int | None = setting(
        None,
        help="Micro-batches per optimizer step, where the script does not say.",
        env=envvars.ACCUMULATION_STEPS,
    )
    debug: bool = setting(
        False,
        help="Check shapes and dtypes across processes before every collective operation.",
        env=envvars.DEBUG,
    )
    resume: str = setting(
        "",
        help="What the run goes on from: auto (its newest complete checkpoint, if any), or a checkpoint.",
        env=envvars.RESUME,
    )
