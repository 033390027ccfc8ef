"""``python -m sharded_lamb.bert``: train, prepare data, fine-tune, run the batch-scaling study, or measure."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

try:
    from sharded_lamb.bert.config import RunConfig, load_config
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: {error}; pip install 'sharded-lamb[bert]'")

_COMMANDS = ("train", "prepare", "study", "padding", "trainer")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sharded_lamb.bert",
        description="Pretrain BERT with ShardedLamb. Start it with torchrun for more than one process.",
        epilog="`finetune` has options of its own: python -m sharded_lamb.bert finetune --help",
        allow_abbrev=False,
    )
    parser.add_argument(
        "command", nargs="?", default="train", help="train (default), prepare, study, padding or trainer"
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file, or a shipped one: bert-quickstart"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print batch arithmetic, memory and steps; train nothing"
    )
    parser.add_argument(
        "--world-size", type=int, help="with --dry-run: number of ranks (default: this process group's)"
    )
    parser.add_argument(
        "--resume", metavar="auto|FOLDER", help="resume from the newest complete checkpoint, or a named one"
    )
    parser.add_argument("--batches", help="study: global batches, such as 32,64,128")
    parser.add_argument("--optimizers", help="study: some of lamb,lans,adamw,lars")
    parser.add_argument("--seeds", type=int, help="study: seeds of each tuned run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override FILE")
    return parser


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    # An override may be the first argument, and argparse would read it as the command.
    named = [a for a in arguments if a in _COMMANDS][:1]
    rest = [a for a in arguments if a not in named]
    return _parser().parse_intermixed_args([*(named or ["train"]), *rest])


def _parse_finetune(arguments: Sequence[str]) -> argparse.Namespace:
    from sharded_lamb.bert.finetune.command import add_arguments

    parser = argparse.ArgumentParser(prog="python -m sharded_lamb.bert finetune", allow_abbrev=False)
    add_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 1 error, 130 Ctrl-C, `checkpoint.requeue_exit_code` to be restarted after a signal."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    is_finetune = arguments[:1] == ["finetune"]
    parsed = _parse_finetune(arguments[1:]) if is_finetune else _parse(arguments)
    try:
        if is_finetune:
            from sharded_lamb.bert.finetune.command import run

            return run(parsed)
        config = load_config(parsed.config, parsed.overrides)
        if parsed.dry_run:
            from sharded_lamb.bert.dryrun import describe

            print(describe(config, parsed.world_size or int(os.environ.get("WORLD_SIZE", 1))))
            return 0
        if parsed.command == "prepare":
            return _prepare(config)
        if parsed.command == "padding":
            from sharded_lamb.bert.padding import compare

            compare(config)
            return 0
        return _on_ranks(parsed, config)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; --resume auto continues from the last checkpoint\n")
        return 130
    except (ValueError, OSError) as error:
        rank = os.environ.get("RANK")
        # One write: print() writes the newline separately, so that lines of several ranks could mix.
        sys.stderr.write(f"error{f' (rank {rank})' if rank else ''}: {error}\n")
        sys.stderr.flush()
        return 1


def _prepare(config: RunConfig) -> int:
    from sharded_lamb.bert.prepare import prepare

    for phase in config.phases:
        prepare(config, phase.sequence_length)
    return 0


def _on_ranks(parsed: argparse.Namespace, config: RunConfig) -> int:
    import torch.distributed as dist

    from sharded_lamb.bert.study import study, study_options
    from sharded_lamb.bert.train import run
    from sharded_lamb.recipes.training.ranks import Ranks

    ranks = Ranks.start()
    try:
        if parsed.command == "study":
            study(config, study_options(parsed.batches, parsed.optimizers, parsed.seeds), ranks)
            return 0
        if parsed.command == "trainer":
            from sharded_lamb.bert.beside_trainer import compare

            compare(config, ranks)
            return 0
        return run(config, parsed.resume, ranks).exit_code(config, ranks)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
