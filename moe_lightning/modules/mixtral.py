"""The LightningModule: a Mixtral that trains, is tested, continues prompts, and survives a change of its structure.

Its checkpoints remember the *structure* only (model configuration and compression plan). What people change between
runs, such as the learning rate, always comes from the command line or the constructor, also when a run is resumed.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections import deque
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from moe_lightning.architectures import architecture_of
from moe_lightning.checkpoints import from_pretrained
from moe_lightning.data import TextDataModule
from moe_lightning.evaluation.likelihood import Likelihood
from moe_lightning.experts.balancing import load_balancing_loss
from moe_lightning.modules.checks import (
    MODEL_FIELDS,
    check_checkpoint_folder,
    check_experts_implementation,
    check_model_fields,
    check_options,
)
from moe_lightning.modules.packed import ignore_packed_buffers
from moe_lightning.plan import CompressionPlan
from moe_lightning.recovery import Objective, Student, hidden_by_layer
from moe_lightning.surgery import GROUP_NAMES, add_missing_groups, parameter_groups, plan_of, rebuild


def plain_values(plan: CompressionPlan) -> dict[str, Any]:
    """Return a plan as the types that JSON has, which are also those that ``weights_only`` loading lets through.

    Versions in the origin of a plan, for example, may be strings of a class of their own.
    """
    return json.loads(json.dumps(plan.to_dict()))


class MixtralModule(LightningModule):
    """Train, validate, test and prompt a Mixtral.

    Exactly one of ``model`` and ``checkpoint`` says which.

    Args:
        model: Fields of transformers' MixtralConfig for a new model, e.g. ``{hidden_size: 128, num_local_experts: 8}``.
            Without ``vocab_size`` it gets the size of the data's tokenizer, and the ids of its special tokens.
        checkpoint: Hugging Face folder of a Mixtral to start from, compressed or not.
        plan: Compression plan (as plain data) whose structure the model has; set when a checkpoint is loaded.
        learning_rate: Peak of the schedule.
        min_learning_rate_ratio: Where the cosine ends, as a share of ``learning_rate``.
        warmup_steps: Optimizer steps over which the learning rate rises linearly from 0.
        weight_decay: AdamW's; on matrices only: not on norms, and not on novices.
        betas: AdamW's decay rates of the first and second moment.
        load_balancing_coefficient: Weight of the router's load-balancing loss, which is 1 at perfect balance:
            transformers' own is k times larger (k experts per token), so that its coefficient c is c * k here. 0 turns
            it off.
        experts_implementation: How transformers computes experts (``eager``, ``grouped_mm``, ...); its default when
            None.
        max_new_tokens: Tokens that ``predict`` adds to a prompt at most.
        temperature: Of sampling in ``predict``; 0 takes the likeliest token.

    Raises:
        ValueError: An option out of its range, a field that MixtralConfig does not have, a folder that holds no
            Mixtral.
        FileNotFoundError: ``checkpoint`` is no model folder.
    """

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        checkpoint: str | None = None,
        plan: dict[str, Any] | None = None,
        learning_rate: float = 3e-4,
        min_learning_rate_ratio: float = 0.1,
        warmup_steps: int = 100,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        load_balancing_coefficient: float = 0.01,
        experts_implementation: str | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
    ) -> None:
        super().__init__()
        if (model is None) == (checkpoint is None):
            raise ValueError(
                "set exactly one of model.model (fields of a Mixtral) and model.checkpoint (a Hugging Face folder): "
                "where a config file sets the other one, undo it with --model.model null"
            )
        check_options(
            learning_rate=learning_rate,
            min_learning_rate_ratio=min_learning_rate_ratio,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            betas=betas,
            load_balancing_coefficient=load_balancing_coefficient,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )
        check_experts_implementation(experts_implementation)
        if model is not None:
            check_model_fields(model)
        if checkpoint is not None:
            check_checkpoint_folder(checkpoint)

        # The structure, and nothing that people may want to change from run to run: Lightning lets what stands here win
        # over the command line when a checkpoint is loaded.
        model, plan = copy.deepcopy(model), copy.deepcopy(plan)
        self.save_hyperparameters("model", "checkpoint", "plan")
        self.learning_rate = learning_rate
        self.min_learning_rate_ratio = min_learning_rate_ratio
        self.warmup_steps = warmup_steps
        self.weight_decay = weight_decay
        self.betas = (float(betas[0]), float(betas[1]))
        self.load_balancing_coefficient = load_balancing_coefficient
        self.experts_implementation = experts_implementation
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature

        self.model: Any = None
        # What a training step minimises; stages of recovery put theirs here. No module: a teacher's weights belong in
        # no checkpoint of its student's.
        self.objective = Objective()
        # Weights depend on the seed alone, not on how much randomness the preparation of the data used up before.
        self._weights_seed = int(torch.randint(2**62, ()).item())
        # In a dict, so that the metrics are no submodules: a bf16 module would cast their float64 sums.
        self._likelihoods: dict[str, Likelihood] = {}
        self._recent_steps: deque[tuple[int, float]] = deque(maxlen=50)
        self._step_started_seconds = 0.0

    # ------------------------------------------------------------ structure

    @property
    def tokenizer(self) -> Any:
        """The datamodule's tokenizer, or None without a datamodule."""
        datamodule = getattr(self._trainer, "datamodule", None)
        return getattr(datamodule, "tokenizer", None)

    def configure_model(self) -> None:
        """Make the model: called by Lightning once the data (and so the tokenizer) is ready; idempotent.

        Raises:
            ValueError: No vocabulary size is known, or the tokenizer has more tokens than the model.
        """
        if self.model is not None:
            return
        plan = self.hparams["plan"]
        if self.hparams["checkpoint"] is not None:
            model = self._load_folder(self.hparams["checkpoint"])
        else:
            fields = self._complete_fields(self.hparams["model"])
            with torch.random.fork_rng():
                torch.manual_seed(self._weights_seed)
                model = MixtralForCausalLM(MixtralConfig(**fields))
            self.hparams["model"] = fields
        self._check_vocabulary(model.config.vocab_size)
        if plan is not None:
            rebuild(model, CompressionPlan.from_dict(plan))
        if self.experts_implementation is not None:
            model.set_experts_implementation(self.experts_implementation)
        # transformers returns loaded models in eval mode, and Lightning does not change that.
        self.model = model.train()
        ignore_packed_buffers(self)

    def _complete_fields(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Add to the fields of a new model what its tokenizer decides."""
        fields, tokenizer = dict(fields), self.tokenizer
        if "vocab_size" not in fields:
            if tokenizer is None:
                raise ValueError(
                    "model.model.vocab_size is missing, and there is no datamodule whose tokenizer could give it"
                )
            fields["vocab_size"] = len(tokenizer)
        if tokenizer is not None:
            # MixtralConfig's defaults (1 and 2) are those of Mixtral's own tokenizer.
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                fields.setdefault(name, getattr(tokenizer, name))
        return fields

    def _load_folder(self, directory: str) -> MixtralForCausalLM:
        """Load a Hugging Face folder and remember its structure, so that our checkpoints do not need the folder."""
        datamodule = getattr(self._trainer, "datamodule", None)
        if isinstance(datamodule, TextDataModule) and datamodule.options.tokenizer is None:
            raise ValueError(
                f"model.checkpoint={directory}: its weights mean nothing to a new tokenizer: set --data.tokenizer to "
                "the one that the model was trained with (this folder, where it holds one)"
            )
        model = from_pretrained(directory, dtype=torch.get_default_dtype())
        values = model.config.to_dict()
        self.hparams["model"] = {name: values[name] for name in sorted(MODEL_FIELDS) if name in values}
        # Of the original model: the plan takes blocks out once more when the structure is made anew.
        self.hparams["model"]["num_hidden_layers"] = architecture_of(model).shape(model).num_layers
        self.hparams["checkpoint"] = None
        self.set_plan(plan_of(model))
        return model

    def _check_vocabulary(self, vocab_size: int) -> None:
        tokenizer = self.tokenizer
        if tokenizer is not None and len(tokenizer) > vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens but the model's vocabulary only {vocab_size}: use the "
                "model's own "
                "tokenizer (--data.tokenizer), or train one with fewer tokens, or set model.model.vocab_size"
            )

    def set_plan(self, plan: CompressionPlan) -> None:
        """Remember the plan whose structure the model has now, for checkpoints.

        Args:
            plan: Everything done to the model so far.
        """
        self.hparams["plan"] = plain_values(plan)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the plan of the model as it is, so that structure and weights in a checkpoint always go together."""
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["plan"] = plain_values(plan_of(self.model))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the model the structure of the checkpoint before its weights are loaded."""
        self.configure_model()
        for state in checkpoint.get("optimizer_states", ()):
            add_missing_groups(state)
        plan = checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY].get("plan")
        if plan is not None:
            rebuild(self.model, CompressionPlan.from_dict(plan))
            ignore_packed_buffers(self)
            self.hparams["plan"] = plan

    # ------------------------------------------------------------ training

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the logits ``[B, S, V]`` and each layer's router logits ``[B * S, E]``.

        Args:
            batch: ``input_ids`` [B, S] and, where there is padding, ``attention_mask`` [B, S].
        """
        outputs = self._outputs(batch)
        return self.model.lm_head(outputs.last_hidden_state), outputs.router_logits

    def _outputs(self, batch: dict[str, Tensor], **wanted: bool) -> Any:
        # Not through MixtralForCausalLM.forward, whose own balancing loss fails on layers with different numbers of
        # experts.
        return self.model.model(
            input_ids=batch["input_ids"],
            attention_mask=batch.get("attention_mask"),
            use_cache=False,
            output_router_logits=True,
            **wanted,
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return what :attr:`objective` says, by default the next-token loss, plus weighted load-balancing loss."""
        objective = self.objective
        student, router_logits = self._student(batch, objective.wants_hidden)
        loss, parts = objective(student, batch)
        mask = batch.get("attention_mask")
        balance = load_balancing_loss(router_logits, self.model.config.num_experts_per_tok, mask)
        self.log("train/loss", parts["loss"], prog_bar=True)
        self.log("train/aux_loss", balance.detach())
        self.log("train/perplexity", parts["loss"].exp())
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        for name in parts.keys() - {"loss"}:
            self.log(f"train/{name}", parts[name])
        coefficient = objective.load_balancing_coefficient
        return loss + (self.load_balancing_coefficient if coefficient is None else coefficient) * balance

    def _student(self, batch: dict[str, Tensor], hidden: bool) -> tuple[Student, tuple[Tensor, ...]]:
        """Return what the model says of a batch, and each layer's router logits."""
        outputs = self._outputs(batch, output_hidden_states=hidden)
        states: dict[int, Tensor] = {}
        if hidden:
            shape = architecture_of(self.model).shape(self.model)
            states = hidden_by_layer(outputs.hidden_states, shape.blocks, shape.num_layers)
        return Student(self.model.lm_head(outputs.last_hidden_state), states), outputs.router_logits

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Start the clock of the step."""
        self._step_started_seconds = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the training speed over the last 50 steps, without validation and loading of data."""
        mask = batch.get("attention_mask")
        tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
        self._recent_steps.append((tokens, time.perf_counter() - self._step_started_seconds))
        seconds = sum(step[1] for step in self._recent_steps)
        self.log("train/tokens_per_second", sum(step[0] for step in self._recent_steps) / max(seconds, 1e-9))

    def learning_rate_factor(self, step: int) -> float:
        """Return the schedule: linear warm-up, then a cosine to the end of the run.

        Args:
            step: Optimizer steps done.

        Returns:
            The part of ``learning_rate`` that the next step takes.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if step == self.warmup_steps:
            # The length of the run must not be asked for at the first call already: Lightning may make the training
            # loader to answer, and on a resumed run that is before it knows the loader's state, which is then lost.
            return 1.0
        total_steps = self.trainer.estimated_stepping_batches
        progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        floor = self.min_learning_rate_ratio
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW over ``surgery.parameter_groups`` and the schedule of :meth:`learning_rate_factor`.

        Raises:
            ValueError: The run has no end.
        """
        if self.trainer.max_steps == -1 and self.trainer.max_epochs == -1:
            raise ValueError("the learning rate schedule needs the length of the run: set --trainer.max_steps")
        groups = parameter_groups(self.model, self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas)
        # A plain function: of other callables LambdaLR saves the attributes, and loads them over the new ones.
        factors = [lambda step: self.learning_rate_factor(step)] * len(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Let the options of this run win over what a resumed optimizer and schedule remember of the last one."""
        names = [group.get("name") for group in self.trainer.optimizers[0].param_groups]
        if names != list(GROUP_NAMES) or not self.trainer.lr_scheduler_configs:
            return  # a child of this class has optimizers of its own
        optimizer, schedule = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        factor = self.learning_rate_factor(schedule.last_epoch)
        wanted = parameter_groups(self.model, self.weight_decay)
        for group, fresh in zip(optimizer.param_groups, wanted, strict=True):
            group["initial_lr"] = self.learning_rate
            group["lr"] = self.learning_rate * factor
            group["betas"] = self.betas
            group["weight_decay"] = fresh.get("weight_decay", self.weight_decay)
        schedule.base_lrs = [self.learning_rate] * len(wanted)

    def _apply(self, fn: Any, recurse: bool = True) -> MixtralModule:
        # bf16-true casts every tensor. The frequencies of the rotary embedding are in no file and are float32 wherever
        # transformers loads a model: in bfloat16 the model trained would not be the model that is exported.
        kept = {
            (module, name): buffer
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name.endswith("inv_freq")
        }
        applied = super()._apply(fn, recurse)
        for (module, name), buffer in kept.items():
            setattr(module, name, buffer.to(getattr(module, name).device))
        return cast("MixtralModule", applied)

    # ------------------------------------------------------------ evaluation

    def _start_likelihood(self, stage: str) -> None:
        self._likelihoods[stage] = Likelihood().to(self.device)

    def _update_likelihood(self, stage: str, batch: dict[str, Tensor]) -> None:
        logits, _ = self(batch)
        self._likelihoods[stage].update(logits, batch["labels"], batch.get("token_bytes"))

    def _log_likelihood(self, stage: str) -> None:
        # The metric adds up over processes itself: its values are the same on all, and so is their mean.
        values = self._likelihoods.pop(stage).compute()
        self.log(f"{stage}/loss", float(values["nats_per_token"]), sync_dist=True)
        self.log(f"{stage}/perplexity", float(values["perplexity"]), prog_bar=True, sync_dist=True)
        self.log(f"{stage}/bits_per_byte", float(values["bits_per_byte"]), sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        """Start new sums."""
        self._start_likelihood("val")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the sums of nats, tokens and bytes."""
        self._update_likelihood("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss`` (nats per token), ``val/perplexity`` and ``val/bits_per_byte``."""
        self._log_likelihood("val")

    def on_test_epoch_start(self) -> None:
        """Start new sums."""
        self._start_likelihood("test")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the sums of nats, tokens and bytes."""
        self._update_likelihood("test", batch)

    def on_test_epoch_end(self) -> None:
        """Log ``test/loss`` (nats per token), ``test/perplexity`` and ``test/bits_per_byte``."""
        self._log_likelihood("test")

    # ------------------------------------------------------------ prediction

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, str]]:
        """Continue prompts with the KV cache.

        Args:
            batch: ``input_ids`` [B, S] and ``attention_mask`` [B, S]; shorter prompts are padded on the left.
                ``prompt`` holds the texts.
            batch_idx: Number of the batch.

        Returns:
            One ``{"prompt": ..., "continuation": ...}`` for each row.

        Raises:
            ValueError: No datamodule with a tokenizer, or prompts padded on the right.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ValueError("predict needs a datamodule with a tokenizer: pass datamodule=TextDataModule(...)")
        input_ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(input_ids)
        if not bool(mask[:, -1].all()):
            raise ValueError("prompts must be padded on the left: a continuation cannot follow padding")
        sampling = (
            {"do_sample": True, "temperature": self.temperature} if self.temperature > 0 else {"do_sample": False}
        )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        produced = self.model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            **sampling,
        )
        continuations = tokenizer.batch_decode(produced[:, input_ids.shape[1] :], skip_special_tokens=True)
        prompts = batch.get("prompt") or tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        return [
            {"prompt": prompt, "continuation": continuation}
            for prompt, continuation in zip(prompts, continuations, strict=True)
        ]
