"""``fit``, ``validate``, ``test`` and ``predict``: Lightning's command line with one run directory.

A run directory (``--run_dir``) holds everything that a run leaves::

    RUN/config.<command>.yaml   every option with the value it had
    RUN/logs/                   TensorBoard events
    RUN/checkpoints/last.ckpt   to go on (``--ckpt_path last``) or to test
    RUN/models/<name>/          exported Hugging Face folders
    RUN/results/*.json          numbers
    RUN/quality/                what quality is compared with: predictions of the model before compression
    RUN/report.html, report.md  what was done, what it cost, what it bought (with RUN/figures/)
    RUN/predictions.jsonl       continuations of prompts
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from moe_lightning.callbacks import LastCheckpoint, PredictionWriter, RandomState, last_checkpoint
from moe_lightning.checkpoints import has_weights
from moe_lightning.cli.arguments import with_bare_flags
from moe_lightning.cli.config_files import resolve_configs, run_name
from moe_lightning.cli.dry_options import Asked, describe_model
from moe_lightning.cli.errors import TRACEBACK_VARIABLE, OneLineErrors
from moe_lightning.cli.fit_dry_run import print_dry_run
from moe_lightning.cli.messages import for_the_command, readable_messages
from moe_lightning.cli.run_callbacks import NoteBeginning, SaveRunConfig, check_names, how_to_go_on, usual_measurements
from moe_lightning.cli.run_directory import RunDirectory
from moe_lightning.cli.trainer_options import clip_validation
from moe_lightning.data import TextDataModule, holds_tokenizer
from moe_lightning.files import write_atomically
from moe_lightning.modules import MixtralModule
from moe_lightning.slimming.policy import TooFewTokens

DEFAULT_SEED = 1234

STRUCTURE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "tie_word_embeddings",
)
"""Fields of a model that its weights fix: a checkpoint and the options must agree on them."""


class RunParser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser with errors of one line."""


class MoELightningCLI(LightningCLI):
    """LightningCLI for :class:`MixtralModule` and :class:`TextDataModule`, with a run directory.

    Args:
        arguments: Command and options, with the paths of config files.
        configs: Those config files; they name the run directory where ``--run_dir`` is not given.
    """

    def __init__(self, arguments: Sequence[str], configs: Sequence[Path] = ()) -> None:
        self.config_files = list(configs)
        self.default_run_dir = str(Path("runs") / run_name(configs))
        self._command_being_added: str | None = None
        self._structure: dict[str, Any] | None = None
        super().__init__(
            MixtralModule,
            TextDataModule,
            save_config_callback=SaveRunConfig,
            seed_everything_default=DEFAULT_SEED,
            parser_kwargs={"prog": "moe-lightning", "allow_abbrev": False},
            parser_class=RunParser,
            auto_configure_optimizers=False,
            # Hyper-parameters are plain values: MixtralModule saves its structure itself, and nothing else.
            load_from_checkpoint_support=False,
            args=list(arguments),
        )

    # ------------------------------------------------------------ options

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        self._command_being_added = subcommand
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--run_dir``, and ``--overwrite`` and ``--dry_run`` to ``fit``."""
        parser.add_argument(
            "--run_dir",
            type=str,
            default=self.default_run_dir,
            help="Folder that holds all that the run leaves: config, logs, checkpoints, models, results.",
        )
        if self._command_being_added == "fit":
            parser.add_argument(
                "--overwrite",
                type=bool,
                default=False,
                help="Start anew in a run directory that holds a checkpoint, and delete what the last run left there.",
            )
            parser.add_argument(
                "--dry_run",
                type=bool,
                default=False,
                help="Say what would happen at which step, what trains, and what it takes, and do nothing. With a "
                "config.json alone in --model.checkpoint, neither weights nor text are looked at.",
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the options and find what cannot work before anything is built."""
        self._check_config_files(args[0])
        self.config = parser.parse_args(args)
        parser = self._subcommand_parsers[self.config.subcommand]
        self.options = self.config[self.config.subcommand]
        self.asked: Asked | None = None
        self.dry_run = bool(self.options.get("dry_run"))
        self.run_dir = Path(self.options.run_dir)
        self.directory = RunDirectory(self.run_dir)
        self.beginning = NoteBeginning(self.directory)
        if self.run_dir.exists() and not self.run_dir.is_dir():
            parser.error(f"--run_dir {self.run_dir}: this is a file: name a folder, which need not exist")
        if self.options.trainer.default_root_dir not in (None, self.options.run_dir):
            parser.error("--trainer.default_root_dir: use --run_dir, which holds logs and checkpoints together")
        try:
            self.checkpoint_file = self._find_checkpoint(self.config.subcommand)
            self._link_tokenizer()
        except (ValueError, FileNotFoundError) as error:
            parser.error(str(error))

    def _check_config_files(self, command: str) -> None:
        """Find what the parser says nothing of, or not in which file."""
        parser = self._subcommand_parsers.get(command)
        if parser is None:
            return
        known = {action.dest.split(".")[0] for action in parser._actions}
        for path in self.config_files:
            try:
                content = yaml.safe_load(path.read_text(encoding="utf-8"))
            except yaml.YAMLError as error:
                parser.error(f"-c {path}: this is not YAML: {error}")
            if not isinstance(content, dict):
                parser.error(f"-c {path}: a config file holds options by name, as in 'model: {{learning_rate: 0.001}}'")
            for key in content:
                if key not in known:
                    near = difflib.get_close_matches(str(key), known, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"possible are {', '.join(sorted(known))}"
                    parser.error(f"-c {path}: there is no option {key!r}: {hint}")

    def _find_checkpoint(self, command: str) -> str | None:
        """Return the checkpoint to load, as Lightning understands it."""
        wanted = self.options.get("ckpt_path")
        last = last_checkpoint(self.run_dir)
        if self.dry_run and wanted is not None:
            raise ValueError("--dry_run says what a run does from its beginning on: leave --ckpt_path out")
        if wanted == "last":
            if not last.is_file():
                raise FileNotFoundError(
                    f"--ckpt_path last: there is no checkpoint {last}: check --run_dir, or leave --ckpt_path out to "
                    "start anew"
                )
            return str(last)
        if wanted is not None:
            if not Path(wanted).exists():
                raise FileNotFoundError(
                    f"--ckpt_path {wanted}: there is no such file: use a path, or 'last' for {last}"
                )
            return str(wanted)
        if command == "fit":
            if last.is_file() and not self.options.overwrite and not self.options.trainer.fast_dev_run:
                raise ValueError(
                    f"--run_dir {self.run_dir}: an earlier run left a checkpoint there: continue it with --ckpt_path "
                    "last, start anew and delete it with --overwrite true, or choose another --run_dir"
                )
        elif self.options.model.checkpoint is None:
            raise ValueError(
                f"{command} needs trained weights: add --ckpt_path last, --ckpt_path FILE, or --model.checkpoint "
                "FOLDER with --model.model null"
            )
        return None

    def _link_tokenizer(self) -> None:
        """Let a model folder's tokenizer be the data's."""
        folder = self.options.model.checkpoint
        if folder is None or self.options.data.get("tokenizer") is not None or not Path(folder).is_dir():
            return
        if self.dry_run and not has_weights(folder):
            return
        if not holds_tokenizer(folder):
            raise ValueError(
                f"--model.checkpoint {folder}: there is no tokenizer in this folder: say with --data.tokenizer which "
                "one the model was trained with"
            )
        self.options.data.tokenizer = str(folder)

    def _parse_ckpt_path(self) -> None:
        """Take the structure, and nothing else, from the checkpoint; everything else comes from the options.

        Lightning's own would let all hyper-parameters of the checkpoint win over the command line in silence.
        """
        if self.checkpoint_file is None or not Path(self.checkpoint_file).is_file():
            return
        try:
            content = torch.load(self.checkpoint_file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            self._subcommand_parsers[self.config.subcommand].error(
                f"--ckpt_path {self.checkpoint_file}: the file cannot be read as a checkpoint: {error}"
            )
        saved = content.get("hyper_parameters", {})
        if not saved.get("model"):
            self._subcommand_parsers[self.config.subcommand].error(
                f"--ckpt_path {self.checkpoint_file}: this is no checkpoint of a MixtralModule"
            )
        wanted = dict(self.options.model.model or {})
        for name in STRUCTURE_FIELDS:
            if name in wanted and wanted[name] != saved["model"].get(name):
                self._subcommand_parsers[self.config.subcommand].error(
                    f"--model.model.{name}={wanted[name]}, but the checkpoint {self.checkpoint_file} holds a model "
                    f"with {name}={saved['model'].get(name)}: remove the option, or start anew without --ckpt_path"
                )
        self._structure = {"model": {**saved["model"], **wanted}, "checkpoint": None, "plan": saved.get("plan")}

    # ------------------------------------------------------------ objects

    def before_instantiate_classes(self) -> None:
        """In a dry run, put the sizes of a model in the place of its folder."""
        if self.dry_run:
            try:
                self.asked = describe_model(self.options)
            except (ValueError, FileNotFoundError) as error:
                self._subcommand_parsers[self.config.subcommand].error(str(error))

    def instantiate_classes(self) -> None:
        """Make module, data and trainer; a mistake in an option is one line, not a traceback."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, OSError, MisconfigurationException) as error:
            if os.environ.get(TRACEBACK_VARIABLE):
                raise
            self._subcommand_parsers[self.config.subcommand].error(str(error))

    def after_instantiate_classes(self) -> None:
        """Give the module the structure of the checkpoint, so that every strategy knows it when it makes the model."""
        if self._structure is not None:
            self.model.hparams.update(self._structure)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        config["default_root_dir"] = str(self.run_dir)
        if self.asked is not None:
            self.asked.read_trainer(config)
        if config.get("logger") in (None, True):
            # No version folders: a resumed run goes on in the same place.
            config["logger"] = TensorBoardLogger(str(self.run_dir), name="logs", version="", default_hp_metric=False)
        given = config.get("callbacks") or []
        given = list(given) if isinstance(given, list) else [given]
        check_names(given)
        wanted: list[Callback] = []
        if self.subcommand == "predict":
            wanted.append(PredictionWriter())
        if self.subcommand == "fit":
            wanted += usual_measurements(given, self.options.data.validation)
            clip_validation(config)
        has_checkpoints = any(isinstance(callback, Checkpoint) for callback in given)
        if self.subcommand != "fit":
            config["enable_checkpointing"] = has_checkpoints
        elif config.get("enable_checkpointing") is not False and not any(isinstance(c, LastCheckpoint) for c in given):
            wanted.append(LastCheckpoint())
        # First, so that on a resumed run the random numbers are back before anybody draws any.
        first = [callback for callback in given if isinstance(callback, RandomState)] or [RandomState()]
        given = [callback for callback in given if not isinstance(callback, RandomState)]
        config["callbacks"] = [*first, *given, *wanted, self.beginning]
        self.save_config_kwargs = {"command": self.subcommand}
        return super()._instantiate_trainer(config, callbacks)

    # ------------------------------------------------------------ runs

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["ckpt_path"] = self.checkpoint_file
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            if self.asked is not None:
                return print_dry_run(self.trainer, self.model, self.datamodule, self.asked)
            super()._run_subcommand(subcommand)
        except SystemExit:
            # Lightning leaves so after Ctrl-C.
            self._undo()
            if subcommand == "fit" and self._can_go_on:
                print(
                    f"stopped at step {self.trainer.global_step}; to go on from the last checkpoint, repeat the "
                    "command with --ckpt_path last",
                    file=sys.stderr,
                )
            raise
        except TooFewTokens as error:
            # No fault, but what the run was told to do then.
            self._undo()
            if os.environ.get(TRACEBACK_VARIABLE):
                raise
            if self.trainer.is_global_zero:
                hint = (
                    "; change that and go on from the last checkpoint with --ckpt_path last" if self._can_go_on else ""
                )
                where = f"stopped at step {self.trainer.global_step}"
                told = for_the_command(str(error), subcommand)
                print(f"moe-lightning {subcommand}: {where}: {told}{hint}", file=sys.stderr)
            raise SystemExit(1) from error
        except BrokenPipeError:
            # No mistake in the options: nobody reads what is printed, see moe_lightning.cli.main.
            self._undo()
            raise
        except (ValueError, OSError, MisconfigurationException) as error:
            # What Lightning or we find wrong with the options once data and model meet. Later errors keep their
            # traceback.
            self._undo()
            if self.beginning.has_begun or os.environ.get(TRACEBACK_VARIABLE):
                raise
            print(f"moe-lightning {subcommand}: error: {for_the_command(str(error), subcommand)}", file=sys.stderr)
            raise SystemExit(2) from error
        except BaseException:
            self._undo()
            raise

    @property
    def _can_go_on(self) -> bool:
        return last_checkpoint(self.run_dir).is_file() and self.trainer.is_global_zero

    def _undo(self) -> None:
        """Leave no trace of a run that never began."""
        if not self.beginning.has_begun and self.trainer.is_global_zero:
            self.directory.undo()

    @rank_zero_only
    def before_fit(self) -> None:
        """Make room where that was asked for; what an earlier run left goes when this one has begun."""
        if self.options.overwrite and self.checkpoint_file is None:
            self.directory.set_aside()

    @rank_zero_only
    def after_fit(self) -> None:
        """Say so where there was nothing left to do."""
        if self.checkpoint_file is not None and not self.beginning.has_begun:
            print(f"nothing to do: the run has ended, at step {self.trainer.global_step}{how_to_go_on(self.trainer)}")

    @rank_zero_only
    def _write_results(self) -> None:
        values = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        write_atomically(self.run_dir / "results" / f"{self.subcommand}.json", json.dumps(values, indent=2) + "\n")

    def after_validate(self) -> None:
        """Write ``RUN/results/validate.json``."""
        self._write_results()

    def after_test(self) -> None:
        """Write ``RUN/results/test.json``."""
        self._write_results()


def main(arguments: Sequence[str]) -> int:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        arguments: Command and options.

    Returns:
        Exit status.
    """
    try:
        resolved, configs = resolve_configs(arguments)
    except FileNotFoundError as error:
        print(f"moe-lightning {arguments[0]}: error: {error}", file=sys.stderr)
        return 2
    with readable_messages(arguments[0]):
        MoELightningCLI(with_bare_flags(resolved, ("--overwrite", "--dry_run")), configs)
    return 0
